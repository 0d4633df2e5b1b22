"""Pools, replicas and what the server can do, as the control plane shows them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from llorch.api.mapping import optional_timestamp, timestamp
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Priority
from llorch.service.inventory import (
    ConfigStatus,
    LastError,
    PoolChange,
    PoolView,
    ReplicaHealth,
    ReplicaSetView,
    SloSnapshot,
)
from llorch.service.launching import LaunchReport
from llorch.service.limits import Limits
from llorch.service.routes import Route
from llorch_contract import models
from llorch_contract.specs import load_spec

API_VERSION = ".".join(load_spec("data")["info"]["version"].split(".")[:2])
"""Major and minor version of the data plane's contract."""


def to_pool(view: PoolView) -> models.Pool:
    """A pool in the list of pools."""
    return models.Pool(
        id=view.pool_id,
        route=_route_key(view.route),
        allow_cpu=view.allow_cpu,
        notice=view.notice,
        queues=[_queue(view, priority) for priority in Priority if priority in view.capacity],
        replicas=_counts(view.replicas),
    )


def to_pool_health(view: PoolView) -> models.PoolHealth:
    """How a pool is."""
    newest = max((r.last_error for r in view.replicas if r.last_error), key=lambda error: error.at, default=None)
    return models.PoolHealth(
        pool_id=view.pool_id,
        live=any(not replica.state.is_gone for replica in view.replicas),
        ready=any(replica.state is ReplicaState.READY for replica in view.replicas),
        draining=view.is_draining,
        change=None if view.change is None else to_pool_change(view.change),
        last_error=_last_error(newest),
        notice=view.notice,
        replicas=[_replica(replica, allow_cpu=view.allow_cpu) for replica in view.replicas],
    )


def to_replica_set(view: ReplicaSetView) -> models.ReplicaSet:
    """A cohort and its load."""
    key = _route_key(view.route)
    return models.ReplicaSet(
        engine=key.engine,
        model=key.model,
        quant=key.quant,
        ctx=key.ctx,
        sampler_profile_version=key.sampler_profile_version,
        engine_version=view.cohort.engine_version,
        model_digest=view.cohort.model_digest,
        determinism=_class_of(is_exact=view.cohort.exact),
        replica_ids=[replica.replica_id for replica in view.replicas],
        load=models.ReplicaSetLoad(
            slots=sum(replica.slots for replica in view.replicas),
            slots_busy=sum(replica.slots_busy for replica in view.replicas),
            queued=view.queued,
        ),
        slo=[_slo(snapshot) for snapshot in view.slo],
    )


def _slo(snapshot: SloSnapshot) -> models.SloSnapshot:
    return models.SloSnapshot(
        priority=models.Priority(snapshot.priority.value),
        tasks=snapshot.tasks,
        first_token_p95_ms=_ms(snapshot.first_token_p95_s),
        total_p95_ms=_ms(snapshot.total_p95_s),
        error_ratio=snapshot.error_ratio,
        window_ms=round(snapshot.window_s * 1000),
    )


def deadline_s(body: models.DrainRequest | models.ReloadRequest | None) -> float | None:
    """How long running tasks may go on; None leaves it to the pool."""
    milliseconds = None if body is None else body.deadline_ms
    return milliseconds / 1000 if isinstance(milliseconds, int) else None


def to_pool_change(change: PoolChange) -> models.PoolChange:
    """A drain or reload, as far as it is."""
    return models.PoolChange(
        kind=models.ChangeKind(change.kind),
        state=models.ChangeState(change.state),
        started_at=timestamp(change.started_at),
        deadline_at=optional_timestamp(change.deadline_at),
        ended_at=optional_timestamp(change.ended_at),
        replicas_total=change.replicas_total,
        replicas_done=change.replicas_done,
        running=change.running,
        queued=change.queued,
        moved=change.moved,
        ready_ms=_ms(change.ready_s),
        message=_bounded(change.message),
    )


def to_config_status(status: ConfigStatus) -> models.ConfigStatus:
    """The configuration in force."""
    change = status.change
    return models.ConfigStatus(
        revision=status.revision,
        loaded_at=timestamp(status.loaded_at),
        can_revert=status.can_revert,
        change=None
        if change is None
        else models.ConfigChange(
            state=models.ChangeState(change.state),
            started_at=timestamp(change.started_at),
            ended_at=optional_timestamp(change.ended_at),
            changed=[path[:1024] for path in change.changed[:4096]],
            message=_bounded(change.message),
        ),
    )


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds * 1000))


def _bounded(message: str | None) -> str | None:
    return None if message is None else message[:4096]


def to_capabilities(routes: Iterable[Route], pools: Sequence[PoolView], limits: Limits) -> models.Capabilities:
    """What the server can do; what it cannot is absent."""
    return models.Capabilities(
        api_version=API_VERSION,
        routes=[_route(route, [pool for pool in pools if pool.route.route_id == route.route_id]) for route in routes],
        limits=models.Limits(**asdict(limits)),
        notices=[f"pool {pool.pool_id}: {pool.notice}" for pool in pools if pool.notice],
    )


def _route(route: Route, pools: Sequence[PoolView]) -> models.RouteCapabilities:
    key = _route_key(route)
    classes = {_class_of(is_exact=replica.is_exact) for pool in pools for replica in pool.replicas}
    return models.RouteCapabilities(
        engine=key.engine,
        model=key.model,
        quant=key.quant,
        ctx_max=key.ctx,
        sampler_profile_version=key.sampler_profile_version,
        workloads=[workload for workload in models.Workload if workload.value in route.workloads],
        priorities=list(models.Priority),
        determinism=[kind for kind in models.DeterminismClass if kind in classes],
        features=sorted(route.features),
        allow_cpu=route.allow_cpu or any(pool.allow_cpu for pool in pools),
    )


def _route_key(route: Route) -> models.RouteKey:
    return models.RouteKey(
        engine=models.Engine(route.engine),
        model=route.model,
        quant=route.quant or None,
        ctx=route.ctx,
        sampler_profile_version=route.sampler_profile_version,
    )


def _queue(view: PoolView, priority: Priority) -> models.QueueStatus:
    return models.QueueStatus(
        priority=models.Priority(priority.value),
        capacity=view.capacity[priority],
        full_policy=models.FullPolicy(view.full_policy[priority].value),
        depth=view.depth[priority],
    )


def _counts(replicas: Sequence[ReplicaHealth]) -> models.ReplicaCounts:
    by_state = Counter(replica.state.value for replica in replicas)
    counts = {state.value.replace("-", "_"): by_state[state.value] for state in ReplicaState}
    return models.ReplicaCounts(total=len(replicas), **counts)


def _replica(replica: ReplicaHealth, *, allow_cpu: bool) -> models.ReplicaHealth:
    return models.ReplicaHealth(
        replica_id=replica.replica_id,
        state=models.ReplicaState(replica.state.value),
        slots=replica.slots,
        slots_busy=replica.slots_busy,
        engine_version=replica.engine_version.value,
        engine_version_source=models.FactSource(replica.engine_version.source),
        model_digest=replica.model_digest.value,
        model_digest_source=models.FactSource(replica.model_digest.source),
        determinism=_class_of(is_exact=replica.is_exact),
        allow_cpu=allow_cpu,
        devices=list(replica.devices),
        kv_cache_usage_ratio=replica.kv_usage,
        node=replica.node,
        process=None if replica.process is None else _process(replica.process),
        last_error=_last_error(replica.last_error),
    )


def _process(report: LaunchReport) -> models.ReplicaProcess:
    return models.ReplicaProcess(
        phase=models.ProcessPhase(report.phase.value),
        pid=report.pid,
        incarnation=report.incarnation,
        restarts=sum(report.restarts.values()),
        breaker=models.Breaker(report.breaker.value),
        cause=None if report.cause is None else models.FailureCause(report.cause.value),
        next_start_ms=_ms(report.next_start_s),
        load_ms=_ms(report.load_s),
    )


def _last_error(error: LastError | None) -> models.LastError | None:
    if error is None:
        return None
    return models.LastError(code=models.ErrorCode(error.code), message=error.message[:4096], at=timestamp(error.at))


def _class_of(*, is_exact: bool) -> models.DeterminismClass:
    return models.DeterminismClass.exact if is_exact else models.DeterminismClass.best_effort
