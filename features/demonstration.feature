Feature: The demonstration
  Without a configuration a real model answers, and says plainly what it is.

  Background:
    Given the service "demonstration"

  @ORCH-3245 @ORCH-2001 @ORCH-2002 @ORCH-3174
  Scenario: A real model answers, token by token
    When Alice has smollm2-135m-instruct continue: "The capital of France is"
    And Alice reads the stream of "the text" to its end
    Then it is a started frame, tokens, and an end
    And the answer contains "Paris"
    When Alice asks smollm2-135m-instruct: "Why is the sky blue?"
    And Alice reads the stream of "the question" to its end
    Then it is a started frame, tokens, and an end

  @ORCH-1101 @ORCH-3264 @ORCH-3096
  Scenario: It says plainly that it is a CPU demonstration
    Then the log, the pools, the health, the capabilities and the metrics tell of allow_cpu
    And version and digest of the replica are measured

  @ORCH-3203 @ORCH-3204
  Scenario Outline: Without keys, a browser's foreign page gets nothing: <fault>
    When Alice sends a request with <fault>
    Then the answer is <answer>
    And no CORS header is sent

    Examples:
      | fault                     | answer             |
      | the Host evil.example     | 403 FORBIDDEN      |
      | the Origin of evil.example | 403 FORBIDDEN     |
      | the media type text/plain | 415 INVALID_PARAMS |
      | a form                    | 415 INVALID_PARAMS |

  @ORCH-3203
  Scenario: Without keys everybody is the tenant local, whatever header comes
    When Alice submits "a" to smollm2-135m-instruct with max_tokens 1
    Then "a" is there for whoever asks, with any key
