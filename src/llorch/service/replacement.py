"""How one replica comes, leaves, and makes place for another one, without losing a task.

Each function is a whole that ends well or raises Failed with everything as it was, as far as that can be. Which
replicas are concerned, in which order, and who is told how far it is, belongs to the changes.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from llorch.domain.replica import ReplicaState
from llorch.service.launching import Cause, Phase
from llorch.service.pools import Pools
from llorch.service.probes import ReplicaConfig, Watched

LET_GO_S = 40.0
"""How long engines have, after the deadline of a drain, to let go of what was broken off, in seconds."""

END_S = 15.0
"""How long a manager has, beyond the time from SIGTERM to SIGKILL, to tell that a process is gone, in seconds."""

URL_READY_S = 10.0
"""How long a replica that somebody else started has to be Ready when it takes another one's place, in seconds."""

_NO_ROOM = frozenset({Cause.HEADROOM, Cause.PORT})
"""Why a process could not be started beside another one that it could take the place of."""


class Failed(Exception):
    """A replica did not become Ready; the text says why. `is_whole`: everything is as it was before."""

    def __init__(self, message: str, *, cause: Cause | None = None, is_whole: bool = True) -> None:
        self.cause = cause
        self.is_whole = is_whole
        super().__init__(message)


@dataclass(slots=True)
class Notes:
    """What whoever watches is told: called at each step with the deadline of the drain under way (wall clock, None:
    none), and with the seconds that the newest replacement took to become Ready.
    """

    on_deadline: Callable[[float | None], None]
    on_ready: Callable[[float], None]


def twin(replica_id: str) -> str:
    """The id of the process that takes over from this one; the two take turns."""
    return replica_id[:-1] if replica_id.endswith("+") else replica_id + "+"


def renamed(config: ReplicaConfig, replica_id: str, generation: int) -> ReplicaConfig:
    """The same replica under this id, as a process of its own."""
    order = config.order
    if order is not None:
        order = replace(order, replica_id=replica_id, generation=generation)
    return replace(config, replica_id=replica_id, order=order)


async def introduce(pools: Pools, config: ReplicaConfig, notes: Notes) -> Watched:
    """Start a replica that was not there, and return when it is Ready. Raises Failed; then it is gone again."""
    watched = pools.add(config)
    began = pools.clock.monotonic()
    try:
        await _wait_ready(watched)
    except BaseException:
        await dismiss(pools, watched)
        raise
    notes.on_ready(pools.clock.monotonic() - began)
    return watched


async def take_over(pools: Pools, old: Watched, config: ReplicaConfig, grace_s: float, notes: Notes) -> Watched:
    """Let `config` take the place of a replica, and return the new one, which is Ready.

    1. A replica that takes no tasks is started in place. 2. The new process comes up beside the old one, which leaves
    then. 3. Where there is no room for both, the old one is drained and ends first; should the new one fail, it is
    started again. Raises Failed.
    """
    generation = _generation(old) + 1
    if old.state in (ReplicaState.STOPPED, ReplicaState.FAILED):  # 1
        return await _restart(pools, old, renamed(config, old.replica_id, generation), notes)
    try:
        new = await introduce(pools, renamed(config, twin(old.replica_id), generation), notes)  # 2
    except Failed as failed:
        if failed.cause not in _NO_ROOM:
            raise
        return await _swap(pools, old, renamed(config, old.replica_id, generation), grace_s, notes)  # 3
    await leave(pools, old, grace_s, notes)
    return new


async def leave(pools: Pools, watched: Watched, grace_s: float, notes: Notes) -> None:
    """Drain the replica, end its process, and forget it."""
    await drain(pools, watched, grace_s, notes)
    await dismiss(pools, watched)


async def stop(pools: Pools, watched: Watched, grace_s: float, notes: Notes) -> None:
    """Drain the replica and end its process; it stays known as stopped."""
    if watched.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
        return
    await drain(pools, watched, grace_s, notes)
    await _end(pools, watched)
    watched.move(ReplicaState.STOPPED)


async def drain(pools: Pools, watched: Watched, grace_s: float, notes: Notes, *, comes_back: bool = False) -> None:
    """Let nothing start there; return when nothing runs there. After `grace_s` seconds the rest is moved or ended."""
    if watched.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
        return
    watched.move(ReplicaState.DRAINING, comes_back=comes_back)
    notes.on_deadline(pools.clock.wall() + grace_s)

    def is_idle() -> bool:
        return pools.count_leases(watched) == 0

    if not await _until(watched, is_idle, grace_s):
        pools.vacate(watched)
        await _until(watched, is_idle, LET_GO_S)
    notes.on_deadline(None)


async def dismiss(pools: Pools, watched: Watched) -> None:
    """End the process of a replica and forget it. What still runs there ends as when an engine is lost."""
    await _end(pools, watched)
    pools.remove(watched)


async def _swap(pools: Pools, old: Watched, config: ReplicaConfig, grace_s: float, notes: Notes) -> Watched:
    """Drain and end first, then start: for want of room."""
    before = old.config
    await drain(pools, old, grace_s, notes, comes_back=True)
    await _end(pools, old)
    try:
        return await _restart(pools, old, config, notes)
    except Failed as failed:
        await _end(pools, old)
        again = renamed(before, old.replica_id, _generation(old) + 1)
        try:
            await _restart(pools, old, again, notes)
        except Failed as worse:
            message = f"{failed}; the former one could not be started again: {worse}"
            raise Failed(message, cause=failed.cause, is_whole=False) from worse
        raise failed from None


async def _restart(pools: Pools, watched: Watched, config: ReplicaConfig, notes: Notes) -> Watched:
    began = pools.clock.monotonic()
    pools.exchange(watched, config)
    await _wait_ready(watched)
    notes.on_ready(pools.clock.monotonic() - began)
    return watched


async def _end(pools: Pools, watched: Watched) -> None:
    order = watched.config.order
    if order is None:
        return
    pools.release(watched)
    await _until(watched, lambda: _has_ended(watched), order.supervision.stop_s + END_S)


def _has_ended(watched: Watched) -> bool:
    return watched.launch is None or watched.launch.phase in (Phase.STOPPED, Phase.LOST)


async def _wait_ready(watched: Watched) -> None:
    """Return when the replica is Ready; raises Failed at its first failure, or when it takes too long."""
    order = watched.config.order
    bound_s = URL_READY_S if order is None else order.supervision.start_s + watched.config.self_test_s
    if await _until(watched, lambda: watched.state is ReplicaState.READY or _failure(watched) is not None, bound_s):
        if (failed := _failure(watched)) is not None:
            raise failed
        return
    why = watched.last_error.message if watched.last_error is not None else "it does not answer"
    raise Failed(f"{watched.replica_id} was not ready within {bound_s:g} s: {why}")


def _failure(watched: Watched) -> Failed | None:
    """A start that failed, a self-test that was not passed, or an engine that is not what it should be."""
    launch = watched.launch
    why = watched.last_error.message if watched.last_error is not None else "no reason is known"
    if launch is not None and launch.phase is Phase.WAITING and launch.cause is not None:
        return Failed(f"{watched.replica_id}: {launch.error.message if launch.error else why}", cause=launch.cause)
    if launch is not None and launch.phase is Phase.LOST:
        return Failed(f"{watched.replica_id}: {why}")
    if watched.config.order is not None and watched.state is ReplicaState.UNREADY:
        return Failed(f"{watched.replica_id}: {why}", cause=Cause.SELF_TEST)
    return None


def _generation(watched: Watched) -> int:
    return 0 if watched.config.order is None else watched.config.order.generation


async def _until(watched: Watched, condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for news of the replica until the condition holds; False when it did not within `timeout_s` seconds."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                watched.news.clear()
                await watched.news.wait()
    except TimeoutError:
        return condition()
    return True
