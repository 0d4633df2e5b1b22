"""What is watched while a process runs: that it comes up, goes on answering, stays light, and keeps its GPUs.

Each watch runs until it has seen enough, and then raises `Enough`. What becomes of the process is decided elsewhere.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from llorch.poolmanager.causes import Killed
from llorch.poolmanager.health import ask
from llorch.poolmanager.process import ReplicaProcess
from llorch.service.launching import Cause, HostFacts, LaunchOrder

HEALTH_S: Final = 2.0
"""Between health checks of a process that is up."""
ANSWER_S: Final = 5.0
"""How long a health check may take."""
WEIGH_S: Final = 1.0
"""Between looks at memory and GPUs."""

_FIRST_POLL_S, _LAST_POLL_S, _POLL_FACTOR = 0.02, 0.25, 1.5
_LEAST_ANSWER_S: Final = 0.5
_TRIES: Final = 2
"""Checks in a row that must fail: the first after the manager itself stood still may fail for that."""
_MIB: Final = 1024 * 1024


class Enough(Exception):
    """It is over with the process: it has ended by itself (None), or is to be ended."""

    def __init__(self, killed: Killed | None = None) -> None:
        self.killed = killed
        super().__init__()


async def await_up(url: str, *, api_key: str, on_loading: Callable[[], None]) -> None:
    """Return when GET answers 200. `on_loading` is called when it answers anything else."""
    pause_s = _FIRST_POLL_S
    while (status := await ask(url, api_key=api_key, timeout_s=ANSWER_S)) != 200:
        if status is not None:
            on_loading()
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * _POLL_FACTOR, _LAST_POLL_S)


async def watch_health(url: str, *, api_key: str, limit_s: float, on_check: Callable[[], None]) -> NoReturn:
    """Raise Enough when nothing was answered for `limit_s` seconds; whatever is answered counts."""
    clock = asyncio.get_running_loop().time
    answered_at, failures = clock(), 0
    while True:
        rest_s = answered_at + limit_s - clock()
        status = await ask(url, api_key=api_key, timeout_s=min(ANSWER_S, max(_LEAST_ANSWER_S, rest_s / 2)))
        on_check()
        if status is not None:
            answered_at, failures = clock(), 0
            await asyncio.sleep(HEALTH_S)
            continue
        failures += 1
        rest_s = answered_at + limit_s - clock()
        if rest_s <= 0 and failures >= _TRIES:
            raise Enough(Killed(Cause.UNRESPONSIVE, f"The engine answered no health check for {limit_s:g} s"))
        await asyncio.sleep(min(HEALTH_S, max(0.0, rest_s / 2)))


async def watch_memory(process: ReplicaProcess, limit_bytes: int) -> NoReturn:
    """Raise Enough when the process and its children have more memory than that."""
    while True:
        rss = await process.read_rss()
        if rss > limit_bytes:
            raise Enough(
                Killed(
                    Cause.HOST_OOM,
                    f"The engine used {rss / _MIB:.0f} MiB of the host's memory, and its limit is"
                    f" {limit_bytes / _MIB:.0f} MiB",
                )
            )
        await asyncio.sleep(WEIGH_S)


async def watch_gpus(used: Sequence[int], read: Callable[[], HostFacts]) -> NoReturn:
    """Raise Enough when one of these GPUs is not there any more."""
    while True:
        lost = lost_gpus(used, read())
        if lost:
            indices = ", ".join(map(str, lost))
            raise Enough(Killed(Cause.DRIVER_RESET, f"The driver gave up GPU {indices}, on which the engine ran"))
        await asyncio.sleep(WEIGH_S)


def used_gpus(order: LaunchOrder, facts: HostFacts) -> tuple[int, ...]:
    """The GPUs that a process of this order, started now, runs on."""
    if order.allow_cpu and not order.devices:
        return ()
    there = [gpu.index for gpu in facts.gpus if not gpu.is_lost]
    return tuple(index for index in there if not order.devices or index in order.devices)


def lost_gpus(used: Sequence[int], facts: HostFacts) -> tuple[int, ...]:
    """Those of these GPUs that are not there any more."""
    there = {gpu.index for gpu in facts.gpus if not gpu.is_lost}
    return tuple(index for index in used if index not in there)
