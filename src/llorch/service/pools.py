"""Pools and their replicas: finds out how each replica is and tells its scheduler.

Owns the replicas that there are, the loop of probes of each, and what their managers are told. How a replica comes and
goes is decided elsewhere; what it means for tasks is the scheduler's.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Cohort, Priority
from llorch.errors import NotFound, PoolUnavailable, PoolUnready, WorkerReset
from llorch.service.inventory import PoolChange, PoolView, ReplicaHealth, ReplicaSetView, SloSnapshot
from llorch.service.launching import Cause, LaunchReport, Manager
from llorch.service.ports import Clock, Engine, Post
from llorch.service.probes import Connect, OnTest, Pool, ReplicaConfig, Watched
from llorch.service.routes import Routes

PROBE_S = 2.0
"""Between probes of a Ready replica."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
"""Between probes of one that is not: doubled from the first to the last."""

TESTS = 3
"""Self-tests in a row that a managed replica may fail before its process is started anew."""

ManagerOf = Callable[[str | None], Manager]
"""The manager of a node, None: of this host."""

OnLaunch = Callable[[Watched, LaunchReport | None, LaunchReport], None]
"""Is told what a manager reported: replica, report before, report now."""

_AT_REST = (ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED)
"""States in which a probe changes nothing."""


class Pools:
    """All pools of the service. `managers` and `connect` are needed where replicas are managed."""

    def __init__(
        self,
        *,
        routes: Routes,
        pools: Sequence[Pool],
        replicas: Sequence[ReplicaConfig],
        schedulers: Mapping[str, Scheduler],
        clock: Clock,
        connect: Connect | None = None,
        managers: ManagerOf | None = None,
        on_launch: OnLaunch | None = None,
        on_test: OnTest | None = None,
        slo_of: Callable[[str, Cohort], tuple[SloSnapshot, ...]] = lambda _route, _cohort: (),
    ) -> None:
        self.routes = routes
        self.clock = clock
        self.is_draining = False
        self.changes: dict[str, PoolChange] = {}
        """The latest change of each pool, as far as it is; kept by whoever makes it."""
        self._schedulers = schedulers
        self._connect = connect
        self._managers = managers
        self._on_launch = on_launch
        self._on_test = on_test
        self._slo_of = slo_of
        self._pools = {pool.pool_id: pool for pool in pools}
        self._watched: dict[str, Watched] = {}
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._post: Post | None = None
        for config in replicas:
            self._put(config)

    # Looking

    def list(self) -> Sequence[PoolView]:
        """Every pool, as configured and as it is."""
        return [self._view(pool) for pool in self._pools.values()]

    def get(self, pool_id: str) -> PoolView:
        """One pool; raises NotFound."""
        return self._view(self.pool(pool_id))

    def pool(self, pool_id: str) -> Pool:
        """One pool as configured; raises NotFound."""
        pool = self._pools.get(pool_id)
        if pool is None:
            raise NotFound(f"there is no pool {pool_id}")
        return pool

    def members(self, pool_id: str) -> Sequence[Watched]:
        """The replicas of a pool, in the order of the configuration."""
        members = [watched for watched in self._watched.values() if watched.config.pool.pool_id == pool_id]
        return sorted(members, key=lambda watched: (watched.config.rank, watched.replica_id))

    def replica_sets(self) -> Sequence[ReplicaSetView]:
        """The cohorts of each route, by what is known of each replica now."""
        sets: dict[tuple[str, Cohort], list[ReplicaHealth]] = {}
        for watched in self._watched.values():
            key = watched.route_id, watched.replica().cohort
            sets.setdefault(key, []).append(self._health(watched))
        return [
            ReplicaSetView(
                route=self.routes.get(route_id),
                cohort=cohort,
                replicas=tuple(replicas),
                queued=len(self._schedulers[route_id].queue),
                slo=self._slo_of(route_id, cohort),
            )
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
        return self._watched[best.replica_id].engine

    def engine(self, replica_id: str) -> Engine:
        """The client of a replica; raises WorkerReset when there is no engine to talk to."""
        watched = self._watched.get(replica_id)
        if watched is None or watched.engine is None:
            raise WorkerReset("The engine is gone.")
        return watched.engine

    def explain(self, route_id: str, error: PoolUnready) -> PoolUnready | PoolUnavailable:
        """Why nothing of the route takes tasks: the cause that its replicas have in common, where that is known."""
        gone = [w for w in self._watched.values() if w.route_id == route_id and w.state is ReplicaState.FAILED]
        causes = [w.last_error for w in gone if w.last_error and w.last_error.code == PoolUnavailable.code]
        if not causes or self._schedulers[route_id].fleet.ready_count:
            return error
        return PoolUnavailable(causes[0].message, engine=error.engine)

    def count_leases(self, watched: Watched) -> int:
        """Slots of the replica that hold an attempt, or wait for the engine to let one go."""
        return self._schedulers[watched.route_id].ledger.busy_slots(watched.replica_id)

    def change(self, pool_id: str) -> PoolChange | None:
        """The latest change of a pool with the counts of now; None when there was none."""
        change = self.changes.get(pool_id)
        if change is None:
            return None
        running = sum(self.count_leases(watched) for watched in self.members(pool_id))
        queued = len(self._schedulers[self.pool(pool_id).route.route_id].queue)
        return replace(change, running=running, queued=queued)

    # Coming and going

    def put_pool(self, pool: Pool) -> None:
        """There is this pool now, or it is configured like this now."""
        self._pools[pool.pool_id] = pool

    def drop_pool(self, pool_id: str) -> None:
        """The pool is gone; its replicas went before."""
        del self._pools[pool_id]
        self.changes.pop(pool_id, None)

    def add(self, config: ReplicaConfig) -> Watched:
        """There is one replica more: it is watched, and started where it is managed."""
        watched = self._put(config)
        self._tell(watched)
        self._begin(watched)
        self._want(watched)
        return watched

    def exchange(self, watched: Watched, config: ReplicaConfig) -> None:
        """Another process takes the place of this one, under the same id; whoever calls has seen it idle."""
        if config.pool.route.route_id != watched.route_id:
            self._forget_in_scheduler(watched)
        self._close(watched.exchange(config))
        self._tell(watched)
        self._want(watched)

    def release(self, watched: Watched) -> None:
        """End its process for good, where it is managed; a report says when it is gone."""
        if watched.config.order is not None:
            self._manager(watched).release(watched.replica_id)

    def vacate(self, watched: Watched) -> None:
        """Whatever still runs there is moved or ended now."""
        self._send(watched.route_id, ev.ReplicaVacated(watched.replica_id))

    def remove(self, watched: Watched) -> None:
        """The replica is no more. Idempotent."""
        if self._watched.get(watched.replica_id) is not watched:
            return
        del self._watched[watched.replica_id]
        if (loop := self._loops.pop(watched.replica_id, None)) is not None:
            loop.cancel()
        self._forget_in_scheduler(watched)
        self._close(watched.engine)

    # News

    def suspect(self, replica_id: str) -> None:
        """The replica failed a task: probe it at once, and until then it takes none."""
        if (watched := self._watched.get(replica_id)) is not None:
            watched.suspect()

    def note_end(self, replica_id: str) -> None:
        """An attempt there is over; whoever waits for the replica to be idle looks again."""
        watched = self._watched.get(replica_id)
        if watched is not None and watched.state is ReplicaState.DRAINING:
            watched.news.set()

    def take_launch(self, report: LaunchReport) -> None:
        """A manager tells what became of an order; what it tells of an older one is ignored."""
        watched = self._watched.get(report.replica_id)
        if watched is None or watched.config.order is None or watched.config.order.generation != report.generation:
            return
        before = watched.launch
        self._close(watched.take_launch(report))
        if self._on_launch is not None:
            self._on_launch(watched, before, report)

    def announce(self, post: Post) -> None:
        """Tell the schedulers which replicas there are before any has been probed, and start the managed ones."""
        self._post = post
        for watched in list(self._watched.values()):
            self._tell(watched)
            self._want(watched)

    async def watch(self, post: Post) -> None:
        """Probe every replica for ever."""
        self._post = post
        async with asyncio.TaskGroup() as group:
            self._group = group
            for watched in self._watched.values():
                self._begin(watched)
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Close the connections to all engines."""
        self._group = None
        for watched in list(self._watched.values()):
            if watched.engine is not None:
                await watched.engine.aclose()

    async def _watch(self, watched: Watched) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            await watched.probe()
            self._tell(watched)
            self._restart_untested(watched)
            if watched.state is ReplicaState.READY:
                await self._compare_load(watched)
                retry_s = FIRST_RETRY_S
                await watched.wait(PROBE_S)
            elif watched.state in _AT_REST or watched.engine is None:
                retry_s = FIRST_RETRY_S
                await watched.wait(None)
            else:
                await watched.wait(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _restart_untested(self, watched: Watched) -> None:
        """A process that answers and yet cannot do its work does not get well by itself."""
        launch = watched.launch
        if watched.failed_tests >= TESTS and launch is not None:
            watched.failed_tests = 0
            self._manager(watched).restart(watched.replica_id, launch.incarnation, Cause.SELF_TEST)

    async def _compare_load(self, watched: Watched) -> None:
        """Tell the scheduler when the engine works for others, too.

        Leases come and go while the engine is asked: what it says is compared with the more of them. News of foreign
        work grows stale in the scheduler, so it is told again for as long as it holds.
        """
        before = self.count_leases(watched)
        load = await watched.read_load()
        if load is None:
            return
        foreign = max(0, load.busy_slots - max(before, self.count_leases(watched)))
        if foreign or watched.foreign_slots:
            watched.foreign_slots = foreign
            self._send(watched.route_id, ev.EngineLoad(watched.replica_id, foreign))

    # Plumbing

    def _put(self, config: ReplicaConfig) -> Watched:
        watched = Watched(config, self.clock, self._connect, on_change=self._tell, on_test=self._on_test)
        self._watched[config.replica_id] = watched
        return watched

    def _begin(self, watched: Watched) -> None:
        if self._group is not None:
            self._loops[watched.replica_id] = self._group.create_task(self._watch(watched))

    def _manager(self, watched: Watched) -> Manager:
        assert self._managers is not None, "a managed replica needs a manager"
        return self._managers(watched.config.node)

    def _want(self, watched: Watched) -> None:
        if watched.config.order is not None:
            self._manager(watched).want(watched.config.order)

    def _tell(self, watched: Watched) -> None:
        """Post what is new of a replica, if it is one of ours."""
        if self._post is None or self._watched.get(watched.replica_id) is not watched:
            return
        replica = watched.replica()
        if self._schedulers[watched.route_id].fleet.get(watched.replica_id) != replica:
            self._send(watched.route_id, ev.ReplicaChanged(replica))

    def _forget_in_scheduler(self, watched: Watched) -> None:
        self._send(watched.route_id, ev.ReplicaRemoved(watched.replica_id))

    def _send(self, route_id: str, event: ev.Event) -> None:
        if self._post is not None:
            self._post(route_id, event)

    def _close(self, engine: Engine | None) -> None:
        """Close the client of an engine that is of no more use; attempts that still run there end at once."""
        if engine is not None and self._group is not None:
            self._group.create_task(engine.aclose())

    # Views

    def _view(self, pool: Pool) -> PoolView:
        queue = self._schedulers[pool.route.route_id].queue
        members = self.members(pool.pool_id)
        is_leaving = bool(members) and all(w.state in (ReplicaState.DRAINING, ReplicaState.STOPPED) for w in members)
        return PoolView(
            pool_id=pool.pool_id,
            route=pool.route,
            allow_cpu=pool.route.allow_cpu,
            notice=pool.notice,
            capacity=queue.policy.capacity,
            full_policy=queue.policy.full_policy,
            depth={priority: queue.depth(priority) for priority in Priority},
            is_draining=self.is_draining or is_leaving,
            replicas=tuple(self._health(watched) for watched in members),
            change=self.change(pool.pool_id),
        )

    def _health(self, watched: Watched) -> ReplicaHealth:
        known = self._schedulers[watched.route_id].fleet.get(watched.replica_id)
        config = watched.config
        return ReplicaHealth(
            replica_id=watched.replica_id,
            pool_id=config.pool.pool_id,
            state=known.state if known is not None else watched.state,
            slots=config.slots,
            slots_busy=self.count_leases(watched),
            engine_version=watched.engine_version,
            model_digest=watched.model_digest,
            is_exact=watched.replica().cohort.exact,
            last_error=watched.last_error,
            devices=() if config.order is None else config.order.devices,
            kv_usage=None if watched.load is None else watched.load.kv_usage,
            node=config.node,
            process=watched.process,
        )
