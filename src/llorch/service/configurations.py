"""The configuration in force, and how another one takes its place: as a whole, or not at all.

It knows configurations as what they make of the service (`Deployment`); files, environment and validation are read by
whoever hands it `read`. Replicas come and go as `replacement` says.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from llorch.domain.policy import RoutePolicy
from llorch.errors import Conflict, InvalidParams, PoolUnavailable
from llorch.service import replacement
from llorch.service.changes import Changes
from llorch.service.inventory import ConfigChange, ConfigStatus
from llorch.service.pools import Pools
from llorch.service.probes import Pool, ReplicaConfig, Watched
from llorch.service.replacement import Failed, Notes
from llorch.service.routes import Route


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a configuration makes of the service. `source` is what `Live` and `read` need of it, and opaque here."""

    pools: Mapping[str, Pool]
    replicas: tuple[ReplicaConfig, ...]
    policies: Mapping[str, RoutePolicy]
    source: object = None

    @property
    def routes(self) -> dict[str, Route]:
        """The routes that its pools serve, by id."""
        return {pool.route.route_id: pool.route for pool in self.pools.values()}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A valid configuration that may take the place of another one, and the paths of the settings that differ."""

    deployment: Deployment
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...] = ()


class Live(Protocol):
    """What of the service changes in one instant, without a replica coming or going. Nothing here fails."""

    def prepare(self, current: Deployment, new: Deployment) -> None:
        """Another configuration is about to come into force: until `finish`, the nodes of both may run replicas."""
        ...

    def finish(self, deployment: Deployment) -> None:
        """No replica of another configuration is left; only the nodes of this one may run any."""
        ...

    def open_route(self, route_id: str, policy: RoutePolicy) -> None:
        """There is one route more; it has no replica yet."""
        ...

    def close_route(self, route_id: str) -> None:
        """The route has no replica any more: it takes no tasks."""
        ...

    def commit(self, deployment: Deployment) -> None:
        """Policies, quotas, keys, nodes and routes are these from now on."""
        ...

    def observe(self, outcome: str, change: ConfigChange) -> None:
        """A change is over; `outcome` is `done`, `rolled_back`, `failed` or `refused`."""
        ...


@dataclass(slots=True)
class _Undo:
    """What has been done of a change, newest last."""

    taken_over: list[tuple[Watched, ReplicaConfig]] = field(default_factory=list)
    reconfigured: list[tuple[Watched, ReplicaConfig]] = field(default_factory=list)
    introduced: list[Watched] = field(default_factory=list)
    pools: dict[str, Pool | None] = field(default_factory=dict)
    routes: list[str] = field(default_factory=list)


class Configurations:
    """The configuration and its changes, of which one is under way at a time.

    `read` gives what the file says now, compared with the deployment that it is handed; it raises InvalidParams when
    that cannot be used.
    """

    def __init__(
        self,
        current: Deployment,
        *,
        read: Callable[[Deployment], Awaitable[Candidate]],
        pools: Pools,
        changes: Changes,
        live: Live,
    ) -> None:
        self._current = current
        self._previous: Deployment | None = None
        self._read = read
        self._pools = pools
        self._changes = changes
        self._live = live
        self._revision = 1
        self._loaded_at = pools.clock.wall()
        self._change: ConfigChange | None = None
        self._running: asyncio.Task[None] | None = None

    def status(self) -> ConfigStatus:
        """What is in force."""
        return ConfigStatus(self._revision, self._loaded_at, self._previous is not None, self._change)

    async def reload(self) -> ConfigStatus:
        """Begin to apply the file as it is now.

        Raises InvalidParams for a file that cannot be used or that changes what needs a restart; Conflict while a
        change is under way. Then nothing has changed.
        """
        self._check_free()
        began = self._pools.clock.wall()
        try:
            candidate = await self._read(self._current)
            if candidate.needs_restart:
                named = ", ".join(candidate.needs_restart)
                message = f"{named}: takes effect only at a restart of llorch; nothing was changed"
                raise InvalidParams(message, details={"needs_restart": list(candidate.needs_restart)})
        except InvalidParams as refusal:
            self._live.observe("refused", ConfigChange("failed", began, message=refusal.message))
            raise
        self._check_free()
        if not candidate.changed:
            now = self._pools.clock.wall()
            self._change = ConfigChange("done", began, ended_at=now)
            self._live.observe("done", self._change)
            return self.status()
        return self._begin(candidate)

    async def revert(self) -> ConfigStatus:
        """Begin to go back to the previous configuration. Raises as reload does; InvalidParams when there is none."""
        self._check_free()
        if self._previous is None:
            raise InvalidParams("there is no previous configuration to go back to")
        return self._begin(Candidate(self._previous, ("(reverted)",)))

    async def aclose(self) -> None:
        """Break off what is under way."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _check_free(self) -> None:
        if self._pools.is_draining:
            raise PoolUnavailable("the service is shutting down", policy_label="shutdown")
        if self._running is not None or not self._changes.is_idle:
            raise Conflict("a change of the configuration or of a pool is under way")

    def _begin(self, candidate: Candidate) -> ConfigStatus:
        self._change = ConfigChange("running", self._pools.clock.wall(), changed=candidate.changed)
        self._changes.is_held = True
        self._running = asyncio.get_running_loop().create_task(self._run(candidate.deployment))
        return self.status()

    async def _run(self, new: Deployment) -> None:
        outcome, message = "failed", "it was broken off"
        try:
            await self._apply(new)
        except Failed as failed:
            outcome, message = "rolled_back" if failed.is_whole else "failed", str(failed)
        else:
            outcome, message = "done", ""
            self._previous, self._current = self._current, new
            self._revision += 1
            self._loaded_at = self._pools.clock.wall()
        finally:
            self._running = None
            self._changes.is_held = False
            assert self._change is not None
            ended_at = self._pools.clock.wall()
            self._change = replace(self._change, state=outcome, ended_at=ended_at, message=message or None)
            self._live.observe(outcome, self._change)

    # Applying

    async def _apply(self, new: Deployment) -> None:
        """1. Replicas that are new or changed become Ready. 2. What takes an instant. 3. What is gone leaves.

        Raises Failed in 1 alone, after everything was put back.
        """
        undo = _Undo()
        self._live.prepare(self._current, new)
        try:
            self._open(new, undo)
            for config in new.replicas:
                await self._bring(config, undo)  # 1
        except Failed as failed:
            await self._put_back(undo, failed)
            raise
        self._live.commit(new)  # 2
        await self._retire(new)  # 3
        self._live.finish(new)

    def _open(self, new: Deployment, undo: _Undo) -> None:
        for route_id in new.routes:
            if route_id not in self._current.routes:
                self._live.open_route(route_id, new.policies[route_id])
                undo.routes.append(route_id)
        for pool_id, pool in new.pools.items():
            if self._current.pools.get(pool_id) != pool:
                undo.pools[pool_id] = self._current.pools.get(pool_id)
                self._pools.put_pool(pool)

    async def _bring(self, config: ReplicaConfig, undo: _Undo) -> None:
        """1. It is new. 2. It is the same process. 3. Another process takes over."""
        watched = self._find(config)
        if watched is None:
            if config.order is None:
                undo.introduced.append(self._pools.add(config))
            else:
                undo.introduced.append(await replacement.introduce(self._pools, config, _UNHEARD))
            return
        before = watched.config
        if is_same_process(before, config):
            generation = before.order.generation if before.order is not None else 0
            watched.reconfigure(replacement.renamed(config, before.replica_id, generation))
            undo.reconfigured.append((watched, before))
            return
        grace_s = before.pool.drain_s
        new = await replacement.take_over(self._pools, watched, config, grace_s, _UNHEARD)
        undo.taken_over.append((new, before))

    def _find(self, config: ReplicaConfig) -> Watched | None:
        """The replica that has this one's place in the configuration now."""
        members = self._pools.members(config.pool.pool_id)
        return next((w for w in members if _base(w.replica_id) == config.replica_id), None)

    async def _put_back(self, undo: _Undo, failed: Failed) -> None:
        for watched in undo.introduced:
            await replacement.leave(self._pools, watched, watched.config.pool.drain_s, _UNHEARD)
        for watched, before in reversed(undo.taken_over):
            try:
                await replacement.take_over(self._pools, watched, before, watched.config.pool.drain_s, _UNHEARD)
            except Failed as worse:
                failed.is_whole = False
                failed.add_note(str(worse))
        for watched, before in undo.reconfigured:
            watched.reconfigure(before)
        for pool_id, pool in undo.pools.items():
            if pool is None:
                self._pools.drop_pool(pool_id)
            else:
                self._pools.put_pool(pool)
        for route_id in undo.routes:
            self._live.close_route(route_id)
        self._live.finish(self._current)

    async def _retire(self, new: Deployment) -> None:
        wanted = {config.replica_id for config in new.replicas}
        leaving = [w for pool_id in self._current.pools for w in self._pools.members(pool_id)]
        async with asyncio.TaskGroup() as group:
            for watched in leaving:
                if _base(watched.replica_id) not in wanted:
                    grace_s = watched.config.pool.drain_s
                    group.create_task(replacement.leave(self._pools, watched, grace_s, _UNHEARD))
        for pool_id in self._current.pools:
            if pool_id not in new.pools:
                self._pools.drop_pool(pool_id)
        for route_id in self._current.routes:
            if route_id not in new.routes:
                self._live.close_route(route_id)


_UNHEARD = Notes(on_deadline=lambda _at: None, on_ready=lambda _took_s: None)


def is_same_process(one: ReplicaConfig, other: ReplicaConfig) -> bool:
    """Both are served by the same engine process, as far as the configuration tells; it need not be replaced."""
    if _identity(one) != _identity(other) or (one.order is None) != (other.order is None):
        return False
    if one.order is None or other.order is None:
        return (one.url, one.api_key, one.engine) == (other.url, other.api_key, other.engine)
    return replace(one.order, replica_id="", generation=0) == replace(other.order, replica_id="", generation=0)


def _identity(config: ReplicaConfig) -> tuple[object, ...]:
    route = config.pool.route
    named = (route.engine, route.model, route.quant, route.ctx)
    return (config.pool.pool_id, named, config.slots, config.node, config.engine_version, config.model_digest)


def _base(replica_id: str) -> str:
    return replica_id.removesuffix("+")
