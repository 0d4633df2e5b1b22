"""ORCH-3224, ORCH-3053, ORCH-2105: gauges are read from what they show when they are asked for."""

from dataclasses import replace

import pytest

from llorch.domain.backoff import Breaker
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.gauges import LOCAL_NODE, host_gauges, route_gauges
from llorch.service.inventory import PoolView
from llorch.service.launching import HostFacts, LaunchReport, Phase
from llorch.service.nodes import NodeState, NodeView
from llorch.telemetry import Sample
from llorch.testing.devices import GIB, FakeDevices
from llorch_contract.metrics import FAMILIES
from tests.unit.api.fakes import FakePools, pool, replica
from tests.unit.service.estate import policy

PLACE = ("llamacpp", "b6500", "small", "small/0")


def by_name(samples: list[Sample]) -> dict[tuple[str, tuple[str, ...]], float]:
    found = {(sample.family, tuple(sample.labels)): sample.value for sample in samples}
    assert len(found) == len(samples), "one value for each series"
    declared = {family.name: len(family.label_values) for family in FAMILIES if family.kind == "gauge"}
    assert all(len(labels) == declared[name] for name, labels in found)
    return found


def gauges_of(*views: PoolView) -> dict[tuple[str, tuple[str, ...]], float]:
    pools = FakePools()
    pools.pools = views
    scheduler = Scheduler(policy(), Ledger(SessionLimits()))
    return by_name(list(route_gauges(pools, {"llamacpp/smol": scheduler})))  # type: ignore[arg-type]


def node(node_id: str, state: NodeState, host: HostFacts | None) -> NodeView:
    return NodeView(node_id, state, 1.0, "b", "1.0.0", "10.0.0.7", None, host, ())


def devices() -> FakeDevices:
    """Two GPUs, of which one is lost."""
    fake = FakeDevices()
    fake.put(0, total_gib=24, used_gib=6)
    fake.put(1, total_gib=8, used_gib=1)
    fake.gpus[0] = replace(fake.gpus[0], utilization=0.75)
    fake.lose(1)
    return fake


def test_gpus_of_this_host_show_their_memory_and_use() -> None:
    """ORCH-3053: what is not told is no series."""
    found = by_name(list(host_gauges(devices().read(), [])))
    assert found == {
        ("vram_used_bytes", (LOCAL_NODE, "0")): 6 * GIB,
        ("gpu_utilization", (LOCAL_NODE, "0")): 0.75,
        ("vram_used_bytes", (LOCAL_NODE, "1")): GIB,
    }


def test_nodes_show_whether_they_are_there_and_their_gpus_while_they_are() -> None:
    """ORCH-2105."""
    host = devices().read()
    nodes = [node("a", NodeState.JOINED, host), node("b", NodeState.SILENT, host), node("c", NodeState.ABSENT, None)]
    found = by_name(list(host_gauges(HostFacts(), nodes)))
    assert [found["node_up", (name,)] for name in "abc"] == [1, 0, 0]
    assert found["gpu_utilization", ("a", "0")] == 0.75
    assert {labels[0] for name, labels in found if name == "vram_used_bytes"} == {"a"}


@pytest.mark.parametrize(("breaker", "value"), [(Breaker.CLOSED, 0), (Breaker.HALF_OPEN, 1), (Breaker.OPEN, 2)])
def test_breaker_of_a_managed_replica_is_shown_as_a_number(breaker: Breaker, value: int) -> None:
    """ORCH-3038."""
    managed = replace(replica(), process=LaunchReport("small/0", 0, Phase.UP, breaker=breaker))
    assert gauges_of(pool(managed))["breaker_state", PLACE] == value


def test_replica_shows_its_state_slots_and_cache() -> None:
    """ORCH-3224."""
    found = gauges_of(pool(replace(replica(), kv_usage=0.25)))
    assert (found["replica_ready", PLACE], found["slots", PLACE], found["slots_busy", PLACE]) == (1, 2, 1)
    assert (found["kv_cache_usage_ratio", PLACE], found["pool_allow_cpu", ("small",)]) == (0.25, 1)
    for state in set(ReplicaState) - {ReplicaState.READY}:
        assert gauges_of(pool(replica(state=state)))["replica_ready", PLACE] == 0


def test_what_is_not_known_of_a_replica_is_no_series() -> None:
    """ORCH-3224: nobody else's process has a breaker."""
    names = {name for name, _ in gauges_of(pool(replica()))}
    assert names == {"queue_depth", "pool_allow_cpu", "replica_ready", "slots", "slots_busy"}


def test_queue_of_each_priority_is_shown_by_engine_and_model() -> None:
    """ORCH-3224."""
    found = gauges_of()
    assert found == {("queue_depth", ("llamacpp", "smol", priority)): 0 for priority in ("interactive", "batch")}
