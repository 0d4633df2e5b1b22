Feature: A reader who leaves
  A task with on_disconnect cancel is canceled once nobody has followed it for the grace.

  Background:
    Given the service "main"
    And duo holds its tokens

  @ORCH-2013
  Scenario: An interactive task is canceled after the grace, and its slot is free
    When Alice submits "a" to duo with max_tokens 8
    And Alice follows "a"
    And duo releases 2 tokens each
    And Alice has read 2 tokens of "a"
    And Alice goes away from "a"
    Then "a" is still running for 0.3 s
    And "a" is canceled
    And the engine of duo saw "a" cancelled after 2 tokens

  @ORCH-2013
  Scenario: A reader who comes back in time stops that
    When Alice submits "a" to duo with max_tokens 8
    And Alice follows "a"
    And duo releases 2 tokens each
    And Alice has read 2 tokens of "a"
    And Alice goes away from "a"
    And Alice resumes "a" after 3
    Then "a" is still running for 0.8 s
    When duo lets everything go on
    Then "a" is succeeded

  @ORCH-2013 @ORCH-2022
  Scenario Outline: A task that is to continue goes on: <fields>
    When Alice submits "a" to duo with <fields>
    And Alice follows "a"
    And Alice goes away from "a"
    Then "a" is still running for 0.8 s
    When duo lets everything go on
    Then "a" is succeeded

    Examples:
      | fields                 |
      | priority batch         |
      | on_disconnect continue |

  @ORCH-2013
  Scenario: A queued task whose reader left is canceled as well
    Given solo holds its tokens
    When Bob submits "running" to solo with on_disconnect continue
    And Alice submits "queued" to solo
    And Alice follows "queued"
    And Alice goes away from "queued"
    Then "queued" is canceled
    And "running" is running

  @ORCH-2013 @ORCH-2039
  Scenario: A task that was never followed is not canceled
    When Alice submits "a" to duo with max_tokens 8
    Then "a" is still running for 0.8 s

  @ORCH-2038 @ORCH-2013
  Scenario: As long as one of several readers stays, nothing is canceled
    When Alice submits "a" to duo with max_tokens 8
    And Alice follows "a"
    And Alice follows "a" from a second place
    And Alice goes away from "a"
    Then "a" is still running for 0.8 s
    When duo lets everything go on
    Then the stream of "a" from the second place is: started, 8 tokens, end

  @ORCH-2011 @FAULT-27
  Scenario: A stream is not silent while its task waits
    Given solo holds its tokens
    When Alice submits "ahead 1" to solo
    And Alice submits "ahead 2" to solo
    And Alice submits "waits" to solo
    And Alice follows "waits"
    Then Alice is told that "waits" is queued at position 1 because of tasks_ahead
    And Alice gets 2 heartbeats on "waits" within 3 s
    When Alice cancels "ahead 2"
    Then Alice is told that "waits" is queued at position 0 because of slots_busy

  @ORCH-3205
  Scenario: One stream too many is refused; it was not a reader
    When Bob submits "a" to duo with max_tokens 8
    And Bob follows "a" 12 times
    And Bob opens one more stream of "a"
    Then the answer is 429 QUOTA_EXCEEDED
    When Alice submits "other" to duo with max_tokens 8
    And Alice follows "other"
    Then the answer is 200
