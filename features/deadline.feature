Feature: Deadlines
  A deadline fires at its time, whatever else is running.

  @ORCH-3080 @FAULT-08 @FAULT-09
  Scenario: A deadline in the queue ends the task while another still runs, and no engine sees it
    Given the service "main"
    And solo holds its tokens
    When Bob submits "running" to solo
    And Alice submits "late" to solo with deadline_ms 300
    And Alice follows "late"
    Then the stream of "late" is: error DEADLINE_UNMET
    And "late" has waited between 300 and 2000 ms
    And "running" is running
    And the engine of solo saw 1 generation

  @ORCH-3081
  Scenario: A running task that is to abort ends at its deadline
    Given the service "main"
    And solo holds its tokens
    When Alice submits "late" to solo with deadline_ms 300 and on_deadline abort
    And Alice follows "late"
    Then the stream of "late" is: started, 0 tokens, error DEADLINE_UNMET

  @ORCH-3081 @ORCH-3079
  Scenario: A running task that is to finish goes on
    Given the service "main"
    And solo holds its tokens
    When Alice submits "late" to solo with deadline_ms 100
    Then "late" is still running for 0.3 s
    When solo lets everything go on
    Then "late" is succeeded

  @ORCH-3079 @ORCH-3029
  Scenario: Once rates are measured, the wait is told, and a deadline that cannot be met is refused at once
    Given the service "policies"
    And paced has served 40 tasks of 4 tokens
    When Alice submits "long" to paced with max_tokens 200
    And Alice submits "also long" to paced with max_tokens 200
    And Alice submits "hurried" to paced with deadline_ms 300
    Then the answer is 422 DEADLINE_UNMET
    And the problem is retriable and names the policy deadline
    And the problem tells a start in 1500 to 8000 ms
    And the answer says to wait between 1 and 8000 ms
    And Alice does not find "hurried"
    When Alice submits "patient" to paced with deadline_ms 60000
    Then "patient" is accepted as queued with a start predicted in 1500 to 8000 ms

  @ORCH-3081
  Scenario: A reader is told the chance to end in time
    Given the service "policies"
    And paced has served 40 tasks of 4 tokens
    When Alice submits "long" to paced with max_tokens 100
    And Alice submits "patient" to paced with deadline_ms 60000
    And Alice follows "patient"
    Then Alice is told that "patient" will be in time with a probability above 0.9

  @OC-CORE-1003
  Scenario: Where the route says edf, the nearest deadline of a tenant goes first
    Given the service "policies"
    And urgent holds its tokens
    When Alice submits "running" to urgent
    And Alice submits "whenever" to urgent
    And Alice submits "later" to urgent with deadline_ms 120000
    And Alice submits "sooner" to urgent with deadline_ms 60000
    Then "sooner" is accepted as queued at position 0
    And "later" waits at position 1
    And "whenever" waits at position 2
    When urgent lets everything go on
    And all of them have ended
    Then the engine of urgent saw them in this order: running, sooner, later, whenever

  @ORCH-3081 @ORCH-3027
  Scenario: Operators see how many deadlines are met
    Given the service "main"
    And solo holds its tokens
    When Alice submits "in time" to solo with deadline_ms 60000
    And solo lets everything go on
    And "in time" is succeeded
    Then deadlines_met_ratio of interactive is between 0 and 1
