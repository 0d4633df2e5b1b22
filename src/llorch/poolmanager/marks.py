"""What engine processes carry in their environment, and how they are found by it in the process table.

Children inherit it, so that a process is known as ours wherever it was moved in the tree. Everything here looks through
the whole process table or waits for it to change: call it in a thread. It knows nothing of replicas.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

MANAGER_VARIABLE: Final = "LLORCH_MANAGER"
"""`<owner>:<pid of the manager>:<its start time>`; the owner is hashed, so that no path is told."""
START_VARIABLE: Final = "LLORCH_ENGINE_START"
"""One start of one engine process, with all its children."""

KILL_S: Final = 10.0
"""How long processes that were killed are waited for. One that hangs in the kernel cannot be waited out."""

_IS_LINUX: Final = sys.platform.startswith("linux")
_LOOK_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Mark:
    """Which manager started a process. `started` tells it from a later process that got its pid."""

    owner: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.owner}:{self.pid}:{self.started}"


def mark_of(owner: str) -> Mark:
    """The mark of this process as the manager of `owner`, which may be any text."""
    pid = os.getpid()
    return Mark(hash_owner(owner), pid, _started(pid) or "")


def hash_owner(owner: str) -> str:
    """An owner as it stands in marks."""
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def parse_mark(text: str) -> Mark | None:
    """A mark as it stands in an environment; None for what is none."""
    parts = text.split(":")
    if len(parts) != 3 or not parts[1].isdecimal():
        return None
    return Mark(parts[0], int(parts[1]), parts[2])


def is_manager_alive(mark: Mark) -> bool:
    """Whether the process that has set this mark runs."""
    return bool(mark.started) and _started(mark.pid) == mark.started


def find_managed(owner: str) -> list[tuple[Mark, psutil.Process]]:
    """Every process that a manager of this owner started, as far as this process may see it."""
    hashed = hash_owner(owner)
    found = []
    for process in _processes():
        mark = parse_mark(_environment(process).get(MANAGER_VARIABLE, ""))
        if mark is not None and mark.owner == hashed:
            found.append((mark, process))
    return found


def find_started(start: str, *, leader: int) -> list[psutil.Process]:
    """Every process of one start, by its environment or by the session that its first process, `leader`, opened.

    To be asked once the leader is gone.
    """
    processes = _processes()
    is_recycled = any(process.pid == leader for process in processes)  # by a process that is none of ours
    return [
        process
        for process in processes
        if _environment(process).get(START_VARIABLE) == start or (not is_recycled and _session(process) == leader)
    ]


def kill_all(find: Callable[[], Sequence[psutil.Process]], *, within_s: float = KILL_S) -> list[int]:
    """SIGKILL to whatever is found, again and again until nothing is; returns the pids. Gives up after `within_s`."""
    killed: dict[int, None] = {}
    until = time.monotonic() + within_s
    while found := find():
        for process in found:
            with suppress(psutil.Error):
                process.kill()
                killed[process.pid] = None
        if time.monotonic() > until:
            break
        time.sleep(_LOOK_S)
    return list(killed)


def _processes() -> list[psutil.Process]:
    """What runs and is not this process. One that was killed, and that nobody has asked for its status, does not."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and _has_our_pids(pid):
                found.append(process)
    return found


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _has_our_pids(pid: int) -> bool:
    """Whether the pids that a process knows mean the same here: those in a container do not."""
    if not _IS_LINUX:
        return True
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False


def _started(pid: int) -> str | None:
    """When a process that runs was started, in a form that no change of the clock alters; None when it does not run."""
    try:
        if not _IS_LINUX:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (OSError, psutil.Error):
        return None
    state, started = fields[0], fields[19]  # proc(5): the 3rd and the 22nd of all, the name before them may hold blanks
    return None if state in "ZX" else started
