Feature: A full queue
  A queue that is full says so honestly and changes nothing else.

  Background:
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo

  @ORCH-3005 @ORCH-2007 @ORCH-2006 @FAULT-26
  Scenario: One task too many is refused, by the policy's name and without an invented wait
    When Bob submits "too many" to solo
    Then the answer is 429 ADMISSION_REJECT
    And the problem is retriable and names the policy reject
    And nothing says how long to wait

  @ORCH-3112 @ORCH-2009 @FAULT-06
  Scenario: A refusal leaves nothing behind, and the same submission succeeds later
    When Bob submits "later" to solo in session "s"
    Then the answer is 429 ADMISSION_REJECT
    And Bob does not find "later"
    And Bob does not find the session "s"
    When Alice cancels "waiting 2"
    And Bob submits the same "later" again
    Then "later" is accepted as queued at position 1
    And Bob finds 1 turn in the session "s"

  @ORCH-3004 @FAULT-12
  Scenario: Another priority and another route have room of their own
    When Bob submits "batch" to solo with priority batch
    Then "batch" is accepted as queued at position 2
    When Bob submits "elsewhere" to duo
    Then "elsewhere" is succeeded

  @ORCH-2009 @ORCH-3110
  Scenario: What was accepted before is answered although the queue is full
    When Alice submits the same "waiting 1" again
    Then the answer is the first one to "waiting 1", byte for byte
