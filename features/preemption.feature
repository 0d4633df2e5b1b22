Feature: Preemption
  Where the operator allows it, running batch work makes room for interactive work, and its reader loses nothing.

  Background:
    Given the service "policies"
    And hard holds its tokens

  @ORCH-3085 @ORCH-3087 @ORCH-3027
  Scenario: A batch task makes room and goes on later behind the token it stopped at
    Given the metrics were read
    When Bob submits "bulk" to hard with priority batch and max_tokens 12
    And Bob follows "bulk"
    And hard releases 3 tokens each
    And Bob has read 3 tokens of "bulk"
    And Alice submits "urgent" to hard
    Then Bob is told that "bulk" was preempted and is resumable
    And "urgent" is running
    And "bulk" is queued
    When hard lets everything go on
    Then the stream of "bulk" for Bob is: started, 12 tokens, end
    And "urgent" is succeeded
    And "bulk" was preempted 1 time
    And the engine of hard saw "bulk" go on behind its first 3 tokens
    And the metrics agree with the contract
    And preemptions_total grew by 1
    And resumptions_total grew by 1

  @ORCH-3087 @ORCH-3045
  Scenario: A strict task is replayed, and its reader gets what an undisturbed one would
    When Bob submits "bulk" to hard with priority batch and max_tokens 12 and determinism strict
    And Bob follows "bulk"
    And hard releases 3 tokens each
    And Bob has read 3 tokens of "bulk"
    And Alice submits "urgent" to hard
    Then Bob is told that "bulk" was preempted and is resumable
    When hard lets everything go on
    Then the stream of "bulk" for Bob is: started, 12 tokens, end
    When Bob reads the stream of "bulk" to its end
    Then its text is what the engine made for "bulk"

  @ORCH-3086
  Scenario: Work past half of its way is left alone
    When Bob submits "bulk" to hard with priority batch and max_tokens 12
    And Bob follows "bulk"
    And hard releases 8 tokens each
    And Bob has read 8 tokens of "bulk"
    And Alice submits "urgent" to hard
    Then "urgent" is accepted as queued at position 0
    And "bulk" is running
    When hard lets everything go on
    Then the stream of "bulk" for Bob is: started, 12 tokens, end

  @ORCH-3086
  Scenario: Protected work is left alone, and so is everything where preemption is soft
    Given soft holds its tokens
    When Bob submits "chat" to hard
    And Alice submits "urgent" to hard
    Then "urgent" is accepted as queued at position 0
    When Bob submits "bulk" to soft with priority batch
    And Alice submits "other" to soft
    Then "other" is accepted as queued at position 0
    And "bulk" is running

  @ORCH-3087 @ORCH-2003
  Scenario: A task that was preempted can be canceled while it waits
    When Bob submits "bulk" to hard with priority batch and max_tokens 12
    And Bob follows "bulk"
    And hard releases 3 tokens each
    And Bob has read 3 tokens of "bulk"
    And Alice submits "urgent" to hard
    Then Bob is told that "bulk" was preempted and is resumable
    When Bob cancels "bulk"
    Then the stream of "bulk" for Bob is: started, 3 tokens, error CANCELED
