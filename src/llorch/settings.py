"""From the configuration to the values that each part of the service is given: its own piece, in its own types.

One function for each of those values. It builds nothing that runs, and decides nothing but what holds when a setting
was left out and the schema cannot say it.
"""

from llorch import config
from llorch.api.auth import KeyRecord
from llorch.domain.backoff import RestartPolicy
from llorch.domain.ledger import SessionLimits
from llorch.domain.policy import (
    Fairness,
    FullPolicy,
    Order,
    PreemptionPolicy,
    Prices,
    QueuePolicy,
    Quota,
    Rate,
    RoutePolicy,
)
from llorch.domain.task import Priority
from llorch.service.launching import Headroom, LaunchOrder, Supervision
from llorch.service.limits import Limits
from llorch.service.nodes import NodeConfig
from llorch.service.ports import Sampling
from llorch.service.probes import Pool
from llorch.service.records import Retention
from llorch.service.routes import Route
from llorch.service.streams import OVERHEAD_FRAMES
from llorch.telemetry import RouteScope

CPU_NOTICE = "CPU demonstration: this pool runs on the CPU (allow_cpu); its speed says nothing of a GPU."

LLAMACPP_FEATURES = frozenset({"prompt", "messages", "stop", "grammar", "json_schema"})

_MIB = 1024 * 1024


# Routes and pools


def route_id_of(pool: config.Pool) -> str:
    """The id of the pool's route: what tasks can tell routes apart by."""
    return f"{pool.engine}/{pool.model}"


def service_pool(settings: config.Settings, pool: config.Pool) -> Pool:
    """The pool as the service knows it, with its route."""
    return Pool(pool.id, _route(settings, pool), CPU_NOTICE if pool.allow_cpu else None, drain_s=pool.drain_s)


def _route(settings: config.Settings, pool: config.Pool) -> Route:
    return Route(
        route_id=route_id_of(pool),
        engine=pool.engine,
        model=pool.model,
        quant=pool.quant,
        ctx=pool.ctx,
        sampler_profile_version=pool.sampler_profile_version,
        allow_cpu=pool.allow_cpu,
        can_be_strict=_can_be_strict(settings, pool),
        features=LLAMACPP_FEATURES,
        sampling=_sampling(settings, pool.sampler_profile_version),
    )


def _can_be_strict(settings: config.Settings, pool: config.Pool) -> bool:
    """Some replica of the route is exact by its configuration: llama.cpp is with one slot."""
    own = route_id_of(pool)
    return any(replica.slots == 1 for p in settings.pools if route_id_of(p) == own for replica in p.replicas)


def _sampling(settings: config.Settings, version: str) -> Sampling:
    profile = settings.sampler_profiles.get(version)
    if profile is None:
        return Sampling()
    return Sampling(profile.temperature, profile.top_p, profile.top_k, tuple(profile.stop or ()))


# Processes and nodes


def replica_id_of(pool: config.Pool, index: int) -> str:
    """The id of the pool's replica at that place of its list, unique in the server."""
    return f"{pool.id}/{pool.replicas[index].id or index}"


def launch_orders(settings: config.Settings) -> list[tuple[str | None, LaunchOrder]]:
    """How each replica that llorch starts is to be run, with its node; None for this host."""
    return [
        (replica.managed.node, _launch_order(pool, replica_id_of(pool, index), replica, replica.managed))
        for pool in settings.pools
        for index, replica in enumerate(pool.replicas)
        if replica.managed is not None
    ]


def _launch_order(pool: config.Pool, replica_id: str, replica: config.Replica, managed: config.Managed) -> LaunchOrder:
    limit = managed.memory_limit_mib
    return LaunchOrder(
        replica_id=replica_id,
        pool_id=pool.id,
        engine=pool.engine.value,
        launcher=managed.launcher.value,
        model=pool.model,
        model_path=pool.model_path,
        model_digest=pool.model_digest,
        ctx=pool.ctx,
        slots=replica.slots,
        allow_cpu=pool.allow_cpu,
        devices=tuple(replica.devices or ()),
        tensor_split=tuple(replica.tensor_split or ()),
        port=managed.port,
        threads=managed.threads,
        binary=managed.binary,
        arguments=tuple(managed.args),
        command=tuple(managed.command or ()),
        environment=tuple(sorted(managed.env.items())),
        health_path=managed.health_path,
        memory_limit_bytes=None if limit is None else limit * _MIB,
        headroom=_headroom(pool.headroom),
        supervision=_supervision(pool.supervision),
    )


def _headroom(headroom: config.Headroom) -> Headroom:
    return Headroom(
        vram_bytes=headroom.vram_mib * _MIB,
        ram_bytes=headroom.ram_mib * _MIB,
        kv_bytes_per_token=headroom.kv_bytes_per_token,
    )


def _supervision(times: config.Supervision) -> Supervision:
    return Supervision(
        start_s=times.start_s,
        unresponsive_s=times.unresponsive_s,
        stop_s=times.stop_s,
        restart=RestartPolicy(
            first_s=times.backoff_first_s,
            factor=times.backoff_factor,
            max_s=times.backoff_max_s,
            storm_failures=times.storm_failures,
            cool_down_s=times.cool_down_s,
            stable_s=times.stable_s,
        ),
    )


def node_configs(settings: config.Settings) -> list[NodeConfig]:
    """The hosts whose managers may join. A node that names no pools has those with a replica that names it."""
    return [
        NodeConfig(
            node_id=node.id,
            sha256=node.sha256,
            pools=frozenset(node.pools if node.pools is not None else _pools_of(settings, node.id)),
            networks=tuple(node.networks),
        )
        for node in settings.nodes
    ]


def _pools_of(settings: config.Settings, node_id: str) -> list[str]:
    return [
        pool.id
        for pool in settings.pools
        if any(replica.managed is not None and replica.managed.node == node_id for replica in pool.replicas)
    ]


# Order, shares and quotas


def route_policy(settings: config.Settings, pool: config.Pool) -> RoutePolicy:
    """How the pool's route treats its tasks; every pool of a route gives the same."""
    return RoutePolicy(
        queue=_queue_policy(settings, pool.queue),
        wall_s=pool.timeouts.wall_s,
        unread_grace_s=settings.streams.disconnect_grace_s,
        preemption=PreemptionPolicy(
            hard=pool.preemption.mode.value == "hard",
            per_minute=pool.preemption.per_minute,
            protected=frozenset(Priority(priority.value) for priority in pool.preemption.protected),
        ),
        prices=Prices(prompt=pool.price.prompt_per_1k / 1000, output=pool.price.output_per_1k / 1000),
        feasible_probability=pool.queue.feasible_probability,
        detour_s=settings.sessions.detour_ms / 1000,
        bindings=settings.sessions.bindings,
    )


def route_scopes(settings: config.Settings) -> list[RouteScope]:
    """What the metrics of each route are labelled with, and what its tokens weigh in them."""
    firsts = {route_id_of(pool): pool for pool in reversed(settings.pools)}
    return [
        RouteScope(route_id, pool.engine, pool.model, pool.queue.token_cost.prompt, pool.queue.token_cost.output)
        for route_id, pool in firsts.items()
    ]


def _queue_policy(settings: config.Settings, queue: config.Queue) -> QueuePolicy:
    full, levels = queue.full_policy, queue.level_weights
    return QueuePolicy(
        capacity=dict.fromkeys(Priority, queue.capacity),
        full_policy={
            Priority.INTERACTIVE: FullPolicy(full.interactive.value),
            Priority.BATCH: FullPolicy(full.batch.value),
        },
        fairness=Fairness(queue.fairness.value),
        order=Order(queue.order.value),
        edf_default_s=queue.edf_default_ms / 1000,
        level_weights={Priority.INTERACTIVE: levels.interactive, Priority.BATCH: levels.batch},
        weights=_weights(settings),
        prompt_cost=queue.token_cost.prompt,
        output_cost=queue.token_cost.output,
    )


def _weights(settings: config.Settings) -> dict[str, float]:
    """The weight of every tenant that there is, by name."""
    default = settings.tenant_defaults.weight
    own = {tenant.name: tenant.weight for tenant in settings.tenants if tenant.weight is not None}
    return {name: own.get(name, default) for name in config.tenant_names(settings.keys)}


def quotas(settings: config.Settings) -> dict[str, Quota]:
    """The quotas of the tenants that have an entry of their own; what it leaves out is the default."""
    default = default_quota(settings)
    return {tenant.name: _quota(tenant, default) for tenant in settings.tenants}


def default_quota(settings: config.Settings) -> Quota:
    """The quota of every other tenant."""
    return _quota(settings.tenant_defaults, Quota())


def _quota(entry: config.Tenant | config.TenantDefaults, default: Quota) -> Quota:
    return Quota(
        max_queued=_given(entry.max_queued, default.max_queued),
        max_concurrent=_given(entry.max_concurrent, default.max_concurrent),
        rate={**default.rate, **_rates(entry.rate)},
        tokens_per_minute=_given(entry.tokens_per_minute, default.tokens_per_minute),
        kv_tokens=_given(entry.kv_tokens, default.kv_tokens),
    )


def _given(own: int | None, default: int | None) -> int | None:
    return default if own is None else own


def _rates(rates: config.Rates) -> dict[Priority, Rate]:
    by_priority = {Priority.INTERACTIVE: rates.interactive, Priority.BATCH: rates.batch}
    return {priority: Rate(rate.per_s, rate.burst) for priority, rate in by_priority.items() if rate is not None}


# Clients


def key_records(settings: config.Settings) -> list[KeyRecord]:
    """The keys that open something."""
    return [_key_record(key) for key in settings.keys]


def _key_record(key: config.Key) -> KeyRecord:
    return KeyRecord(
        id=key.id,
        sha256=key.sha256,
        tenant=key.tenant,
        scopes=frozenset(scope.value for scope in key.scopes),
        priorities=frozenset(Priority(priority.value) for priority in key.priorities),
    )


def client_limits(settings: config.Settings) -> Limits:
    """What clients may ask for at most."""
    server, streams = settings.server.limits, settings.streams
    return Limits(
        body_bytes=server.body_bytes,
        header_bytes=server.header_bytes,
        prompt_chars=server.prompt_chars,
        max_tokens=streams.transcript_max_frames - OVERHEAD_FRAMES,
        open_streams=server.open_streams,
        session_ttl_ms=round(settings.sessions.ttl_s * 1000),
        session_turns=settings.sessions.turns,
        disconnect_grace_ms=round(streams.disconnect_grace_s * 1000),
        transcript_retention_ms=round(streams.transcript_ttl_s * 1000),
    )


def session_limits(settings: config.Settings) -> SessionLimits:
    """How long sessions live."""
    return SessionLimits(ttl_s=settings.sessions.ttl_s, turns=settings.sessions.turns)


def retention(settings: config.Settings) -> Retention:
    """How long what has ended is kept."""
    streams = settings.streams
    return Retention(
        transcript_s=streams.transcript_ttl_s,
        record_s=streams.record_ttl_s,
        records_per_tenant=streams.records_per_tenant,
    )
