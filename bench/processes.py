"""Server processes under test: starting them on a core of their own, and what they cost in CPU time and memory.

It knows nothing of what is asked of them.
"""

import asyncio
import os
import resource
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import httpx
import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
OUT: Final = ROOT / "out" / "bench"
SERVER_CORE: Final = 0
LOAD_CORE: Final = 1
"""The engine and the load client share this core; the server under test has the other one for itself."""

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_START_S: Final = 120.0
_STOP_S: Final = 10.0


class BenchError(Exception):
    """The run is not valid: a server failed, or did not do what was asked of it."""


def raise_file_limit() -> None:
    """Let this process, and all it starts, open as many sockets as the system lets them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pin_load_process() -> None:
    """Keep this process off the core of the server under test. Raises BenchError where there are not two cores."""
    if not {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        raise BenchError("two cores are needed: one for the server under test, one for the load")
    os.sched_setaffinity(0, {LOAD_CORE})


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(slots=True)
class ServerProcess:
    """A child process in a session of its own, pinned with all its descendants to `core`, logging to out/bench."""

    name: str
    command: Sequence[str]
    port: int
    core: int
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> Path:
        return OUT / f"{self.name}.log"

    async def __aenter__(self) -> Self:
        OUT.mkdir(parents=True, exist_ok=True)
        cores = os.sched_getaffinity(0)
        with self.log.open("wb") as log:
            try:
                os.sched_setaffinity(0, {self.core})  # children inherit it, from their first instruction on
                self._process = await asyncio.create_subprocess_exec(
                    *self.command,
                    cwd=ROOT,
                    env={**os.environ, **self.environment},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                )
            finally:
                os.sched_setaffinity(0, cores)
        try:
            await self._wait_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        children = self._tree()[1:]
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        for each in children:
            if each.is_running():  # psutil sees to it that the pid was not given to another process
                each.kill()

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.returncode is not None:
                raise BenchError(f"{self.name} ended as it started; see {self.log}")
            if await get_status(self.port, self.ready_path) == 200:
                return
            await asyncio.sleep(0.1)
        raise BenchError(f"{self.name} was not ready after {_START_S:g} s; see {self.log}")

    def _tree(self) -> list[psutil.Process]:
        if self._process is None or self._process.returncode is not None:
            raise BenchError(f"{self.name} is not running; see {self.log}")
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the process and its descendants have used; nanosecond clocks."""
        return sum(_cpu_clock_s(each.pid) for each in self._tree())

    def waited_s(self) -> float:
        """Seconds that its threads were ready to run and had no core: what other load on the machine did to it."""
        return sum(_run_delay_s(each.pid) for each in self._tree())

    def rss_bytes(self) -> int:
        """Resident memory of the process and its descendants."""
        return sum(_rss_bytes(each.pid) for each in self._tree())

    def log_lines(self) -> Iterator[str]:
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            yield from lines


def _cpu_clock_s(pid: int) -> float:
    """The CPU clock of another process: what clock_getcpuclockid(3) makes of a pid on Linux."""
    return time.clock_gettime((~pid << 3) | 2)


def _run_delay_s(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[1]) for thread in threads) / 1e9


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_BYTES


async def get_status(port: int, path: str) -> int | None:
    """Status of a GET, or None when nothing answers."""
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"http://127.0.0.1:{port}{path}", timeout=10)).status_code
    except httpx.TransportError:
        return None
