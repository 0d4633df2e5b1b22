"""Pools, replica sets, capabilities and changes as the control plane shows them.

ORCH-2101, ORCH-2103, ORCH-2104, ORCH-3031, ORCH-3095, ORCH-1101.
"""

from dataclasses import asdict, replace

from llorch.api.inventory import (
    deadline_s,
    to_capabilities,
    to_config_status,
    to_pool,
    to_pool_change,
    to_pool_health,
    to_replica_set,
)
from llorch.domain.backoff import Breaker
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Cohort, Priority
from llorch.service.inventory import ConfigChange, ConfigStatus, PoolChange, ReplicaSetView, SloSnapshot
from llorch.service.launching import Cause, LaunchReport, Phase
from llorch.service.limits import Limits
from llorch_contract import models
from tests.unit.api.fakes import DIGEST, ROUTE, pool, replica


def test_pool_counts_its_replicas_by_state() -> None:
    counts = to_pool(pool(replica("a"), replica("b"), replica("c", state=ReplicaState.FAILED))).replicas
    assert (counts.total, counts.ready, counts.failed, counts.unready) == (3, 2, 1, 0)


def test_pool_shows_the_queue_of_each_priority() -> None:
    queues = to_pool(pool(replica())).queues
    assert [(q.priority.value, q.capacity, q.depth) for q in queues] == [("interactive", 64, 3), ("batch", 32, 0)]


def test_pool_lives_while_a_replica_may_come_back() -> None:
    unready = to_pool_health(pool(replica(state=ReplicaState.UNREADY)))
    gone = to_pool_health(pool(replica(state=ReplicaState.FAILED), replica("b", state=ReplicaState.STOPPED)))
    assert (unready.live, unready.ready) == (True, False)
    assert (gone.live, gone.ready) == (False, False)


def test_last_error_of_a_pool_is_the_newest_of_its_replicas() -> None:
    health = to_pool_health(pool(replica("a", error_at=5.0), replica("b", error_at=7.0), replica("c")))
    assert health.last_error is not None
    assert (health.last_error.message, health.last_error.at) == ("refused at 7.0", "1970-01-01T00:00:07.000Z")
    assert to_pool_health(pool(replica())).last_error is None


def test_what_an_engine_does_not_tell_is_unverified() -> None:
    shown = to_pool_health(pool(replica())).replicas[0]
    assert (shown.engine_version, shown.engine_version_source) == ("b6500", models.FactSource.measured)
    assert (shown.model_digest, shown.model_digest_source) == (None, models.FactSource.unverified)
    assert (shown.determinism, shown.allow_cpu) == (models.DeterminismClass.best_effort, True)


def test_replica_set_adds_up_its_load() -> None:
    view = ReplicaSetView(ROUTE, Cohort("b6500", DIGEST, exact=True), (replica("a"), replica("b")), 3)
    shown = to_replica_set(view)
    assert (shown.load.slots, shown.load.slots_busy, shown.load.queued) == (4, 2, 3)
    assert (shown.replica_ids, shown.model_digest) == (["a", "b"], DIGEST)
    assert shown.determinism is models.DeterminismClass.exact


def test_capabilities_tell_limits_routes_and_the_cpu_demonstration() -> None:
    limits = Limits(prompt_chars=7)
    shown = to_capabilities([ROUTE], [pool(replica())], limits)
    assert shown.api_version == "1.0"
    assert shown.limits.model_dump() == asdict(limits)
    assert shown.notices == ["pool small: CPU demonstration"]
    route = shown.routes[0]
    assert (route.model, route.ctx_max, route.allow_cpu) == ("smol", 2048, True)
    assert [kind.value for kind in route.determinism] == ["best_effort"]
    assert route.features == ["grammar", "messages", "prompt"]


def test_workloads_that_nothing_serves_are_absent_from_capabilities() -> None:
    shown = to_capabilities([ROUTE], [pool(replica(), notice=None)], Limits())
    assert [workload.value for workload in shown.routes[0].workloads] == ["completion"]
    assert shown.notices == []


def test_every_state_of_a_replica_is_counted_under_its_name() -> None:
    """ORCH-2103."""
    for state in ReplicaState:
        counts = to_pool(pool(replica(state=state))).replicas.model_dump()
        assert {name for name, number in counts.items() if number} == {"total", state.value.replace("-", "_")}


def test_managed_replica_shows_its_process_node_devices_and_cache() -> None:
    """ORCH-2103, ORCH-3038."""
    report = LaunchReport(
        "small/0",
        3,
        Phase.WAITING,
        incarnation=5,
        cause=Cause.VRAM_OOM,
        restarts={Cause.EXIT: 2, Cause.VRAM_OOM: 1},
        breaker=Breaker.HALF_OPEN,
        next_start_s=1.25,
        load_s=0.612,
    )
    managed = replace(replica(), process=report, node="gpu-host", devices=(0, 2), kv_usage=0.25)
    shown = to_pool_health(pool(managed)).replicas[0]
    assert (shown.node, shown.devices, shown.kv_cache_usage_ratio) == ("gpu-host", [0, 2], 0.25)
    assert shown.process == models.ReplicaProcess(
        phase=models.ProcessPhase.waiting,
        pid=None,
        incarnation=5,
        restarts=3,
        breaker=models.Breaker("half-open"),
        cause=models.FailureCause("vram-oom"),
        next_start_ms=1250,
        load_ms=612,
    )


def test_replica_that_somebody_else_runs_shows_no_process() -> None:
    """ORCH-2103."""
    shown = to_pool_health(pool(replica())).replicas[0]
    assert (shown.process, shown.node, shown.devices, shown.kv_cache_usage_ratio) == (None, None, [], None)


def test_change_of_a_pool_is_shown_as_far_as_it_is() -> None:
    """ORCH-2101, ORCH-2102, ORCH-2106."""
    change = PoolChange("reload", "rolled_back", 5.0, 6.5, 7.0, 4, 1, 2, 3, 1, 0.75, "x" * 5000)
    shown = to_pool_change(change)
    assert (shown.kind, shown.state) == ("reload", "rolled_back")
    assert (shown.started_at, shown.deadline_at, shown.ended_at) == (
        "1970-01-01T00:00:05.000Z",
        "1970-01-01T00:00:06.500Z",
        "1970-01-01T00:00:07.000Z",
    )
    assert (shown.replicas_total, shown.replicas_done, shown.running, shown.queued, shown.moved) == (4, 1, 2, 3, 1)
    assert (shown.ready_ms, len(shown.message or "")) == (750, 4096)
    assert to_pool_health(replace(pool(replica()), change=change)).change == shown
    begun = to_pool_change(PoolChange("drain", "running", 5.0))
    assert (begun.deadline_at, begun.ended_at, begun.ready_ms, begun.message) == (None, None, None, None)


def test_deadline_of_a_change_is_the_pools_unless_one_is_given() -> None:
    """ORCH-2101, ORCH-2102."""
    for request in (models.DrainRequest, models.ReloadRequest):
        assert deadline_s(request()) is None
        assert deadline_s(request(deadline_ms=0)) == 0.0
        assert deadline_s(request(deadline_ms=1500)) == 1.5
    assert deadline_s(None) is None


def test_configuration_shows_paths_of_what_changed_within_bounds() -> None:
    """ORCH-3031."""
    change = ConfigChange("failed", 5.0, 6.0, tuple(f"pools.{'p' * 2000}" for _ in range(5000)), "m" * 5000)
    shown = to_config_status(ConfigStatus(3, 4.0, can_revert=True, change=change))
    assert (shown.revision, shown.loaded_at, shown.can_revert) == (3, "1970-01-01T00:00:04.000Z", True)
    assert shown.change is not None
    assert (shown.change.state, shown.change.ended_at) == ("failed", "1970-01-01T00:00:06.000Z")
    assert (len(shown.change.changed), len(shown.change.changed[0]), len(shown.change.message or "")) == (
        4096,
        1024,
        4096,
    )
    assert to_config_status(ConfigStatus(1, 4.0, can_revert=False)).change is None


def test_replica_set_shows_what_its_tasks_got_of_late() -> None:
    """ORCH-2104."""
    slo = (
        SloSnapshot(Priority.INTERACTIVE, 20, 0.25, 1.5, 0.05, 300.0),
        SloSnapshot(Priority.BATCH, 1, None, None, 1.0, 300.0),
    )
    view = ReplicaSetView(ROUTE, Cohort("b6500", DIGEST, exact=True), (replica(),), 0, slo)
    first, second = to_replica_set(view).slo
    assert (first.priority, first.tasks, first.first_token_p95_ms, first.total_p95_ms) == ("interactive", 20, 250, 1500)
    assert (first.error_ratio, first.window_ms) == (0.05, 300_000)
    assert (second.priority, second.first_token_p95_ms, second.total_p95_ms) == ("batch", None, None)
