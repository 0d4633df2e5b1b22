Feature: Bad input
  Whatever is wrong gets a clear, typed answer, and nothing is lost by it.

  Background:
    Given the service "main"

  @ORCH-2006 @ORCH-2046 @ORCH-2020 @ORCH-3110 @ORCH-3112
  Scenario: Bodies that cannot be taken
    Given duo holds its tokens
    When Alice submits "running" to duo
    Then these bodies are refused, and each refusal names the fault:
      | body                                                                    | status | code              | names            |
      | {}                                                                      | 400    | INVALID_PARAMS    | model_ref        |
      | {"model_ref": "duo"}                                                    | 400    | INVALID_PARAMS    | prompt           |
      | {"model_ref": "duo", "prompt": "a", "messages": [{"role": "user", "content": "b"}]} | 400 | INVALID_PARAMS | prompt      |
      | {"model_ref": "duo", "prompt": ""}                                      | 400    | INVALID_PARAMS    | prompt           |
      | {"model_ref": "duo", "prompt": null}                                    | 400    | INVALID_PARAMS    | prompt           |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": 0}                    | 400    | INVALID_PARAMS    | max_tokens       |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": "4"}                  | 400    | INVALID_PARAMS    | max_tokens       |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": true}                 | 400    | INVALID_PARAMS    | max_tokens       |
      | {"model_ref": "duo", "prompt": "a", "seed": 4294967295}                 | 400    | INVALID_PARAMS    | seed             |
      | {"model_ref": "duo", "prompt": "a", "seed": -1}                         | 400    | INVALID_PARAMS    | seed             |
      | {"model_ref": "duo", "prompt": "a", "priority": "urgent"}               | 400    | INVALID_PARAMS    | priority         |
      | {"model_ref": "duo", "prompt": "a", "task_id": "7"}                     | 400    | INVALID_PARAMS    | task_id          |
      | {"model_ref": "duo", "prompt": "a", "colour": "red"}                    | 400    | INVALID_PARAMS    | colour           |
      | {"model_ref": "duo", "prompt": "a", "sampling": {"temperature": 9}}     | 400    | INVALID_PARAMS    | temperature      |
      | {"model_ref": "duo", "prompt": "a", "deadline_ms": 0}                   | 400    | INVALID_PARAMS    | deadline_ms      |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": NaN}                  | 400    | INVALID_PARAMS    | JSON             |
      | {"model_ref": "duo", "prompt": "a"                                      | 400    | INVALID_PARAMS    | JSON             |
      | []                                                                      | 400    | INVALID_PARAMS    |                  |
      | {"model_ref": "nobody", "prompt": "a"}                                  | 404    | NOT_FOUND         | nobody           |
      | {"model_ref": "duo", "engine": "vllm", "prompt": "a"}                   | 404    | NOT_FOUND         | vllm             |
      | {"model_ref": "duo", "workload": "embedding", "inputs": ["a"]}          | 404    | NOT_FOUND         | embedding        |
      | {"model_ref": "duo", "workload": "rerank", "inputs": ["a", "b"]}        | 404    | NOT_FOUND         | rerank           |
      | {"model_ref": "duo", "inputs": ["a"]}                                   | 422    | INVALID_PARAMS    | prompt           |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": 9000}                 | 422    | INVALID_PARAMS    | max_tokens       |
      | {"model_ref": "duo", "prompt": "a", "ctx": 4096}                        | 422    | INVALID_PARAMS    | ctx              |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": 2048}                 | 422    | INVALID_PARAMS    | tokens           |
      | {"model_ref": "duo", "prompt": "a", "max_tokens": 4, "expected_tokens": 5} | 422 | INVALID_PARAMS    | expected_tokens  |
      | {"model_ref": "duo", "prompt": "a", "sampler_profile_version": "v9"}    | 422    | INVALID_PARAMS    | v9               |
      | {"model_ref": "duo", "prompt": "a", "determinism": "strict"}            | 422    | INVALID_PARAMS    | strict           |
      | {"model_ref": "duo", "prompt": "a", "session_budgets": {"gold": 9}}     | 400    | INVALID_PARAMS    | gold             |
      | {"model_ref": "duo", "prompt": "a", "sampling": {"grammar": "root ::= [a]", "json_schema": {}}} | 422 | INVALID_PARAMS | grammar |
    And "running" is running
    And Alice has nothing but "running" that is not final

  @ORCH-2045 @ORCH-3205 @ORCH-2014
  Scenario Outline: Requests that cannot be taken: <fault>
    When Alice sends a request with <fault>
    Then the answer is <answer>

    Examples:
      | fault                                 | answer                |
      | a body that is not UTF-8              | 400 INVALID_PARAMS    |
      | a chunked body that is not JSON       | 400 INVALID_PARAMS    |
      | no body                               | 400 INVALID_PARAMS    |
      | the media type text/plain             | 415 INVALID_PARAMS    |
      | a form                                | 415 INVALID_PARAMS    |
      | a body of 70000 bytes                 | 413 PAYLOAD_TOO_LARGE |
      | a chunked body of 70000 bytes         | 413 PAYLOAD_TOO_LARGE |
      | a prompt of 20001 characters          | 413 PAYLOAD_TOO_LARGE |
      | headers of 9000 bytes                 | 413 PAYLOAD_TOO_LARGE |
      | an unknown query parameter            | 400 INVALID_PARAMS    |
      | a task_id that is no UUID             | 400 INVALID_PARAMS    |
      | a limit of 0                          | 400 INVALID_PARAMS    |
      | a limit that is a word                | 400 INVALID_PARAMS    |
      | an unknown state                      | 400 INVALID_PARAMS    |
      | a cursor that nobody gave             | 422 INVALID_PARAMS    |
      | a path that is not there              | 404 NOT_FOUND         |
      | a task that never was                 | 404 NOT_FOUND         |
      | a session that never was              | 404 NOT_FOUND         |
      | the method PUT on /v1/tasks           | 405 INVALID_PARAMS    |
      | the method DELETE on a task           | 405 INVALID_PARAMS    |
      | a correlation id with spaces          | 400 INVALID_PARAMS    |

  @ORCH-2045
  Scenario: A 405 lists every method of the path
    When Alice sends a request with the method PUT on /v1/tasks
    Then the answer allows: GET, POST

  @ORCH-2045
  Scenario: A chunked body is taken
    When Alice submits a chunked body
    Then the answer is 202

  @ORCH-2021
  Scenario: Upper-case UUIDs mean the same as lower-case ones
    When Alice submits "a" to duo under an upper-case task_id
    Then the answer has the lower-case task_id
    And Alice finds it under both spellings

  @ORCH-2014
  Scenario: A correlation id is echoed, and is in the error frame of a task
    Given duo holds its tokens
    When Alice submits "a" to duo with the correlation id journey-7
    Then the correlation id of the answer is journey-7
    When Alice follows "a"
    And Alice cancels "a"
    Then the stream of "a" is: started, 0 tokens, error CANCELED
    And the error frame of "a" has the correlation id journey-7

  @ORCH-3153
  Scenario: An engine that refuses the request ends the task with its reason
    When Alice submits "a" to tiny with a broken grammar
    Then "a" is failed
    And the error of "a" is INVALID_PARAMS
    And the replicas of tiny are all ready
