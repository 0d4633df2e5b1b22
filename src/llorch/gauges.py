"""The gauges of a scrape, read from the state that they show at the moment they are asked for (ORCH-3224)."""

from collections.abc import Iterable, Iterator, Mapping

from llorch.domain.backoff import Breaker
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Priority
from llorch.service.inventory import PoolView, ReplicaHealth
from llorch.service.launching import HostFacts
from llorch.service.nodes import NodeView
from llorch.service.pools import Pools
from llorch.telemetry import UNVERIFIED, Sample

LOCAL_NODE = "local"
"""The label of the server's own host."""

_BREAKER = {Breaker.CLOSED: 0, Breaker.HALF_OPEN: 1, Breaker.OPEN: 2}


def route_gauges(pools: Pools, schedulers: Mapping[str, Scheduler]) -> Iterator[Sample]:
    """What waits, by route and priority."""
    for route_id, scheduler in schedulers.items():
        engine, _, model = route_id.partition("/")
        for priority in Priority:
            yield Sample("queue_depth", (engine, model, priority.value), scheduler.queue.depth(priority))
    for pool in pools.list():
        yield from _pool_gauges(pool)


def _pool_gauges(pool: PoolView) -> Iterator[Sample]:
    yield Sample("pool_allow_cpu", (pool.pool_id,), int(pool.allow_cpu))
    for replica in pool.replicas:
        version = replica.engine_version.value or UNVERIFIED
        yield from _replica_gauges(replica, (pool.route.engine, version, pool.pool_id, replica.replica_id))


def _replica_gauges(replica: ReplicaHealth, labels: tuple[str, str, str, str]) -> Iterator[Sample]:
    yield Sample("replica_ready", labels, int(replica.state is ReplicaState.READY))
    yield Sample("slots", labels, replica.slots)
    yield Sample("slots_busy", labels, replica.slots_busy)
    if replica.kv_usage is not None:
        yield Sample("kv_cache_usage_ratio", labels, replica.kv_usage)
    if replica.process is not None:
        yield Sample("breaker_state", labels, _BREAKER[replica.process.breaker])


def host_gauges(local: HostFacts, nodes: Iterable[NodeView]) -> Iterator[Sample]:
    """The GPUs of every host, and which nodes are there."""
    yield from _gpu_gauges(LOCAL_NODE, local)
    for node in nodes:
        is_joined = node.state == "joined"
        yield Sample("node_up", (node.node_id,), int(is_joined))
        if is_joined and node.host is not None:
            yield from _gpu_gauges(node.node_id, node.host)


def _gpu_gauges(node: str, host: HostFacts) -> Iterator[Sample]:
    for gpu in host.gpus:
        labels = (node, str(gpu.index))
        yield Sample("vram_used_bytes", labels, gpu.used_bytes)
        if gpu.utilization is not None:
            yield Sample("gpu_utilization", labels, gpu.utilization)
