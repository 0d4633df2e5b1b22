Feature: Quotas
  A tenant uses no more than it may, is told which limit it met, and gets back what it did not use.

  Background:
    Given the service "quotas"

  @ORCH-3077 @ORCH-2007
  Scenario: More waiting tasks than the tenant may have are refused, on every route together
    Given solo holds its tokens
    And duo holds its tokens
    When Alice submits "running" to solo
    And Alice submits "waiting 1" to solo
    And Alice submits "waiting 2" to solo with priority batch
    And Alice submits "too many" to solo
    Then the answer is 429 QUOTA_EXCEEDED
    And the problem is retriable and names the policy max-queued
    And nothing says how long to wait
    When Bob submits "another tenant's" to solo
    Then "another tenant's" is accepted as queued
    When Alice cancels "waiting 1"
    And Alice submits the same "too many" again
    Then "too many" is accepted as queued

  @ORCH-3077
  Scenario: A tenant that runs as much as it may is passed over, not refused
    Given duo holds its tokens
    When Bob submits "one" to duo
    And Bob submits "two" to duo
    Then "two" is accepted as queued
    When Bob follows "two"
    Then Bob is told that "two" is queued because of quota
    When Alice submits "hers" to duo
    Then "hers" is running
    And "two" is queued
    When duo lets everything go on
    Then "two" is succeeded

  @ORCH-3006 @ORCH-2007
  Scenario: Submissions faster than the tenant's rate are refused until the time that is told
    Given duo holds its tokens
    When Carol submits "one" to duo
    And Carol submits "two" to duo
    And Carol submits "three" to duo
    Then the answer is 429 QUOTA_EXCEEDED
    And the problem is retriable and names the policy rate
    And the answer says to wait between 1 and 1500 ms
    When Carol submits "bulk" to duo with priority batch
    Then the answer is 202
    When Carol waits as long as "three" was told
    And Carol submits the same "three" again
    Then the answer is 202

  @ORCH-3077
  Scenario: Tokens of a minute are reserved as expected, and given back when fewer come
    Given duo ends its output after 4 tokens
    And duo holds its tokens
    When Dave submits "one" to duo with max_tokens 50
    And Dave submits "two" to duo with max_tokens 40
    Then the answer is 429 QUOTA_EXCEEDED
    And the problem is retriable and names the policy tokens-per-minute
    And the answer says to wait between 1000 and 90000 ms
    When duo lets everything go on
    And Dave's "one" has ended
    And Dave submits the same "two" again
    Then the answer is 202
