"""Keeps the process of one replica alive by one order: starts it, watches it, tells why it ended, starts it anew.

Owns the process, its restarts and what is reported of it. Other replicas and other orders of this one are not known.
"""

import asyncio
import errno
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from structlog.typing import FilteringBoundLogger

from llorch.domain.backoff import Breaker, Restarts
from llorch.errors import ConfigError, Internal, WorkerReset
from llorch.launch.commands import BUILT_IN, Command, command_for
from llorch.poolmanager.attention import (
    Enough,
    await_up,
    lost_gpus,
    used_gpus,
    watch_gpus,
    watch_health,
    watch_memory,
)
from llorch.poolmanager.causes import End, Killed, explain
from llorch.poolmanager.host import Host
from llorch.poolmanager.log_lines import EngineLog
from llorch.poolmanager.marks import Mark
from llorch.poolmanager.preflight import Checked, Preflight, Refusal
from llorch.poolmanager.process import ReplicaProcess
from llorch.poolmanager.shielding import to_the_end
from llorch.service.launching import Cause, LastError, LaunchOrder, LaunchReport, Phase

_AT_ONCE = (Cause.UNRESPONSIVE, Cause.HOST_OOM)
"""Causes for which a process is killed without being asked first: it would not hear, or there is no time."""

_EXHAUSTED = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class Site:
    """What all keepers of a manager share. `clock` in seconds, never going back; `wall` since the Unix epoch."""

    mark: Mark
    address: str
    preflight: Preflight
    host: Host
    log: FilteringBoundLogger
    clock: Callable[[], float]
    wall: Callable[[], float]
    draw: Callable[[], float]


class Keeper:
    """One order. `tell` hears every change of `report`; `next_incarnation` numbers its starts."""

    def __init__(
        self, order: LaunchOrder, site: Site, *, next_incarnation: Callable[[], int], tell: Callable[["Keeper"], None]
    ) -> None:
        self.order = order
        self.report = LaunchReport(order.replica_id, order.generation, Phase.STARTING)
        self._site = site
        self._next_incarnation = next_incarnation
        self._tell = tell
        self._restarts = Restarts(order.supervision.restart)
        self._log = site.log.bind(replica_id=order.replica_id, pool_id=order.pool_id)
        self._lines = EngineLog(self._log, clock=site.clock)
        self._told: asyncio.Future[Cause] | None = None
        """Where the process that runs now is told to end, and why."""

    def follow(self, before: LaunchReport) -> None:
        """Say that a process of the order before this one is still to go."""
        if before.pid is not None:
            self._change(phase=Phase.STOPPING, pid=before.pid, incarnation=before.incarnation)

    async def run(self) -> None:
        """Until it is cancelled; no process is left then. To be called when no process of an order before is left."""
        while True:
            try:
                await self._live()
            except Exception as exc:  # noqa: BLE001 (it is told, and the replica is started again as after any failure)
                self._log.error("unforeseen_error", where="pool manager, replica", exc_info=exc)
                self._fail(Cause.EXIT, f"The pool manager has a bug: {type(exc).__name__}.", code=Internal.code)
            await asyncio.sleep(max(0.0, (self._restarts.due or 0.0) - self._site.clock()))

    def restart(self, incarnation: int, cause: Cause) -> None:
        """End the process if it is this one, and start anew as after any failure."""
        if self._told is not None and not self._told.done() and incarnation == self.report.incarnation:
            self._told.set_result(cause)

    def final_report(self) -> LaunchReport:
        """What there is to say once its task has ended."""
        self.report = replace(self.report, phase=Phase.STOPPED, pid=None, url=None, api_key=None, next_start_s=None)
        return self.report

    # One start

    async def _live(self) -> None:
        """One start, until its process is gone and that was reported."""
        self._change(phase=Phase.STARTING, pid=None, next_start_s=None, load_s=None)
        try:
            checked = await self._site.preflight.check(self.order)
            api_key = secrets.token_hex(32)  # nothing in it can be taken for an option of a command
            command = command_for(self.order, host=self._site.address, port=checked.port, api_key=api_key)
        except Refusal as exc:
            self._refuse(exc.cause, exc.message, code=exc.code)
            return
        except ConfigError as exc:
            self._refuse(Cause.BINARY, exc.message, code=Refusal.code)
            return
        used = used_gpus(self.order, await self._site.host.read())
        self._lines.begin(api_key)
        self._restarts.note_start(self._site.clock())
        self._change(
            incarnation=self._next_incarnation(),
            api_key=api_key,
            engine_version=checked.engine_version,
            model_digest=checked.model_digest,
        )
        await self._spawn(command, checked, used)

    async def _spawn(self, command: Command, checked: Checked, used: tuple[int, ...]) -> None:
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.order.launcher != BUILT_IN:
            listening.set_result(checked.port)
        started_at = self._site.clock()
        try:
            process = await ReplicaProcess.start(
                command.arguments,
                environment={**os.environ, **command.environment},
                mark=self._site.mark,
                on_output=partial(self._hear, listening),
            )
        except OSError as exc:
            cause = Cause.HEADROOM if exc.errno in _EXHAUSTED else Cause.BINARY
            self._refuse(cause, f"{command.arguments[0]} cannot be executed: {exc.strerror}.", code=Refusal.code)
            return
        try:
            self._change(pid=process.pid)
            self._log.info("engine_starting", pid=process.pid, incarnation=self.report.incarnation)
            killed = await self._attend(process, listening, used, started_at)
            await self._end(process, killed, used)
        except BaseException:
            self._change(phase=Phase.STOPPING, url=None)
            await to_the_end(process.stop(self.order.supervision.stop_s))
            raise

    def _hear(self, listening: "asyncio.Future[int]", stream: str, line: str, dropped: int) -> None:
        if not listening.done() and stream == "stdout":
            port = _read_port(line)
            if port is not None:
                listening.set_result(port)
        self._lines.take(stream, line, dropped)

    async def _attend(
        self, process: ReplicaProcess, listening: "asyncio.Future[int]", used: tuple[int, ...], started_at: float
    ) -> Killed | None:
        """Return when the process has ended (None), or is to be ended and why."""
        self._told = asyncio.get_running_loop().create_future()
        limit = self.order.memory_limit_bytes
        seen: list[Killed | None] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_watch_exit(process))
                group.create_task(_watch_order(self._told))
                group.create_task(self._watch_answers(listening, started_at))
                if limit is not None:
                    group.create_task(watch_memory(process, limit))
                if used:
                    group.create_task(watch_gpus(used, lambda: self._site.host.facts))
        except* Enough as several:
            seen = [each.killed for each in several.exceptions if isinstance(each, Enough)]
        finally:
            self._told = None
        return None if None in seen else seen[0]

    async def _watch_answers(self, listening: "asyncio.Future[int]", started_at: float) -> None:
        supervision = self.order.supervision
        api_key = self.report.api_key or ""
        try:
            async with asyncio.timeout(supervision.start_s):
                url = f"http://{_bracketed(self._site.address)}:{await listening}"
                health = url + self.order.health_path
                loading = partial(self._change, phase=Phase.LOADING, url=url)
                await await_up(health, api_key=api_key, on_loading=loading)
        except TimeoutError:
            why = f"The engine was not ready within {supervision.start_s:g} s of its start"
            raise Enough(Killed(Cause.START_TIMEOUT, why)) from None
        self._note_up(url, self._site.clock() - started_at)
        await watch_health(health, api_key=api_key, limit_s=supervision.unresponsive_s, on_check=self._settle)

    def _note_up(self, url: str, load_s: float) -> None:
        self._lines.forget()
        self._restarts.note_up(self._site.clock())
        self._change(phase=Phase.UP, url=url, load_s=load_s)
        self._log.info("engine_up", pid=self.report.pid, url=url, load_s=round(load_s, 3))

    async def _end(self, process: ReplicaProcess, killed: Killed | None, used: tuple[int, ...]) -> None:
        """See that nothing is left of it, and report why it ended."""
        if killed is not None and self.report.phase is Phase.UP:
            self._change(phase=Phase.STOPPING, url=None)  # one that has not come up stays so until it is gone
        oom_kills = self._site.host.count_oom_kills()
        is_urgent = killed is None or killed.cause in _AT_ONCE
        await process.stop(0.0 if is_urgent else self.order.supervision.stop_s)
        lost = lost_gpus(used, await self._site.host.read()) if used else ()
        status = await process.wait()
        cause, message = explain(End(status, killed, self._lines.last, oom_kills, lost))
        self._lines.tell_dropped()
        self._fail(cause, message, code=WorkerReset.code)
        self._log_failure("engine_ended")

    # Failures

    def _refuse(self, cause: Cause, message: str, *, code: str) -> None:
        self._fail(cause, message, code=code)
        self._log_failure("engine_refused")

    def _fail(self, cause: Cause, message: str, *, code: str) -> None:
        now = self._site.clock()
        due = self._restarts.note_failure(now, self._site.draw())
        self._change(
            phase=Phase.WAITING,
            pid=None,
            url=None,
            api_key=None,
            cause=cause,
            error=LastError(code, message, self._site.wall()),
            restarts={**self.report.restarts, cause: self.report.restarts.get(cause, 0) + 1},
            next_start_s=max(0.0, due - now),
        )

    def _log_failure(self, event: str) -> None:
        report = self.report
        assert report.cause is not None, "it failed"
        assert report.error is not None, "it failed"
        self._log.warning(
            event,
            cause=report.cause.value,
            error=report.error.message,
            restarts=sum(report.restarts.values()),
            next_start_s=round(report.next_start_s or 0.0, 3),
        )

    def _settle(self) -> None:
        """The process was up for long enough, perhaps."""
        self._restarts.settle(self._site.clock())
        self._change()

    # Reporting

    def _change(self, **changes: Any) -> None:
        """Report what is new, the breaker included, which may have moved with it."""
        was, breaker = self.report, self._restarts.breaker
        self.report = replace(was, breaker=breaker, **changes)
        if self.report == was:
            return
        self._tell(self)
        if breaker is not was.breaker and breaker is Breaker.OPEN:
            self._log.warning("breaker_opened", next_start_s=round(self.report.next_start_s or 0.0, 3))
        elif breaker is not was.breaker and breaker is Breaker.CLOSED:
            self._log.info("breaker_closed")


async def _watch_exit(process: ReplicaProcess) -> None:
    await process.wait()
    raise Enough


async def _watch_order(told: "asyncio.Future[Cause]") -> None:
    cause = await told
    raise Enough(Killed(cause, f"The engine was ended and started anew: {cause.value}"))


def _read_port(line: str) -> int | None:
    """The port in the line by which llorch's own engine tells that it listens."""
    if not line.startswith("{"):
        return None
    try:
        said = json.loads(line)
        return int(str(said["url"]).rpartition(":")[2]) if said.get("event") == "listening" else None
    except (ValueError, KeyError, AttributeError):
        return None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
