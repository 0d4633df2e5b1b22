Feature: Fair shares
  Tenants share a route by tokens, whoever came first and however much of theirs waits.

  Background:
    Given the service "policies"
    And fair holds its tokens

  @ORCH-3075 @ORCH-3076
  Scenario: Who comes late with little does not wait behind another's backlog
    When Alice submits 8 tasks "hers" to fair
    And Bob submits 3 tasks "his" to fair
    Then "his 1" is accepted as queued before 2 others
    And "hers 8" waits behind at least 8 others
    When fair lets everything go on
    And all of them have ended
    Then while both waited fair served 1 "his" for 1 "hers"

  @ORCH-3076
  Scenario: A tenant with twice the weight gets twice the tokens
    When Carol submits 10 tasks "heavy" to fair
    And Bob submits 6 tasks "light" to fair
    And fair lets everything go on
    And all of them have ended
    Then while both waited fair served 2 "heavy" for 1 "light"

  @ORCH-3075
  Scenario: Who sends long prompts gets fewer of them served
    When Alice submits 4 tasks "long" to fair with prompts of 120 words
    And Bob submits 12 tasks "short" to fair with prompts of 12 words
    And fair lets everything go on
    And all of them have ended
    Then between two "long" fair served at least 4 "short"

  @ORCH-3075 @ORCH-3117
  Scenario: Batch gets its share beside interactive work that never ends, and no more than that
    When Alice submits 18 tasks "urgent" to fair
    And Bob submits 3 tasks "bulk" to fair with priority batch
    And fair lets everything go on
    And all of them have ended
    Then while both waited fair served 8 "urgent" for 1 "bulk"

  @ORCH-3075 @OC-CORE-1003
  Scenario: Where the route says strict, interactive work goes first; within a flow nobody overtakes
    Given ranked holds its tokens
    When Alice submits "first" to ranked
    And Alice submits "batch 1" to ranked with priority batch
    And Alice submits "batch 2" to ranked with priority batch
    And Alice submits "second" to ranked
    And Alice submits "third" to ranked
    Then "third" is accepted as queued at position 1
    And "batch 2" waits at position 3
    When ranked lets everything go on
    And all of them have ended
    Then the engine of ranked saw them in this order: first, second, third, batch 1, batch 2

  @ORCH-3076 @ORCH-3027
  Scenario: Operators see who gets which share
    When Alice submits "hers" to fair
    And Bob submits "his" to fair
    And fair lets everything go on
    And all of them have ended
    Then admission_share tells of acme and bluebell, and all shares add up to 1
