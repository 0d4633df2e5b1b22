Feature: Budgets of a session
  A session uses no more than its first task set, and is told at any time what remains.

  Background:
    Given the service "quotas"

  @ORCH-3099 @ORCH-2004
  Scenario: A task reserves its most and gives back what it did not use
    Given solo ends its output after 3 tokens
    And solo holds its tokens
    When Bob submits "one" to solo with max_tokens 20 in session "s" with a budget of 100 tokens
    Then the answer is 202
    And at most 80 and at least 50 tokens remain, by header, body and session "s"
    When solo lets everything go on
    And Bob's "one" has ended
    Then what remains of the 100 tokens of session "s" is what "one" did not use

  @ORCH-3099 @ORCH-2007
  Scenario: A task that may need more than remains is refused, by the budget's name
    When Bob submits "one" to solo with max_tokens 4 in session "s" with a budget of 60 tokens
    And Bob's "one" has ended
    And Bob submits "two" to solo with max_tokens 56 in session "s"
    Then the answer is 429 BUDGET_EXHAUSTED
    And the problem names the policy session-tokens
    And Bob finds 1 turn in the session "s"
    When Bob submits "three" to solo with max_tokens 8 in session "s"
    Then the answer is 202

  @ORCH-3099
  Scenario: Simultaneous submissions cannot overrun a budget
    Given duo holds its tokens
    When Alice submits "one" to duo with max_tokens 4 in session "s" with a budget of 100 tokens
    And Alice submits "two" to duo with max_tokens 60 in session "s"
    And Alice submits "three" to duo with max_tokens 60 in session "s"
    Then the answer is 429 BUDGET_EXHAUSTED
    And the problem names the policy session-tokens

  @ORCH-3099
  Scenario: The first task sets the budgets, a later one may repeat them, and not change them
    When Bob submits "one" to solo with max_tokens 4 in session "s" with a budget of 60 tokens
    And Bob submits "two" to solo with max_tokens 4 in session "s" with a budget of 60 tokens
    Then the answer is 202
    When Bob submits "three" to solo with max_tokens 4 in session "s" with a budget of 90 tokens
    Then the answer is 422 INVALID_PARAMS

  @ORCH-3099
  Scenario: A task ends when the running time of its session does
    Given solo holds its tokens
    When Bob submits "one" to solo with max_tokens 4 in session "s" with a budget of 300 time_ms
    And Bob follows "one"
    Then the stream of "one" is: started, 0 tokens, error BUDGET_EXHAUSTED
    When Bob submits "two" to solo with max_tokens 4 in session "s"
    Then the answer is 429 BUDGET_EXHAUSTED
    And the problem names the policy session-time

  @ORCH-3099
  Scenario: Cost is counted by the prices of the pool
    When Bob submits "one" to solo with max_tokens 8 in session "s" with a budget of 30 cost
    Then the answer is 202
    When Bob's "one" has ended
    Then what remains of the 30 cost of session "s" is what "one" did not use
    When Bob submits "two" to solo with max_tokens 25 in session "s"
    Then the answer is 429 BUDGET_EXHAUSTED
    And the problem names the policy session-cost

  @ORCH-3099 @ORCH-2005
  Scenario: A session that was deleted has left no budget behind
    Given solo holds its tokens
    When Bob submits "one" to solo with max_tokens 4 in session "s" with a budget of 60 tokens
    And Bob deletes the session "s"
    And Bob submits "two" to solo with max_tokens 4 in session "s" with a budget of 90 tokens
    Then the answer is 202
