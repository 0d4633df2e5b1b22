"""Pools, replicas and what the server can do, as the control plane shows them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from llorch.api.mapping import timestamp
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Priority
from llorch.service.inventory import LastError, PoolView, ReplicaHealth, ReplicaSetView
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
    )


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
    return models.ReplicaCounts(total=len(replicas), **{state.value: by_state[state.value] for state in ReplicaState})


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
        last_error=_last_error(replica.last_error),
    )


def _last_error(error: LastError | None) -> models.LastError | None:
    if error is None:
        return None
    return models.LastError(code=models.ErrorCode(error.code), message=error.message[:4096], at=timestamp(error.at))


def _class_of(*, is_exact: bool) -> models.DeterminismClass:
    return models.DeterminismClass.exact if is_exact else models.DeterminismClass.best_effort
