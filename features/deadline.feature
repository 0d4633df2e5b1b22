Feature: Deadlines
  A deadline fires at its time, whatever else is running.

  Background:
    Given the service "main"
    And solo holds its tokens

  @ORCH-3080 @FAULT-08 @FAULT-09
  Scenario: A deadline in the queue ends the task while another still runs, and no engine sees it
    When Bob submits "running" to solo
    And Alice submits "late" to solo with deadline_ms 300
    And Alice follows "late"
    Then the stream of "late" is: error DEADLINE_UNMET
    And "late" has waited between 300 and 2000 ms
    And "running" is running
    And the engine of solo saw 1 generation

  @ORCH-3081
  Scenario: A running task that is to abort ends at its deadline
    When Alice submits "late" to solo with deadline_ms 300 and on_deadline abort
    And Alice follows "late"
    Then the stream of "late" is: started, 0 tokens, error DEADLINE_UNMET

  @ORCH-3081 @ORCH-3079
  Scenario: A running task that is to finish goes on
    When Alice submits "late" to solo with deadline_ms 100
    Then "late" is still running for 0.3 s
    When solo lets everything go on
    Then "late" is succeeded
