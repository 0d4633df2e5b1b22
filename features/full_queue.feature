Feature: A full queue
  A queue that is full says so honestly, and shuts out nobody who has less than a fair share of it.

  @ORCH-3005 @ORCH-2007 @ORCH-2006 @FAULT-26
  Scenario: One task too many is refused, by the policy's name and without an invented wait
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo
    When Alice submits "too many" to solo
    Then the answer is 429 ADMISSION_REJECT
    And the problem is retriable and names the policy reject

  @ORCH-3112 @ORCH-2009 @FAULT-06
  Scenario: A refusal leaves nothing behind, and the same submission succeeds later
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo
    When Alice submits "later" to solo in session "s"
    Then the answer is 429 ADMISSION_REJECT
    And Alice does not find "later"
    And Alice does not find the session "s"
    When Alice cancels "waiting 2"
    And Alice submits the same "later" again
    Then "later" is accepted as queued at position 1
    And Alice finds 1 turn in the session "s"

  @ORCH-3004 @FAULT-12
  Scenario: Another priority and another route have room of their own
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo
    When Alice submits "batch" to solo with priority batch
    Then "batch" is accepted as queued
    When Alice submits "elsewhere" to duo
    Then "elsewhere" is succeeded

  @ORCH-2009 @ORCH-3110
  Scenario: What was accepted before is answered although the queue is full
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo
    When Alice submits the same "waiting 1" again
    Then the answer is the first one to "waiting 1", byte for byte

  @ORCH-3004 @ORCH-3005
  Scenario: Who has less than a fair share of places takes the newest one of who has the most
    Given the service "main"
    And solo holds its tokens
    And Alice has filled the interactive queue of solo
    When Alice follows "waiting 2"
    And Bob submits "late" to solo
    Then "late" is accepted as queued
    And the stream of "waiting 2" is: error ADMISSION_REJECT
    And the error frame of "waiting 2" is retriable and names the policy fair-share
    And "waiting 2" is failed
    And "waiting 1" is queued
    When Bob submits "too many" to solo
    Then the answer is 429 ADMISSION_REJECT
    And the problem is retriable and names the policy reject

  @ORCH-3005
  Scenario: drop-lru ends the tenant's oldest waiting task in favour of its newest
    Given the service "policies"
    And dropping holds its tokens
    And Alice has filled the interactive queue of dropping
    When Alice follows "waiting 1"
    And Alice submits "newest" to dropping
    Then "newest" is accepted as queued at position 1
    And the stream of "waiting 1" is: error QUEUE_FULL_DROP_LRU
    And the error frame of "waiting 1" is retriable and names the policy drop-lru
    And the error of "waiting 1" is QUEUE_FULL_DROP_LRU
    And "running" is running
    When dropping lets everything go on
    Then "waiting 2" is succeeded
    And "newest" is succeeded

  @ORCH-3005
  Scenario: drop-lru is what a full batch queue does unless told otherwise
    Given the service "main"
    And solo holds its tokens
    When Alice submits "running" to solo
    And Alice submits "oldest" to solo with priority batch
    And Alice submits "middle" to solo with priority batch
    And Alice submits "newest" to solo with priority batch
    Then "newest" is accepted as queued
    And "oldest" is failed
    And the error of "oldest" is QUEUE_FULL_DROP_LRU

  @ORCH-3005 @ORCH-3085
  Scenario: shed-low-priority ends the tenant's newest waiting batch task in favour of an interactive one
    Given the service "policies"
    And shedding holds its tokens
    When Alice submits "running" to shedding
    And Alice submits "bulk 1" to shedding with priority batch
    And Alice submits "bulk 2" to shedding with priority batch
    And Alice submits "one" to shedding
    And Alice submits "two" to shedding
    And Alice follows "bulk 2"
    And Alice submits "three" to shedding
    Then "three" is accepted as queued
    And the stream of "bulk 2" is: error ADMISSION_REJECT
    And the error frame of "bulk 2" is retriable and names the policy shed-low-priority
    When Alice submits "four" to shedding
    Then "four" is accepted as queued
    And "bulk 1" is failed
    When Alice submits "five" to shedding
    Then the answer is 429 ADMISSION_REJECT
    And the problem is retriable and names the policy shed-low-priority
