"""Nodes between the wire's models and the values of the service: what a manager tells, and what it is to run."""

from llorch.api.mapping import optional_timestamp
from llorch.domain.backoff import Breaker
from llorch.errors import InvalidParams
from llorch.service.launching import Cause, Gpu, HostFacts, LastError, LaunchOrder, LaunchReport, Phase
from llorch.service.nodes import NodeView, Orders, Registration
from llorch_contract import models


def to_registration(node_id: str, body: models.NodeRegistration) -> Registration:
    """A manager that joins, as it says."""
    return Registration(
        node_id=node_id,
        boot_id=body.boot_id,
        manager_version=body.manager_version,
        address=body.address,
        host=to_host(body.host),
        reports=to_reports(body.replicas),
    )


def to_host(host: models.HostFacts) -> HostFacts:
    """A host as its manager tells of it."""
    return HostFacts(
        gpus=tuple(
            Gpu(gpu.index, gpu.name, gpu.total_bytes, gpu.used_bytes, gpu.utilization, gpu.is_lost) for gpu in host.gpus
        ),
        ram_total_bytes=host.ram_total_bytes,
        ram_available_bytes=host.ram_available_bytes,
        driver_resets=host.driver_resets,
    )


def to_reports(replicas: list[models.NodeReplica]) -> tuple[LaunchReport, ...]:
    """What became of orders. Raises InvalidParams for a cause that is none."""
    return tuple(_report(replica) for replica in replicas)


def _report(replica: models.NodeReplica) -> LaunchReport:
    error = replica.error
    return LaunchReport(
        replica_id=replica.replica_id,
        generation=replica.generation,
        phase=Phase(replica.phase.value),
        incarnation=replica.incarnation,
        pid=replica.pid,
        url=replica.url,
        api_key=replica.api_key,
        engine_version=replica.engine_version,
        model_digest=replica.model_digest,
        cause=None if replica.cause is None else Cause(replica.cause.value),
        error=None if error is None else LastError(error.code.value, error.message, error.at_ms / 1000),
        restarts={_cause(name): count for name, count in replica.restarts.items()},
        breaker=Breaker(replica.breaker.value),
        next_start_s=None if replica.next_start_ms is None else replica.next_start_ms / 1000,
        load_s=None if replica.load_ms is None else replica.load_ms / 1000,
    )


def _cause(name: str) -> Cause:
    try:
        return Cause(name)
    except ValueError as exc:
        raise InvalidParams(f"there is no cause {name!r}", details={"choices": [c.value for c in Cause]}) from exc


def to_orders(orders: Orders) -> models.NodeOrders:
    """Everything that a node is to run."""
    return models.NodeOrders(
        lease_id=orders.lease_id,
        lease_ms=round(orders.lease_s * 1000),
        heartbeat_ms=round(orders.heartbeat_s * 1000),
        wanted=[_order(order) for order in orders.wanted],
        restarts=[
            models.RestartOrder(
                replica_id=restart.replica_id,
                incarnation=restart.incarnation,
                cause=models.FailureCause(restart.cause.value),
            )
            for restart in orders.restarts
        ],
    )


def _order(order: LaunchOrder) -> models.NodeOrder:
    supervision, restart = order.supervision, order.supervision.restart
    return models.NodeOrder(
        replica_id=order.replica_id,
        pool_id=order.pool_id,
        engine=models.Engine(order.engine),
        launcher=order.launcher,
        model=order.model,
        model_path=order.model_path,
        model_digest=order.model_digest,
        ctx=order.ctx,
        slots=order.slots,
        allow_cpu=order.allow_cpu,
        devices=list(order.devices),
        tensor_split=list(order.tensor_split),
        port=order.port,
        threads=order.threads,
        binary=order.binary,
        arguments=list(order.arguments),
        command=list(order.command),
        environment=dict(order.environment),
        health_path=order.health_path,
        memory_limit_bytes=order.memory_limit_bytes,
        headroom=models.OrderHeadroom(
            vram_bytes=order.headroom.vram_bytes,
            ram_bytes=order.headroom.ram_bytes,
            kv_bytes_per_token=order.headroom.kv_bytes_per_token,
        ),
        supervision=models.OrderSupervision(
            start_s=supervision.start_s,
            unresponsive_s=supervision.unresponsive_s,
            stop_s=supervision.stop_s,
            backoff_first_s=restart.first_s,
            backoff_factor=restart.factor,
            backoff_max_s=restart.max_s,
            storm_failures=restart.storm_failures,
            cool_down_s=restart.cool_down_s,
            stable_s=restart.stable_s,
        ),
        generation=order.generation,
    )


def to_node(view: NodeView) -> models.Node:
    """A node in the list of nodes."""
    remaining = view.lease_remaining_s
    return models.Node(
        node_id=view.node_id,
        state=models.NodeState(view.state.value),
        since=optional_timestamp(view.since),
        manager_version=view.manager_version,
        address=view.address,
        lease_remaining_ms=None if remaining is None else round(max(0.0, remaining) * 1000),
        host=None if view.host is None else _host(view.host),
        replicas=[
            models.NodeProcess(
                replica_id=process.replica_id,
                phase=models.ProcessPhase(process.phase.value),
                incarnation=process.incarnation,
            )
            for process in view.replicas
        ],
    )


def _host(host: HostFacts) -> models.HostFacts:
    return models.HostFacts(
        gpus=[
            models.Gpu(
                index=gpu.index,
                name=gpu.name,
                total_bytes=gpu.total_bytes,
                used_bytes=gpu.used_bytes,
                utilization=gpu.utilization,
                is_lost=gpu.is_lost,
            )
            for gpu in host.gpus
        ],
        ram_total_bytes=host.ram_total_bytes,
        ram_available_bytes=host.ram_available_bytes,
        driver_resets=host.driver_resets,
    )
