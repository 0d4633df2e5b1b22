"""Child processes of tests: started with a log file, waited for with a bound, stopped by SIGTERM.

Nothing here knows what a process serves.
"""

import ctypes
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
"""Bound for anything to start, on a machine that is busy with something else."""

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP: httpx else loads every root certificate of the machine for each client."""

Found = TypeVar("Found")

_PR_SET_PDEATHSIG = 1
_IS_LINUX = sys.platform.startswith("linux")
_libc = ctypes.CDLL(None)


class Process:
    """One child process. What it writes goes to the file `log`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent if _IS_LINUX else None,  # noqa: PLW1509 (it is one system call)
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while the process lives."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """What was written until now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of JSON that were written; other lines as `{"text": line}`."""
        return [_parse(line) for line in self.text.splitlines() if line.strip()]

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.status is None:
            self._process.send_signal(number)

    def wait(self, within_s: float) -> int:
        """The exit status. Raises TimeoutExpired."""
        return self._process.wait(within_s)

    def end(self, within_s: float = 20.0) -> int:
        """SIGTERM, and the exit status; a process that does not end in time is killed, which its status tells."""
        self.signal()
        try:
            return self.wait(within_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            return self.wait(10)

    def announcement(self, event: str) -> dict[str, Any]:
        """The line of JSON with this `event`, as soon as it is written."""

        def look() -> dict[str, Any] | None:
            if self.status is not None:
                raise AssertionError(f"ended with status {self.status} before it said {event!r}:\n{self.text}")
            return next((line for line in self.lines() if line.get("event") == event), None)

        return wait_for(look, f"the line {event!r} in {self.log}", START_S)


def wait_for(look: Callable[[], Found | None], what: str, within_s: float = 10.0, every_s: float = 0.01) -> Found:
    """The first thing that `look` finds: anything but None and False; AssertionError after `within_s` seconds."""
    until = time.monotonic() + within_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > until:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)


def free_port() -> int:
    """A TCP port of loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _die_with_parent() -> None:
    """No child outlives the tests, however they end."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _parse(line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {"text": line}
    return parsed if isinstance(parsed, dict) else {"text": line}
