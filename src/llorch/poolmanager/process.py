"""One engine process with whatever it starts itself: begun, listened to, weighed, ended, and nothing of it left.

It dies with the thread that started it (Linux). Replicas, health and restarts are not known here.
"""

import asyncio
import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Final, Self

import psutil

from llorch.poolmanager.log_lines import LineCutter
from llorch.poolmanager.marks import MANAGER_VARIABLE, START_VARIABLE, Mark, find_started, kill_all
from llorch.poolmanager.shielding import to_the_end

OnOutput = Callable[[str, str, int], None]
"""Takes `stdout` or `stderr`, a line, and how many bytes at its end were cut off."""

_LAST_WORDS_S: Final = 1.0
"""How long the output of a process that is gone is waited for: it ends when nobody can write any more."""
_PR_SET_PDEATHSIG: Final = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform.startswith("linux") else None


class ReplicaProcess:
    """A process in a session of its own. `stop` must be called once it was started, also when it has ended by itself.

    `status` is None while it runs, then its exit status; negative: the signal that ended it.
    """

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self._start = secrets.token_hex(8)
        self._process: asyncio.subprocess.Process | None = None
        self._outputs: list[_Output] = []

    @classmethod
    async def start(
        cls, arguments: Sequence[str], *, environment: Mapping[str, str], mark: Mark, on_output: OnOutput
    ) -> Self:
        """Start it with this environment, and no other. Raises OSError when it cannot be; no process is left then."""
        process = cls(on_output)
        try:
            await to_the_end(process._spawn(arguments, environment, mark))
        except BaseException:
            await to_the_end(process.stop(0))
            raise
        return process

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def status(self) -> int | None:
        """See the class."""
        return self._process.returncode if self._process is not None else None

    async def wait(self) -> int:
        """Return the status when the process has ended, whatever became of its children."""
        assert self._process is not None, "start it first"
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """End it: SIGTERM to its group, SIGKILL after `grace_s` seconds, then SIGKILL to every child wherever it went.

        Returns when all are gone and all that they wrote is read. Idempotent, at any time. A process that hangs in the
        kernel is not waited for longer than marks.KILL_S.
        """
        if self._process is not None:
            await self._end(self._process, grace_s)
            await asyncio.to_thread(kill_all, partial(find_started, self._start, leader=self._process.pid))
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                for output in self._outputs:
                    await output.has_ended.wait()
        for output in self._outputs:
            output.close()

    async def read_rss(self) -> int:
        """Bytes of memory that it and its children have resident; what they share counts for each of them."""
        return await asyncio.to_thread(_read_rss, self.pid)

    async def _spawn(self, arguments: Sequence[str], environment: Mapping[str, str], mark: Mark) -> None:
        # Pipes of our own: asyncio's make wait() wait until the last child that inherited them has closed them, too.
        with ExitStack() as ends:
            self._process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=await self._open("stdout", ends),
                stderr=await self._open("stderr", ends),
                env={**environment, MANAGER_VARIABLE: str(mark), START_VARIABLE: self._start},
                start_new_session=True,  # Ctrl-C in the terminal is for llorch, which lets running tasks end
                preexec_fn=partial(_die_with, os.getpid()) if _prctl is not None else None,
            )

    async def _open(self, stream: str, ends: ExitStack) -> int:
        """A pipe that is read from here on; the end to write to, which `ends` closes."""
        reading, writing = os.pipe()
        ends.callback(os.close, writing)
        output = _Output(partial(self._on_output, stream))
        self._outputs.append(output)
        file = os.fdopen(reading, "rb", buffering=0)
        await asyncio.get_running_loop().connect_read_pipe(lambda: output, file)
        return writing

    async def _end(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        try:
            if process.returncode is None and grace_s > 0:
                self._signal(process, signal.SIGTERM)
                self._signal(process, signal.SIGCONT)  # one that was stopped would not hear
                async with asyncio.timeout(grace_s):
                    await process.wait()
        except TimeoutError:
            pass
        finally:
            if process.returncode is None:
                self._signal(process, signal.SIGKILL)
        await process.wait()

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


class _Output(asyncio.Protocol):
    """What comes through one pipe."""

    def __init__(self, on_line: Callable[[str, int], None]) -> None:
        self._cutter = LineCutter(on_line)
        self._transport: asyncio.BaseTransport | None = None
        self.has_ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._cutter.feed(data)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._cutter.flush()
        self.has_ended.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _die_with(parent: int) -> None:
    """Between fork and exec: have the kernel end this process when its parent dies, however that dies."""
    assert _prctl is not None, "only called where it is"
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked


def _read_rss(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += int(each.memory_info().rss)
    return total
