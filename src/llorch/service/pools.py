"""Pools and their replicas: finds out how each replica is and tells its scheduler.

Owns the loop of probes of each replica, and the views of pools and replica sets.
"""

import asyncio
from collections.abc import Mapping, Sequence

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Cohort, Priority
from llorch.errors import LlorchError, NotFound
from llorch.service.inventory import PoolView, ReplicaHealth, ReplicaSetView
from llorch.service.ports import Clock, Engine, Post
from llorch.service.probes import Pool, ReplicaConfig, Watched
from llorch.service.routes import Routes

PROBE_S = 2.0
"""Between probes of a Ready replica."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
"""Between probes of one that is not: doubled from the first to the last."""


class Pools:
    """All pools of the service."""

    def __init__(
        self,
        *,
        routes: Routes,
        pools: Sequence[Pool],
        replicas: Sequence[ReplicaConfig],
        schedulers: Mapping[str, Scheduler],
        clock: Clock,
    ) -> None:
        self.routes = routes
        self._pools = {pool.pool_id: pool for pool in pools}
        self._watched = {config.replica_id: Watched(config, clock) for config in replicas}
        self._schedulers = schedulers
        self.is_draining = False

    # Looking

    def list(self) -> Sequence[PoolView]:
        """Every pool, as configured and as it is."""
        return [self._view(pool) for pool in self._pools.values()]

    def get(self, pool_id: str) -> PoolView:
        """One pool; raises NotFound."""
        pool = self._pools.get(pool_id)
        if pool is None:
            raise NotFound(f"there is no pool {pool_id}")
        return self._view(pool)

    def replica_sets(self) -> Sequence[ReplicaSetView]:
        """The cohorts of each route, by what is known of each replica now."""
        sets: dict[tuple[str, Cohort], list[ReplicaHealth]] = {}
        for watched in self._watched.values():
            key = watched.config.pool.route.route_id, watched.replica().cohort
            sets.setdefault(key, []).append(self._health(watched))
        return [
            ReplicaSetView(self.routes.get(route_id), cohort, tuple(replicas), len(self._schedulers[route_id].queue))
            for (route_id, cohort), replicas in sets.items()
        ]

    def count_ready(self) -> int:
        """Replicas that take tasks now; none while the service shuts down."""
        if self.is_draining:
            return 0
        return sum(r.state is ReplicaState.READY for s in self._schedulers.values() for r in s.fleet)

    def ready_engine(self, route_id: str) -> Engine | None:
        """An engine of the route that can be asked, the least busy one first."""
        scheduler = self._schedulers[route_id]
        ready = [r for r in scheduler.fleet if r.state is ReplicaState.READY]
        if not ready:
            return None
        best = min(ready, key=lambda r: scheduler.ledger.busy_slots(r.replica_id) / r.slots)
        return self._watched[best.replica_id].config.engine

    # Watching

    def suspect(self, replica_id: str) -> None:
        """The replica failed a task: probe it at once, and until then it takes none."""
        self._watched[replica_id].suspect()

    def fail(self, replica_id: str, error: LlorchError, post: Post) -> None:
        """The replica is gone for good."""
        watched = self._watched[replica_id]
        watched.fail(error)
        post(watched.config.pool.route.route_id, ev.ReplicaChanged(watched.replica()))

    def announce(self, post: Post) -> None:
        """Tell the schedulers which replicas there are, before any of them has been probed."""
        for watched in self._watched.values():
            post(watched.config.pool.route.route_id, ev.ReplicaChanged(watched.replica()))

    async def watch(self, post: Post) -> None:
        """Probe every replica for ever."""
        async with asyncio.TaskGroup() as group:
            for watched in self._watched.values():
                group.create_task(self._watch(watched, post))

    async def aclose(self) -> None:
        """Close the connections to all engines."""
        for watched in self._watched.values():
            await watched.config.engine.aclose()

    async def _watch(self, watched: Watched, post: Post) -> None:
        route_id = watched.config.pool.route.route_id
        retry_s = FIRST_RETRY_S
        while watched.state is not ReplicaState.FAILED:
            await watched.probe()
            if self._schedulers[route_id].fleet.get(watched.config.replica_id) != watched.replica():
                post(route_id, ev.ReplicaChanged(watched.replica()))
            if watched.state is ReplicaState.READY:
                await self._compare_load(watched, post)
                retry_s = FIRST_RETRY_S
                await watched.wait(PROBE_S)
            else:
                await watched.wait(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _compare_load(self, watched: Watched, post: Post) -> None:
        """Tell the scheduler when the engine works for others, too.

        Leases come and go while the engine is asked: what it says is compared with the more of them. News of foreign
        work grows stale in the scheduler, so it is told again for as long as it holds.
        """
        route_id, replica_id = watched.config.pool.route.route_id, watched.config.replica_id
        count_leases = self._schedulers[route_id].ledger.busy_slots
        before = count_leases(replica_id)
        busy = await watched.count_busy()
        if busy is None:
            return
        foreign = max(0, busy - max(before, count_leases(replica_id)))
        if foreign or watched.foreign_slots:
            watched.foreign_slots = foreign
            post(route_id, ev.EngineLoad(replica_id, foreign))

    # Views

    def _view(self, pool: Pool) -> PoolView:
        queue = self._schedulers[pool.route.route_id].queue
        replicas = [w for w in self._watched.values() if w.config.pool.pool_id == pool.pool_id]
        return PoolView(
            pool_id=pool.pool_id,
            route=pool.route,
            allow_cpu=pool.route.allow_cpu,
            notice=pool.notice,
            capacity=queue.policy.capacity,
            full_policy=queue.policy.full_policy,
            depth={priority: queue.depth(priority) for priority in Priority},
            is_draining=self.is_draining,
            replicas=tuple(self._health(watched) for watched in replicas),
        )

    def _health(self, watched: Watched) -> ReplicaHealth:
        scheduler = self._schedulers[watched.config.pool.route.route_id]
        replica_id = watched.config.replica_id
        known = scheduler.fleet.get(replica_id)
        return ReplicaHealth(
            replica_id=replica_id,
            pool_id=watched.config.pool.pool_id,
            state=known.state if known is not None else watched.state,
            slots=watched.config.slots,
            slots_busy=scheduler.ledger.busy_slots(replica_id),
            engine_version=watched.engine_version,
            model_digest=watched.model_digest,
            is_exact=watched.replica().cohort.exact,
            last_error=watched.last_error,
        )
