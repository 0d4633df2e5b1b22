"""The pool manager of this host: which orders there are, and a keeper for each.

Owns the keepers and their order of succession: of one replica no process is started before the last one is gone. What
keeping means is the keeper's business, what reports mean the service's.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Self

from structlog.typing import FilteringBoundLogger

from llorch.poolmanager.devices import Devices
from llorch.poolmanager.host import Host
from llorch.poolmanager.keeper import Keeper, Site
from llorch.poolmanager.marks import mark_of
from llorch.poolmanager.orphans import end_orphans
from llorch.poolmanager.preflight import Preflight
from llorch.poolmanager.shielding import to_the_end
from llorch.service.launching import Cause, HostFacts, LaunchOrder, LaunchReport

_LOOPBACK = "127.0.0.1"


class Supervisor:
    """A `service.launching.Manager` that runs the processes itself, as children of this process.

    Use it with `async with`, on the thread that starts it and ends last: entering kills what a dead manager of the same
    `owner` left behind, leaving returns when every process is gone. `report` is called on the event loop, once for each
    change, never from within `want`, `release` or `restart`. Engines listen at `host`, which must be of this host.
    """

    def __init__(
        self,
        *,
        owner: str,
        devices: Devices,
        report: Callable[[LaunchReport], None],
        log: FilteringBoundLogger,
        host: str = _LOOPBACK,
        clock: Callable[[], float] | None = None,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._owner = owner
        self._report = report
        self._log = log
        self._address = host
        self._preflight = Preflight(devices)
        self._clock = clock
        self._wall = wall
        self._draw = draw
        self._host = Host(devices, log)
        self._site: Site | None = None
        self._is_closed = False
        self._watch: asyncio.Task[None] | None = None
        self._keepers: dict[str, Keeper] = {}
        self._leaving: set[Keeper] = set()
        self._tasks: defaultdict[str, dict[Keeper, asyncio.Task[None]]] = defaultdict(dict)
        self._incarnations: defaultdict[str, int] = defaultdict(int)

    async def __aenter__(self) -> Self:
        ended = await asyncio.to_thread(end_orphans, self._owner)
        if ended:
            self._log.warning("orphans_ended", count=len(ended), pids=ended)
        await self._host.read()
        self._site = Site(
            mark=mark_of(self._owner),
            address=self._address,
            preflight=self._preflight,
            host=self._host,
            log=self._log,
            clock=self._clock or asyncio.get_running_loop().time,
            wall=self._wall,
            draw=self._draw,
        )
        self._watch = asyncio.create_task(self._host.watch(), name="pool-manager-host")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await to_the_end(self._aclose())

    # Manager

    @property
    def host(self) -> HostFacts:
        """See Manager.host."""
        return self._host.facts

    def want(self, order: LaunchOrder) -> None:
        """See Manager.want."""
        replica_id = order.replica_id
        old = self._keepers.get(replica_id)
        assert self._site is not None, "enter it first"
        if self._is_closed or (old is not None and old.order == order and old not in self._leaving):
            return
        new = Keeper(order, self._site, next_incarnation=lambda: self._next_incarnation(replica_id), tell=self._hear)
        self._keepers[replica_id] = new
        tasks = self._tasks[replica_id]
        before = dict(tasks)
        for task in before.values():
            task.cancel()
        tasks[new] = asyncio.create_task(self._keep(new, before), name=f"keeper-{replica_id}")
        tasks[new].add_done_callback(lambda task: self._note_end(new, task))

    def release(self, replica_id: str) -> None:
        """See Manager.release."""
        keeper = self._keepers.get(replica_id)
        if keeper is not None:
            self._leaving.add(keeper)
            self._tasks[replica_id][keeper].cancel()

    def restart(self, replica_id: str, incarnation: int, cause: Cause) -> None:
        """See Manager.restart."""
        keeper = self._keepers.get(replica_id)
        if keeper is not None:
            keeper.restart(incarnation, cause)

    # Keepers

    async def _keep(self, keeper: Keeper, before: Mapping[Keeper, asyncio.Task[None]]) -> None:
        """Run a keeper when nothing of those before it is left; all of these have been cancelled."""
        for old in before:
            keeper.follow(old.report)
        if before:
            await to_the_end(_wait(before.values()))
        await keeper.run()

    def _hear(self, keeper: Keeper) -> None:
        """Hand on what a keeper reports, unless another one has taken its place."""
        if self._keepers.get(keeper.order.replica_id) is keeper:
            self._tell(keeper.report)

    def _tell(self, report: LaunchReport) -> None:
        try:
            self._report(report)
        except Exception as exc:  # noqa: BLE001 (it is told; no process must suffer for what its listener does)
            self._log.error("unforeseen_error", where="pool manager, report", exc_info=exc)

    def _note_end(self, keeper: Keeper, task: asyncio.Task[None]) -> None:
        """The task of a keeper has ended, and with it every process that it had."""
        replica_id = keeper.order.replica_id
        del self._tasks[replica_id][keeper]
        if not task.cancelled() and task.exception() is not None:
            self._log.error("unforeseen_error", where="pool manager, keeper", exc_info=task.exception())
        self._leaving.discard(keeper)
        if self._keepers.get(replica_id) is keeper:
            del self._keepers[replica_id]
            self._tell(keeper.final_report())

    def _next_incarnation(self, replica_id: str) -> int:
        self._incarnations[replica_id] += 1
        return self._incarnations[replica_id]

    async def _aclose(self) -> None:
        self._is_closed = True
        tasks = [task for tasks in self._tasks.values() for task in tasks.values()]
        if self._watch is not None:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await _wait(tasks)


async def _wait(tasks: Collection[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
