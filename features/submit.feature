Feature: Submit, follow, read
  A client hands in a task, follows its tokens, and finds its output later.

  Background:
    Given the service "main"

  @ORCH-2001 @ORCH-2002 @ORCH-2032 @ORCH-2033 @ORCH-2010 @ORCH-2014
  Scenario: From submit to the end of the stream
    When Alice submits "a" to duo with max_tokens 5
    Then "a" is accepted as running at position 0
    And the acceptance of "a" predicts a start at once, or nothing
    When Alice reads the stream of "a" to its end
    Then it is: started, 5 tokens, end
    And its text is what the engine made for "a"
    And "a" is succeeded with that output and finish_reason length

  @ORCH-2039 @ORCH-2010
  Scenario: A task that nobody follows runs to its end and keeps its output
    When Alice submits "a" to duo with max_tokens 5
    And "a" is succeeded
    And Alice reads the stream of "a" to its end
    Then it is: started, 5 tokens, end
    And "a" is succeeded with that output and finish_reason length

  @ORCH-2009
  Scenario: The same submission again gets the stored answer, and the engine runs it once
    When Alice submits "a" to duo with max_tokens 5
    And "a" is succeeded
    And Alice submits the same "a" again
    Then the answer is the first one to "a", byte for byte
    And the engine of duo saw 1 generation

  @ORCH-2009
  Scenario: The same task_id with another body is a conflict
    When Alice submits "a" to duo with max_tokens 5
    And Alice submits "a" to duo with max_tokens 6
    Then the answer is 409 CONFLICT
    And "a" is succeeded

  @ORCH-2028 @FAULT-03
  Scenario: Many simultaneous submissions of one task_id make one task
    When Alice submits "a" to duo 16 times at once
    Then all of them got the same 202
    And "a" is succeeded
    And the engine of duo saw 1 generation

  @OC-CORE-1003 @ORCH-3029 @FAULT-24
  Scenario: First come, first served among a tenant's tasks of a priority
    Given solo holds its tokens
    When Alice submits "first" to solo
    And Alice submits "second" to solo
    And Alice submits "third" to solo
    Then "third" is accepted as queued at position 1
    When solo lets everything go on
    And all of them have ended
    Then the engine of solo saw them in this order: first, second, third

  @ORCH-2020 @ORCH-3057
  Scenario: Messages reach the engine through its chat template, a prompt as it is
    When Alice submits "raw" to duo with prompt <s>raw
    And Alice submits "chat" to duo with the message "good day"
    And all of them have ended
    Then the engine of duo saw the prompt "<s>raw"
    And the engine of duo saw a prompt that ends in "good day<|im_end|>\n<|im_start|>assistant\n"

  @ORCH-2024 @ORCH-2025
  Scenario: Seed and sampling parameters reach the engine, and a seed that is absent depends on the task_id alone
    When Alice submits "a" to duo with seed 4294967294
    And Alice submits "b" to duo without a seed
    And Bob submits "b" again under his own name
    Then all of them have ended
    And the engine of duo saw the seed 4294967294
    And both tasks named "b" had the same seed

  @ORCH-2010 @ORCH-2031
  Scenario: One's own tasks are listed, newest first, in pages
    When Bob submits "one" to duo with max_tokens 1
    And Bob submits "two" to duo with max_tokens 1
    And Bob submits "three" to duo with max_tokens 1
    Then Bob's list in pages of 2 begins with: three, two, one
