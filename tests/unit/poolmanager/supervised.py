"""A supervisor in a test: orders with real engine processes, what it reported, and what it logged."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import structlog
from structlog.testing import LogCapture
from structlog.typing import FilteringBoundLogger

from llorch.domain.backoff import RestartPolicy
from llorch.poolmanager.marks import find_managed
from llorch.poolmanager.supervisor import Supervisor
from llorch.service.launching import Headroom, LaunchOrder, LaunchReport, Phase, Supervision
from llorch.testing.devices import FakeDevices

SOON_S = 20.0
"""Bound for anything to happen, on a machine that is busy with something else."""

FAKE = (sys.executable, "-m", "llorch.testing.fake_engine", "--port", "{port}", "--api-key", "{api_key}")
AT_ONCE = RestartPolicy(first_s=0.01, factor=1.0, max_s=0.01, storm_failures=1000)
LATE = RestartPolicy(first_s=600.0, max_s=600.0)
"""Nothing is started a second time while a test lasts."""


def order(
    *words: str,
    replica_id: str = "small/0",
    restart: RestartPolicy = LATE,
    command: tuple[str, ...] = FAKE,
    **more: Any,
) -> LaunchOrder:
    """An order for FakeEngine with these options, or for another command."""
    limits = {name: more.pop(name) for name in ("start_s", "unresponsive_s", "stop_s") if name in more}
    fields: dict[str, Any] = {
        "engine": "llamacpp",
        "launcher": "command",
        "model": "fake",
        "model_path": None,
        "model_digest": None,
        "ctx": 512,
        "slots": 1,
        "allow_cpu": True,
        "headroom": Headroom(0, 0, 0),
        "supervision": Supervision(**limits, restart=restart),
        "command": (*command, *words),
    }
    return LaunchOrder(replica_id=replica_id, pool_id=replica_id.partition("/")[0], **{**fields, **more})


def python(code: str) -> tuple[str, ...]:
    """A command that runs this, without the costly parts of starting Python."""
    return (sys.executable, "-I", "-S", "-c", code)


SERVER = """
import http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", {port}), Answer).serve_forever()
"""
"""The smallest engine that is healthy, as an argument of `python`."""


class Watched:
    """A supervisor with an ear on it."""

    def __init__(self, owner: str, devices: FakeDevices | None = None, **options: Any) -> None:
        self.owner = owner
        self.devices = devices or FakeDevices()
        self.reports: list[LaunchReport] = []
        self.capture = LogCapture()
        self._news = asyncio.Event()
        self.manager = Supervisor(
            owner=owner, devices=self.devices, report=self._hear, log=make_log(self.capture), **options
        )

    async def __aenter__(self) -> Self:
        await self.manager.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.manager.__aexit__(*exc_info)

    def of(self, replica_id: str = "small/0") -> list[LaunchReport]:
        return [report for report in self.reports if report.replica_id == replica_id]

    def phases(self, replica_id: str = "small/0") -> list[Phase]:
        """The phases that it went through, without repetitions in a row."""
        phases = [report.phase for report in self.of(replica_id)]
        return [phase for index, phase in enumerate(phases) if index == 0 or phases[index - 1] is not phase]

    async def until(
        self, wanted: Phase | Callable[[LaunchReport], bool], replica_id: str = "small/0", *, after: int = 0
    ) -> LaunchReport:
        """The newest report once it is in this phase, or as wanted, and not one of the first `after`."""
        is_wanted = (lambda report: report.phase is wanted) if isinstance(wanted, Phase) else wanted
        try:
            async with asyncio.timeout(SOON_S):
                while True:
                    told = self.of(replica_id)
                    if len(told) > after and is_wanted(told[-1]):
                        return told[-1]
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            story = "\n".join(f"{each.phase.value} {each.incarnation} {each.error}" for each in self.of(replica_id))
            raise AssertionError(f"not within {SOON_S:g} s; what became of {replica_id}:\n{story}") from None

    def events(self, name: str) -> list[Mapping[str, Any]]:
        return [entry for entry in self.capture.entries if entry["event"] == name]

    def processes(self) -> list[psutil.Process]:
        """What runs with the mark of this owner."""
        return [process for _, process in find_managed(self.owner)]

    def _hear(self, report: LaunchReport) -> None:
        assert not self.of(report.replica_id) or self.of(report.replica_id)[-1] != report, "told twice"
        self.reports.append(report)
        self._news.set()


def make_log(capture: LogCapture) -> FilteringBoundLogger:
    log: FilteringBoundLogger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    return log


def owner_for(directory: Path) -> str:
    """The configuration of a manager that no other test has."""
    return str(directory / "llorch.yaml")
