Feature: Sessions
  Tasks that share a session_id take turns, for a while.

  @ORCH-2004 @ORCH-2043 @ORCH-2007
  Scenario: A session tells what is left of it, and refuses a turn too many
    Given the service "main"
    When Alice submits "one" to duo in session "s"
    And Alice submits "two" to duo in session "s"
    Then Alice finds 2 turns in the session "s"
    And what is unknown of the session "s" is null
    When Alice submits "three" to duo in session "s"
    And Alice submits "four" to duo in session "s"
    Then the answer is 429 BUDGET_EXHAUSTED
    And the problem names the policy session-turns
    And Retry-After is what remains of the session "s", and up to half of it more

  @ORCH-2043 @FAULT-07
  Scenario: Simultaneous submissions cannot overrun the turns
    Given the service "main"
    When Alice submits 12 tasks to duo in session "s" at once
    Then 3 of them got 202 and 9 got 429

  @ORCH-2005
  Scenario: DELETE cancels the session's unfinished tasks and forgets it
    Given the service "main"
    And solo holds its tokens
    When Alice submits "running" to solo in session "s"
    And Alice submits "queued" to solo in session "s"
    And Alice submits "other" to solo
    And Alice follows "running"
    And Alice deletes the session "s"
    Then the answer is 204
    And "running" is canceled
    And "queued" is canceled
    And the stream of "running" is: started, 0 tokens, error CANCELED
    And "other" is running
    And Alice does not find the session "s"
    When Alice deletes the session "s"
    Then the answer is 404 NOT_FOUND

  @ORCH-2042
  Scenario: A session expires after its time to live; its tasks go on
    Given the service "fleeting"
    And duo holds its tokens
    When Alice submits "a" to duo in session "s"
    Then Alice finds 1 turn in the session "s"
    And Alice no longer finds the session "s" before long
    And "a" is running
