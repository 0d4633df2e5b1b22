Feature: Control plane
  Operators see pools, replicas, load and metrics as they are.

  Background:
    Given the service "main"

  @ORCH-2104 @ORCH-3019
  Scenario: Pools show routes, queues and replicas, and the load as it is
    Given solo holds its tokens
    When Alice submits "running" to solo
    And Alice submits "queued" to solo
    And Alice submits "batch" to solo with priority batch
    Then the pool solo has 1 interactive and 1 batch task in its queues of 2
    And 1 of 1 slots of solo are busy
    And the replica set of solo has 1 of 1 slots busy and 2 tasks queued
    When Alice cancels "running"
    Then the batch or the interactive task of solo runs

  @ORCH-2103 @ORCH-3032 @ORCH-3046
  Scenario: Health tells what is known and what is not
    Then the pool solo is live and ready, its version and digest unverified, its determinism exact
    And the determinism of duo is best_effort

  @ORCH-3095 @ORCH-3096
  Scenario: Capabilities name what is served and nothing else
    Then the capabilities list the routes solo, duo, tiny and smollm2 with the workload completion only
    And only tiny and smollm2 have allow_cpu, in pools, health and capabilities

  @ORCH-2103
  Scenario: A pool that is not there
    When the operator sends GET /v1/pools/nowhere/health
    Then the answer is 404 NOT_FOUND

  @ORCH-3027 @OC-METRICS-7101 @ORCH-3225
  Scenario: A live scrape is what the contract says, and moves with what happens
    Given the metrics were read
    When Alice submits "a" to duo with max_tokens 5
    And "a" is succeeded
    And Alice submits "b" to nowhere
    Then the metrics agree with the contract
    And tasks_enqueued_total grew by 1
    And tokens_out_total grew by 5
    And tasks_rejected_total grew by 1
    And tasks_finished_total grew by 1
    And open_streams, queue_depth and slots_busy are 0
