Feature: Session affinity
  A session stays where its KV cache is warm while that is no great detour, and tells whether it did.

  Background:
    Given the service "policies"

  @ORCH-3009 @ORCH-3023
  Scenario: The next task of a session meets its replica and a warm cache
    When Alice submits "one" to twins in session "s"
    And Alice reads the stream of "one" to its end
    And Alice submits "two" to twins in session "s"
    And Alice reads the stream of "two" to its end
    Then "one" started with affinity null
    And "two" started with affinity hit and kv_warmth true
    And "two" ran where "one" did
    And Alice finds a warm session "s"

  @ORCH-3009 @ORCH-3022
  Scenario: A session whose replica is busy goes elsewhere and says so
    When Alice submits "one" to twins in session "s"
    And Alice's "one" has ended
    Given twins holds its tokens
    And the-twin holds its tokens
    When Bob submits "his" to twins in session "t"
    And Bob submits "his next" to twins in session "t"
    And Bob cancels the one that does not run where "one" did
    And Alice submits "two" to twins in session "s"
    And Alice follows "two"
    And twins lets everything go on
    And the-twin lets everything go on
    Then the stream of "two" ends well
    And "two" started with affinity miss and kv_warmth false
    And "two" ran elsewhere than "one"

  @ORCH-3009
  Scenario: A cache that another session has taken is not warm
    When Alice submits "one" to twins in session "s"
    And Alice's "one" has ended
    And Bob submits 2 tasks "his" to twins
    And all of them have ended
    And Alice submits "two" to twins in session "s"
    And Alice reads the stream of "two" to its end
    Then "two" started with affinity hit and kv_warmth false

  @ORCH-3009
  Scenario: A task that wants no cache is not bound to one
    When Alice submits "one" to twins in session "s"
    And Alice's "one" has ended
    And Alice submits "two" to twins with kv_hint cold in session "s"
    And Alice reads the stream of "two" to its end
    Then "two" started with affinity null

  @ORCH-2005
  Scenario: Deleting a session makes the engine forget its cache
    When Alice submits "one" to twins in session "s"
    And Alice's "one" has ended
    And Alice deletes the session "s"
    Then the engine that ran "one" has erased a slot
