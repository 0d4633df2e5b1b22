Feature: Shutdown
  SIGTERM is an event, not a broken socket.

  @ORCH-3265 @ORCH-3266 @ORCH-3267 @ORCH-3114 @ORCH-3261 @FAULT-28
  Scenario: Queued tasks end retriably, a running one goes on for its grace, and nothing new is taken
    Given the service "fleeting"
    And duo holds its tokens
    When Alice submits "ends in time" to duo with max_tokens 3
    And duo stalls from now on
    And Alice submits "never ends" to duo with max_tokens 3
    And Alice submits "queued" to duo
    And Alice follows "ends in time"
    And Alice follows "never ends"
    And Alice follows "queued"
    And the service gets SIGTERM
    Then the stream of "queued" is: error POOL_UNAVAILABLE
    And the error frame of "queued" is retriable and names the policy shutdown
    When Alice submits "new" to duo
    Then the answer is 503 POOL_UNAVAILABLE
    And the problem is retriable and names the policy shutdown
    When Alice submits the same "ends in time" again
    Then the answer is the first one to "ends in time", byte for byte
    When nobody sends GET /readyz
    Then the answer is 503 POOL_UNAVAILABLE
    When duo releases 3 tokens each
    Then the stream of "ends in time" is: started, 3 tokens, end
    And the stream of "never ends" ends with a retriable error of the policy shutdown
    And the service has ended with status 0 and a clean log
