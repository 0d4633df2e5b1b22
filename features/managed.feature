Feature: Engines that llorch keeps alive
  A pool whose engines llorch starts comes up by itself, survives their death, and is drained and reloaded without losing a
  task.

  @ORCH-3002 @ORCH-3038 @ORCH-3049 @ORCH-3300 @OC-POOL-3010
  Scenario: A task that waits while its engine is dead is served by the next one
    Given the service "managed"
    When Alice submits "before" to lone with max_tokens 5
    And Alice follows "before"
    Then the stream of "before" is: started, 5 tokens, end
    When the engine of lone/0 is killed
    And Alice submits "after" to lone with max_tokens 3
    And Alice follows "after"
    Then the stream of "after" is: started, 3 tokens, end
    And the health of lone/0 tells that its engine was ended by a signal

  @ORCH-2101 @ORCH-2106 @ORCH-3154 @ORCH-3305
  Scenario: A drained pool ends what it runs, refuses what comes, and is brought back by a reload
    Given the service "managed"
    When Alice submits "runs" to lone with max_tokens 50
    And Alice submits "waits" to lone with max_tokens 3
    And Alice follows "runs"
    And Alice follows "waits"
    And the admin drains lone
    Then the stream of "waits" is: error POOL_UNREADY
    When Alice submits "late" to lone
    Then the answer is 503 POOL_UNREADY
    And the stream of "runs" is: started, 50 tokens, end
    And the drain of lone is done with 0 moved
    When the admin reloads lone
    Then the reload of lone is done with 0 moved
    When Alice submits "again" to lone with max_tokens 3
    And Alice follows "again"
    Then the stream of "again" is: started, 3 tokens, end

  @ORCH-2102 @ORCH-2106 @FAULT-29
  Scenario: A reload replaces engines under running tasks
    Given the service "managed"
    When Alice submits "one" to pair with max_tokens 80
    And Alice submits "two" to pair with max_tokens 80
    And Alice submits "three" to pair with max_tokens 3
    And Alice follows "one"
    And Alice follows "two"
    And Alice follows "three"
    And the admin reloads pair
    Then the stream of "one" is: started, 80 tokens, end
    And the stream of "two" is: started, 80 tokens, end
    And the stream of "three" is: started, 3 tokens, end
    And the reload of pair is done with 0 moved
    And the replicas of pair are pair/0+ and pair/1+

  @ORCH-3031 @ORCH-3251 @ORCH-3253
  Scenario: A configuration that cannot be used changes nothing, and a valid one only what differs
    Given the service "managed"
    When the file says "pols: []" in the end and the admin reloads the configuration
    Then the reload is refused with 422 INVALID_PARAMS and names "pols"
    When the file says "node_lease_s: 77" in the end and the admin reloads the configuration
    Then the reload is refused with 422 INVALID_PARAMS and names "node_lease_s"
    When the file says "tenants: [{name: acme, weight: 3}]" in the end and the admin reloads the configuration
    Then the configuration in force has changed in "tenants[acme]"
    And no engine was replaced by that
    When the admin reverts the configuration
    Then the configuration in force has changed in "(reverted)"

  @ORCH-2105 @ORCH-2107 @ORCH-3304
  Scenario: A node joins with its token, serves, and leaves
    Given the service "managed"
    When the pool manager of far joins
    And Alice submits "there" to afar with max_tokens 4
    And Alice follows "there"
    Then the stream of "there" is: started, 4 tokens, end
    And the node far is joined
    When the pool manager of far gets SIGTERM
    Then the node far is absent
    And nothing of the pool manager is left
