Feature: Cancel
  Cancel ends the task that it names, at once, and no other.

  Background:
    Given the service "main"

  @ORCH-2003 @ORCH-2040 @FAULT-01 @FAULT-02
  Scenario: A queued task is canceled without an engine having seen it
    Given solo holds its tokens
    When Alice submits "running" to solo
    And Alice submits "queued" to solo
    And Alice submits "behind" to solo
    And Alice follows "queued"
    And Alice cancels "queued"
    Then the answer is 204
    And the stream of "queued" is: error CANCELED
    And "queued" is canceled
    And "behind" waits at position 0
    And "running" is running
    When solo lets everything go on
    Then "running" is succeeded
    And "behind" is succeeded
    And the engine of solo saw 2 generations

  @ORCH-2003 @FAULT-01
  Scenario: A running task gets no token after its cancel, and its neighbour is untouched
    Given duo holds its tokens
    When Alice submits "victim" to duo with max_tokens 8
    And Bob submits "neighbour" to duo with max_tokens 8
    And Alice follows "victim"
    And Bob follows "neighbour"
    And duo releases 3 tokens each
    And Alice has read 3 tokens of "victim"
    And Alice cancels "victim"
    And duo lets everything go on
    Then the stream of "victim" is: started, 3 tokens, error CANCELED
    And the stream of "neighbour" for Bob is: started, 8 tokens, end
    And the engine of duo saw "victim" cancelled after 3 tokens

  @ORCH-2003
  Scenario: Cancel is idempotent, and a finished task keeps its outcome
    When Alice submits "a" to duo
    And "a" is succeeded
    And Alice cancels "a"
    Then the answer is 204
    And "a" is succeeded
    When Alice submits "b" to solo with max_tokens 4
    And Alice cancels "b"
    And Alice cancels "b"
    Then the answer is 204

  @ORCH-2003 @ORCH-3056 @ORCH-3141
  Scenario: A genuine engine's slot is free within 200 ms while it decodes
    When Bob submits "neighbour" to tiny with max_tokens 1900
    And Alice cancels 5 tasks that decode on tiny, one after the other
    Then the engine of tiny had freed the slot within 200 ms, in the median
    And no token followed any of these cancels
    And "neighbour" is succeeded with all of its 1900 tokens

  @ORCH-3056 @ORCH-3179
  Scenario: A genuine engine's slot is freed during prefill; how long that takes is reported
    When Alice cancels a task while smollm2 evaluates its prompt of 1500 tokens
    Then the engine of smollm2 had freed the slot within 10000 ms, in the median
    And no token followed any of these cancels
