Feature: Two tenants
  What belongs to another tenant is answered like what never was.

  Background:
    Given the service "main"

  @ORCH-3201 @ORCH-3202 @ORCH-2036 @FAULT-22
  Scenario: Another tenant's task, stream and session are not there, whatever one does
    When Alice submits "hers" to duo in session "s"
    And "hers" is succeeded
    Then for Bob these are all 404 NOT_FOUND, as for an id that never was:
      | method | path                           | last_event_id |
      | GET    | /v1/tasks/{hers}               |               |
      | GET    | /v1/tasks/{hers}/stream        |               |
      | GET    | /v1/tasks/{hers}/stream        | 1             |
      | GET    | /v1/tasks/{hers}/stream        | 6             |
      | GET    | /v1/tasks/{hers}/stream        | 99            |
      | POST   | /v1/tasks/{hers}/cancel        |               |
      | GET    | /v1/sessions/{s}               |               |
      | DELETE | /v1/sessions/{s}               |               |
    And "hers" is not in Bob's list
    And Alice finds 1 turn in the session "s"

  @ORCH-3201
  Scenario: Another tenant cannot cancel a running task
    Given duo holds its tokens
    When Alice submits "hers" to duo
    And Bob cancels "hers"
    Then the answer is 404 NOT_FOUND
    And "hers" is running

  @ORCH-3202 @ORCH-2042
  Scenario: Two tenants use one task_id and one session_id, and notice nothing
    When Alice submits "same" to duo in session "s"
    And Alice's "same" has ended
    And Bob submits "same" to duo with max_tokens 3 in session "s"
    And Bob's "same" has ended
    Then Bob finds 1 turn in the session "s"
    And Alice finds 1 turn in the session "s"
    When Bob deletes the session "s"
    Then Bob does not find the session "s"
    And Alice finds 1 turn in the session "s"

  @ORCH-3200 @ORCH-3035
  Scenario Outline: Who may do what: <who> <method> <path>
    When <who> sends <method> <path>
    Then the answer is <answer>

    Examples:
      | who          | method | path             | answer              |
      | nobody       | GET    | /v1/tasks        | 401 UNAUTHENTICATED |
      | a stranger   | GET    | /v1/tasks        | 401 UNAUTHENTICATED |
      | Bob          | GET    | /v1/tasks        | 200                 |
      | the operator | GET    | /v1/tasks        | 403 FORBIDDEN       |
      | Bob          | GET    | /v1/pools        | 403 FORBIDDEN       |
      | Bob          | GET    | /metrics         | 403 FORBIDDEN       |
      | Bob          | GET    | /v1/capabilities | 200                 |
      | the operator | GET    | /v1/capabilities | 200                 |
      | nobody       | GET    | /v1/capabilities | 401 UNAUTHENTICATED |
      | nobody       | GET    | /healthz         | 200                 |
      | nobody       | GET    | /readyz          | 200                 |
      | nobody       | GET    | /metrics         | 401 UNAUTHENTICATED |

  @ORCH-3200 @ORCH-2022
  Scenario: A key may use its own priorities only
    When the batch key submits "a" to duo
    Then the answer is 403 FORBIDDEN
    When the batch key submits "b" to duo with priority batch
    Then "b" is succeeded
