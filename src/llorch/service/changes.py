"""Drain and reload of pools, one replica after the other, with progress for whoever asks.

At most one change of a pool is under way at a time. What happens to one replica is told in `replacement`.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from llorch.domain.replica import ReplicaState
from llorch.errors import Conflict, PoolUnavailable
from llorch.service import replacement
from llorch.service.inventory import PoolChange
from llorch.service.pools import Pools
from llorch.service.probes import Watched
from llorch.service.replacement import Failed, Notes

OnChange = Callable[[str, PoolChange], None]
"""Is told of each step of a change: pool id, how far it is."""


class Changes:
    """All changes of pools. Use inside `async with`: it owns those that are under way."""

    def __init__(self, pools: Pools, on_change: OnChange | None = None) -> None:
        self._pools = pools
        self._on_change = on_change
        self._running: dict[str, asyncio.Task[None]] = {}
        self.is_held = False
        """The configuration is being changed: no pool may be changed beside it."""

    @property
    def is_idle(self) -> bool:
        """No change is under way."""
        return not self._running

    def drain(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        """Begin to drain; raises NotFound, and Conflict while another change is under way."""
        return self._begin(pool_id, "drain", lambda: self._drain(pool_id, deadline_s))

    def reload(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        """Begin to replace the engines; raises NotFound, and Conflict while another change is under way."""
        return self._begin(pool_id, "reload", lambda: self._reload(pool_id, deadline_s))

    def note_moved(self, replica_id: str) -> None:
        """A task was broken off because its replica must be empty; it goes on elsewhere."""
        pool_id = replica_id.partition("/")[0]
        change = self._pools.changes.get(pool_id)
        if change is not None:
            self._tell(pool_id, replace(change, moved=change.moved + 1))

    async def aclose(self) -> None:
        """Break off what is under way."""
        running = list(self._running.values())
        for change in running:
            change.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # One change

    def _begin(self, pool_id: str, kind: str, work: Callable[[], Coroutine[Any, Any, None]]) -> PoolChange:
        self._pools.pool(pool_id)
        if self._pools.is_draining:
            raise PoolUnavailable("the service is shutting down", policy_label="shutdown")
        if pool_id in self._running or self.is_held:
            raise Conflict(f"another change of pool {pool_id} is under way", pool_id=pool_id)
        members = self._pools.members(pool_id)
        self._tell(pool_id, PoolChange(kind, "running", self._pools.clock.wall(), replicas_total=len(members)))
        self._running[pool_id] = asyncio.get_running_loop().create_task(self._run(pool_id, work()))
        return self._latest(pool_id)

    async def _run(self, pool_id: str, work: Coroutine[Any, Any, None]) -> None:
        state, message = "failed", "it was broken off"
        try:
            await work
        except Failed as failed:
            state, message = "rolled_back" if failed.is_whole else "failed", str(failed)
        else:
            state, message = "done", None  # type: ignore[assignment]  # the first value is that of a cancelled one
        finally:
            del self._running[pool_id]
            self._update(pool_id, state=state, message=message, ended_at=self._pools.clock.wall(), deadline_at=None)

    async def _drain(self, pool_id: str, deadline_s: float | None) -> None:
        grace_s = self._grace_s(pool_id, deadline_s)
        notes = self._notes(pool_id)
        async with asyncio.TaskGroup() as group:
            for watched in self._pools.members(pool_id):
                group.create_task(self._stop(pool_id, watched, grace_s, notes))

    async def _stop(self, pool_id: str, watched: Watched, grace_s: float, notes: Notes) -> None:
        await replacement.stop(self._pools, watched, grace_s, notes)
        self._count_done(pool_id)

    async def _reload(self, pool_id: str, deadline_s: float | None) -> None:
        """One after the other. When one fails, those that were replaced stay: they run the same configuration."""
        grace_s = self._grace_s(pool_id, deadline_s)
        notes = self._notes(pool_id)
        for watched in self._pools.members(pool_id):
            if watched.config.order is None:
                self._revive(watched)
            else:
                await replacement.take_over(self._pools, watched, watched.config, grace_s, notes)
            self._count_done(pool_id)

    def _revive(self, watched: Watched) -> None:
        """An engine that somebody else runs is only looked at anew."""
        if watched.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            self._pools.exchange(watched, watched.config)
        watched.suspect()

    # Telling

    def _grace_s(self, pool_id: str, deadline_s: float | None) -> float:
        return self._pools.pool(pool_id).drain_s if deadline_s is None else deadline_s

    def _notes(self, pool_id: str) -> Notes:
        return Notes(
            on_deadline=lambda at: self._update(pool_id, deadline_at=at),
            on_ready=lambda took_s: self._update(pool_id, ready_s=took_s),
        )

    def _count_done(self, pool_id: str) -> None:
        self._update(pool_id, replicas_done=self._pools.changes[pool_id].replicas_done + 1)

    def _update(self, pool_id: str, **fields: Any) -> None:
        change = self._pools.changes.get(pool_id)
        if change is not None:
            self._tell(pool_id, replace(change, **fields))

    def _tell(self, pool_id: str, change: PoolChange) -> None:
        self._pools.changes[pool_id] = change
        if self._on_change is not None:
            self._on_change(pool_id, self._latest(pool_id))

    def _latest(self, pool_id: str) -> PoolChange:
        change = self._pools.change(pool_id)
        assert change is not None
        return change
