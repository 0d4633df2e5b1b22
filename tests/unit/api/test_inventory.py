"""Pools, replica sets and capabilities as the control plane shows them (ORCH-2103, ORCH-2104, ORCH-3095, ORCH-1101)."""

from dataclasses import asdict

from llorch.api.inventory import to_capabilities, to_pool, to_pool_health, to_replica_set
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Cohort
from llorch.service.inventory import ReplicaSetView
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
