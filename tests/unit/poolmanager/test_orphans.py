"""Processes that outlived their manager, with real ones: which are ended, and which must not be touched."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llorch.poolmanager.marks import MANAGER_VARIABLE, find_managed, hash_owner, is_manager_alive, mark_of, parse_mark
from llorch.poolmanager.orphans import end_orphans
from tests.support.processes import Process, wait_for
from tests.unit.poolmanager.supervised import owner_for

MANAGER = """
import asyncio, sys
from llorch.poolmanager.marks import mark_of
from llorch.poolmanager.process import ReplicaProcess

ENGINE = '''
import json, os, subprocess, sys
sleep = [sys.executable, "-I", "-S", "-c", "import os, time; os.setsid(); time.sleep(600)"]
child = subprocess.Popen(sleep)
print(json.dumps([os.getpid(), child.pid]), flush=True)
child.wait()
'''

async def main():
    engine = await ReplicaProcess.start(
        [sys.executable, "-I", "-S", "-c", ENGINE], environment={}, mark=mark_of(sys.argv[1]),
        on_output=lambda stream, line, dropped: print(line, flush=True),
    )
    await engine.wait()

asyncio.run(main())
"""

Start = Callable[[str], tuple[Process, list[int]]]


@pytest.fixture
def owner(tmp_path: Path) -> str:
    return owner_for(tmp_path)


@pytest.fixture
def start(tmp_path: Path, owner: str) -> Iterator[Start]:
    """Starts a manager with an engine that has a child, and tells the pids of both."""
    managers: list[Process] = []

    def begin(owner: str) -> tuple[Process, list[int]]:
        manager = Process(["-c", MANAGER, owner], log=tmp_path / f"{len(managers)}.log")
        managers.append(manager)
        return manager, json.loads(wait_for(lambda: manager.text.strip() or None, "the engine and its child run"))

    yield begin
    for manager in managers:
        manager.signal(signal.SIGKILL)
        manager.wait(10)
    end_orphans(owner)
    end_orphans(f"{owner}-other")


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_manager_left_behind_is_ended(start: Start, owner: str) -> None:
    """ORCH-3053: the engine dies with its manager, its child does not."""
    manager, (engine, child) = start(owner)
    assert {process.pid for _, process in find_managed(owner)} == {engine, child}
    manager.signal(signal.SIGKILL)
    manager.wait(10)
    wait_for(lambda: not runs(engine), "the kernel ended the engine")
    assert runs(child)
    assert end_orphans(owner) == [child]
    assert not runs(child)
    assert end_orphans(owner) == []


def test_engines_of_a_living_manager_and_of_other_owners_are_left_alone(start: Start, owner: str) -> None:
    _, living = start(owner)
    stranger, of_others = start(f"{owner}-other")
    stranger.signal(signal.SIGKILL)
    stranger.wait(10)
    dead, (engine, orphan) = start(owner)
    dead.signal(signal.SIGKILL)
    dead.wait(10)
    wait_for(lambda: not runs(engine), "the kernel ended the engine")
    assert end_orphans(owner) == [orphan]
    assert all(map(runs, living))
    assert runs(of_others[1])


def test_manager_that_nobody_has_waited_for_is_dead(start: Start, owner: str) -> None:
    """A zombie has a pid and a start time, and keeps nothing any more."""
    manager, (_, child) = start(owner)
    os.kill(manager.pid, signal.SIGKILL)
    wait_for(lambda: not runs(manager.pid), "it is a zombie")
    assert psutil.pid_exists(manager.pid)
    end_orphans(owner)
    assert not runs(child)


def test_process_that_got_the_pid_of_a_dead_manager_is_no_manager(tmp_path: Path, owner: str) -> None:
    mark = f"{hash_owner(owner)}:{os.getpid()}:1"
    child = Process(["-c", "import time; time.sleep(600)"], log=tmp_path / "log", environment={MANAGER_VARIABLE: mark})
    try:
        wait_for(lambda: len(find_managed(owner)) == 1, "it is found")
        assert end_orphans(owner) == [child.pid]
        assert child.wait(10) == -signal.SIGKILL
    finally:
        child.end()


def test_mark_tells_no_path_and_can_be_read_back(owner: str) -> None:
    mark = mark_of(owner)
    assert parse_mark(str(mark)) == mark
    assert owner not in str(mark)
    assert len(mark.owner) == 16
    assert is_manager_alive(mark)
    assert not is_manager_alive(mark_of(owner).__class__(mark.owner, mark.pid, "1"))


@pytest.mark.parametrize("text", ["", "a", "a:b", "a:b:c", "a:1", "a:1:2:3", ":-1:"])
def test_what_is_no_mark_is_told_as_such(text: str) -> None:
    assert parse_mark(text) is None


def test_processes_that_may_not_be_read_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, start: Start, owner: str
) -> None:
    """Most of a machine's processes belong to somebody else."""
    manager, (engine, child) = start(owner)
    manager.signal(signal.SIGKILL)
    manager.wait(10)
    wait_for(lambda: not runs(engine), "the kernel ended the engine")
    read = psutil.Process.environ

    def refuse(self: psutil.Process) -> dict[str, str]:
        if self.pid != child:
            raise psutil.AccessDenied(self.pid)
        return read(self)

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    gone = psutil.pids
    monkeypatch.setattr(psutil, "pids", lambda: [*gone(), 2**22 + 1])
    assert end_orphans(owner) == [child]
