"""Steps of operators: pools, health, capabilities, metrics, the log and the signal."""

from pathlib import Path

import yaml
from behave import given, then, when
from behave.runner import Context
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import ROOT, wait_for
from tests.support.wire import schema
from tools.metrics_lint import lint

METRICS_CONTRACT = Path(ROOT, "openapi", "metrics.yaml")


@then("the pool {pool:Model} has {interactive:d} interactive and {batch:d} batch task in its queues of {capacity:d}")
def step_queues(context: Context, pool: str, interactive: int, batch: int, capacity: int) -> None:
    queues = {queue["priority"]: queue for queue in _pool(context, pool)["queues"]}
    found = {priority: (queue["depth"], queue["capacity"]) for priority, queue in queues.items()}
    assert found == {"interactive": (interactive, capacity), "batch": (batch, capacity)}, found
    policies = {priority: queue["full_policy"] for priority, queue in queues.items()}
    assert policies == {"interactive": "reject", "batch": "drop-lru"}, policies


@then("{busy:d} of {slots:d} slots of {pool:Model} are busy")
def step_busy(context: Context, busy: int, slots: int, pool: str) -> None:
    [replica] = context.world.deployment.caller("the operator").health(pool)["replicas"]
    assert (replica["slots_busy"], replica["slots"]) == (busy, slots), replica


@then("the replica set of {model:Model} has {busy:d} of {slots:d} slots busy and {queued:d} tasks queued")
def step_replica_set(context: Context, model: str, busy: int, slots: int, queued: int) -> None:
    listed = _get(context, "/v1/replica-sets")
    schema("ReplicaSetList", "control").validate(listed)
    [found] = [each for each in listed["replica_sets"] if each["model"] == model]
    assert found["load"] == {"slots": slots, "slots_busy": busy, "queued": queued}, found
    assert found["replica_ids"] == [f"{model}/0"], found


@then("the batch or the interactive task of {pool:Model} runs")
def step_next_runs(context: Context, pool: str) -> None:
    """The interactive one, by ORCH-3075."""
    task = context.world.wait_state("queued", "running")
    assert task["placement"]["pool_id"] == pool, task
    assert context.world.look("batch")["state"] == "queued"


@then("the pool {pool:Model} is live and ready, its version and digest unverified, its determinism {determinism:w}")
def step_health(context: Context, pool: str, determinism: str) -> None:
    health = context.world.deployment.caller("the operator").health(pool)
    assert (health["live"], health["ready"], health["draining"], health["last_error"]) == (True, True, False, None)
    [replica] = health["replicas"]
    assert (replica["state"], replica["determinism"]) == ("ready", determinism), replica
    assert (replica["engine_version"], replica["engine_version_source"]) == (None, "unverified"), replica
    assert (replica["model_digest"], replica["model_digest_source"]) == (None, "unverified"), replica


@then("the determinism of {pool:Model} is {determinism:w}")
def step_determinism(context: Context, pool: str, determinism: str) -> None:
    [replica] = context.world.deployment.caller("the operator").health(pool)["replicas"]
    assert replica["determinism"] == determinism, replica


@then("the replicas of {pool:Model} are all ready")
def step_all_ready(context: Context, pool: str) -> None:
    replicas = context.world.deployment.caller("the operator").health(pool)["replicas"]
    assert {replica["state"] for replica in replicas} == {"ready"}, replicas


@then("the capabilities list the routes solo, duo, tiny and smollm2 with the workload completion only")
def step_capabilities(context: Context) -> None:
    capabilities = _get(context, "/v1/capabilities")
    schema("Capabilities", "control").validate(capabilities)
    routes = {route["model"]: route for route in capabilities["routes"]}
    assert list(routes) == ["solo", "duo", "tiny", "smollm2"], routes
    assert all(route["workloads"] == ["completion"] for route in routes.values()), routes
    assert routes["solo"]["determinism"] == ["exact"], routes
    assert routes["duo"]["determinism"] == ["best_effort"], routes
    assert routes["tiny"]["ctx_max"] == 2048, routes
    limits = capabilities["limits"]
    assert (limits["session_turns"], limits["disconnect_grace_ms"], limits["body_bytes"]) == (3, 500, 65_536), limits


@then("only {pool:Model} and {other:Model} have allow_cpu, in pools, health and capabilities")
def step_allow_cpu(context: Context, pool: str, other: str) -> None:
    on_cpu = {pool, other}
    pools = {each["id"]: each for each in _get(context, "/v1/pools")["pools"]}
    assert {name for name, each in pools.items() if each["allow_cpu"]} == on_cpu
    assert {name for name, each in pools.items() if each["notice"] is not None} == on_cpu
    capabilities = _get(context, "/v1/capabilities")
    assert {route["model"] for route in capabilities["routes"] if route["allow_cpu"]} == on_cpu
    assert len(capabilities["notices"]) == 2, capabilities
    for name, each in pools.items():
        [replica] = context.world.deployment.caller("the operator").health(name)["replicas"]
        assert replica["allow_cpu"] is each["allow_cpu"], replica


@then("the log, the pools, the health, the capabilities and the metrics tell of allow_cpu")
def step_demonstration(context: Context) -> None:
    service = context.world.deployment.service
    assert "CPU" in service.announcement("cpu_demonstration")["notice"]
    [pool] = _get(context, "/v1/pools")["pools"]
    assert pool["allow_cpu"] is True
    assert "CPU" in pool["notice"]
    health = context.world.deployment.caller("the operator").health(pool["id"])
    assert health["notice"] == pool["notice"]
    assert [replica["allow_cpu"] for replica in health["replicas"]] == [True]
    capabilities = _get(context, "/v1/capabilities")
    assert [route["allow_cpu"] for route in capabilities["routes"]] == [True]
    assert any("CPU" in notice for notice in capabilities["notices"])
    assert _sum(_scrape(context), "pool_allow_cpu") == 1


@then("version and digest of the replica are measured")
def step_measured(context: Context) -> None:
    [pool] = _get(context, "/v1/pools")["pools"]
    [replica] = context.world.deployment.caller("the operator").health(pool["id"])["replicas"]
    assert (replica["engine_version_source"], replica["model_digest_source"]) == ("measured", "measured"), replica
    expected = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert replica["model_digest"] == expected, replica
    assert replica["engine_version"], replica
    assert replica["determinism"] == "exact", replica


@given("the metrics were read")
def step_metrics_before(context: Context) -> None:
    context.world.facts["before"] = _scrape(context)


@then("the metrics agree with the contract")
def step_metrics_lint(context: Context) -> None:
    text = _scrape(context)
    context.world.facts["after"] = text
    problems = lint(text, yaml.safe_load(METRICS_CONTRACT.read_text(encoding="utf-8")))
    assert problems == [], problems


@then("{family:w} grew by {count:d}")
def step_grew(context: Context, family: str, count: int) -> None:
    before = _sum(context.world.facts["before"], family)

    def look() -> bool:
        return _sum(_scrape(context), family) - before == count

    wait_for(look, f"{family} grew by {count} from {before}", 2)


@then("open_streams, queue_depth and slots_busy are 0")
def step_gauges(context: Context) -> None:
    wait_for(lambda: _gauges(context) == [0, 0, 0], "open_streams, queue_depth and slots_busy are 0", 5)


@when("the service gets SIGTERM")
def step_sigterm(context: Context) -> None:
    service = context.world.deployment.service
    service.signal()
    service.announcement("shutdown_requested")


@given("{model:Model} stalls from now on")
@when("{model:Model} stalls from now on")
def step_stall(context: Context, model: str) -> None:
    engine = context.world.deployment.fake(model)
    engine.wait_running(1)
    engine.command(set={"hold": False, "stall": True})


@then("the service has ended with status 0 and a clean log")
def step_ended(context: Context) -> None:
    context.world.deployment.service.stop(10)


def _get(context: Context, path: str) -> dict:
    response = context.world.deployment.caller("the operator").http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def _pool(context: Context, pool_id: str) -> dict:
    listed = _get(context, "/v1/pools")
    schema("PoolList", "control").validate(listed)
    [pool] = [each for each in listed["pools"] if each["id"] == pool_id]
    return pool


def _scrape(context: Context) -> str:
    response = context.world.deployment.caller("the operator").http.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain"), response.headers
    return response.text


def _gauges(context: Context) -> list[float]:
    text = _scrape(context)
    return [_sum(text, family) for family in ("open_streams", "queue_depth", "slots_busy")]


def _sum(text: str, name: str) -> float:
    """The sum of a family over all its labels."""
    family = name.removesuffix("_total")
    return sum(
        sample.value
        for metric in text_string_to_metric_families(text)
        if metric.name in (family, name)
        for sample in metric.samples
        if sample.name == name
    )
