Feature: Resume
  A stream that broke goes on where it was, byte for byte.

  @ORCH-2012 @ORCH-2034 @ORCH-2032
  Scenario: After every durable frame a reader may be cut off and lose nothing
    Given the service "main"
    When Alice submits "a" to duo with max_tokens 6
    And Alice reads the stream of "a" to its end
    Then a reader who was cut off after each durable frame gets the rest of "a" byte for byte

  @ORCH-2012 @ORCH-2038
  Scenario: A reader who is cut off again and again while the task runs gets what an uninterrupted one gets
    Given the service "main"
    And duo holds its tokens
    When Alice submits "a" to duo with max_tokens 6
    And Alice follows "a"
    Then a second reader, cut off after every frame while duo releases token by token, gets the same bytes

  @ORCH-2036
  Scenario Outline: What cannot be resumed is answered clearly: <id>
    Given the service "main"
    When Alice submits "a" to duo with max_tokens 2
    And "a" is succeeded
    And Alice resumes "a" after <id>
    Then the answer is <answer>

    Examples:
      | id               | answer             |
      | 4                | 204                |
      | 5                | 422 INVALID_PARAMS |
      | x                | 400 INVALID_PARAMS |
      | -1               | 400 INVALID_PARAMS |
      | 01               | 400 INVALID_PARAMS |
      | 1234567890123456 | 400 INVALID_PARAMS |

  @ORCH-2036 @ORCH-2037
  Scenario: A transcript that has expired is gone, then its record is forgotten
    Given the service "fleeting"
    When Alice submits "a" to duo
    And "a" is succeeded
    Then Alice's resume of "a" is answered 410 STREAM_GONE before long
    And the output of "a" is gone, too
    And Alice's resume of "a" is answered 404 NOT_FOUND before long
