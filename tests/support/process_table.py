"""The process table: which engine processes there are, by the mark that their manager gave them, and what they cost.

An engine and its children carry `LLORCH_MANAGER=<owner>:<pid of the manager>:<its start time>` in their environment, so
that they are found wherever they were moved in the tree. A process is psutil's, which knows one from another that got
the same pid later.
"""

from collections.abc import Iterable

import psutil

from tests.support.processes import wait_for

MARKER = "LLORCH_MANAGER"
_UNREADABLE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


def marker_of(process: psutil.Process) -> str | None:
    """The mark of a process; None for one that no manager started, or that is gone."""
    try:
        return process.environ().get(MARKER)
    except _UNREADABLE:
        return None


def manager_of(process: psutil.Process) -> int | None:
    """The pid of the manager that started this process; None for one that no manager started."""
    marker = marker_of(process)
    parts = marker.rsplit(":", 2) if marker else []
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else None


def owner_of(process: psutil.Process) -> str | None:
    """For whom its manager started this process: the path of a configuration, or the id of a node."""
    marker = marker_of(process)
    return marker.rsplit(":", 2)[0] if marker else None


def engine_processes(manager: int | None = None, *, owner: str | None = None) -> list[psutil.Process]:
    """Living processes that carry a mark: those of the manager with this pid, of this owner, of both, or all."""
    found = [process for process in psutil.process_iter() if marker_of(process) is not None]
    if manager is not None:
        found = [process for process in found if manager_of(process) == manager]
    if owner is not None:
        found = [process for process in found if owner_of(process) == owner]
    return [process for process in found if not is_gone(process)]


def url_of(process: psutil.Process) -> str:
    """Where this process listens on loopback, as a URL. Raises AssertionError unless it is one TCP port."""
    found = {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    assert len(found) == 1, f"{describe(process)} listens on {sorted(found) or 'nothing'}"
    return f"http://127.0.0.1:{found.pop()}"


def is_gone(process: psutil.Process) -> bool:
    """Whether it runs no more; a zombie, that nobody has asked for its exit status yet, does not run."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def zombies_of(pid: int) -> list[psutil.Process]:
    """Children that ended and that this process, which lives, has not taken notice of."""
    children = psutil.Process(pid).children()
    return [child for child in children if child.is_running() and child.status() == psutil.STATUS_ZOMBIE]


def wait_gone(processes: Iterable[psutil.Process], within_s: float = 10.0) -> None:
    """Return when none of them runs any more. Raises AssertionError with those that do."""
    left = list(processes)

    def look() -> bool:
        left[:] = [process for process in left if not is_gone(process)]
        return not left

    try:
        wait_for(look, "every process is gone", within_s, every_s=0.02)
    except AssertionError as exc:
        raise AssertionError(f"{exc}: {[describe(process) for process in left]}") from None


def assert_none_left(*managers: int, within_s: float = 0.0) -> None:
    """Raise AssertionError when engine processes of these managers run on after `within_s` seconds."""

    def look() -> list[psutil.Process]:
        return [process for manager in managers for process in engine_processes(manager)]

    try:
        wait_for(lambda: not look(), f"no engine process is left of {managers}", within_s, every_s=0.05)
    except AssertionError as exc:
        raise AssertionError(f"{exc}: {[describe(process) for process in look()]}") from None


def cpu_time_of(pid: int, *, children: bool = False) -> float:
    """Seconds of CPU that a process has used; with its descendants, those included that it has waited for.

    Raises psutil.NoSuchProcess. What a living descendant's own ended children used is counted, what an ended one's
    that nobody waited for is not.
    """
    process = psutil.Process(pid)
    if not children:
        times = process.cpu_times()
        return float(times.user + times.system)
    return sum(_whole_time(each) for each in [process, *process.children(recursive=True)])


def describe(process: psutil.Process) -> str:
    """A process for the message of a failure."""
    try:
        return f"{process.pid} ({process.status()}, child of {process.ppid()}): {' '.join(process.cmdline())}"
    except psutil.Error as exc:
        return f"{process.pid}: {exc}"


def _whole_time(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)
