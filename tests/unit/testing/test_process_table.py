"""The process table tells whose engines run, dead or moved managers included."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import process_table
from tests.support.engines import FakeEngineProcess
from tests.support.process_table import MARKER
from tests.support.processes import Process, wait_for

SLEEP = 'import time; print(\'{"event": "up"}\', flush=True); time.sleep(600)'
FAMILY = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
child.wait()
"""
BUSY = "\nuntil = __import__('time').process_time() + 0.3\nwhile __import__('time').process_time() < until: pass\n"


class Starter:
    """Starts processes with marks of their own; everything has ended when the test has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Process] = []

    def __call__(self, code: str, marker: str | None) -> Process:
        environment = {} if marker is None else {MARKER: marker}
        log = self.directory / f"{len(self.started)}.log"
        process = Process(["-c", code], log=log, environment=environment)
        self.started.append(process)
        return process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for process in starter.started:
        for each in process_table.engine_processes(owner=f"{tmp_path}/a:b.yaml"):
            each.kill()
        process.end()


@pytest.fixture
def owner(tmp_path: Path) -> str:
    """The path of a configuration; it may well have a colon in it."""
    return f"{tmp_path}/a:b.yaml"


def pids(processes: list[psutil.Process]) -> set[int]:
    return {process.pid for process in processes}


def test_engines_are_told_by_their_manager_and_owner(start: Starter, owner: str) -> None:
    one, other = start(SLEEP, f"{owner}:4194301:17.5"), start(SLEEP, f"{owner}:4194302:17.5")
    unmarked = start(SLEEP, None)
    for process in (one, other, unmarked):
        process.announcement("up")
    assert pids(process_table.engine_processes(4194301)) == {one.pid}
    assert pids(process_table.engine_processes(owner=owner)) == {one.pid, other.pid}
    assert pids(process_table.engine_processes(4194301, owner="else")) == set()
    assert unmarked.pid not in pids(process_table.engine_processes())
    engine = psutil.Process(one.pid)
    assert (process_table.manager_of(engine), process_table.owner_of(engine)) == (4194301, owner)


def test_child_of_an_engine_is_found_when_the_engine_is_gone(start: Starter, owner: str) -> None:
    engine = start(FAMILY, f"{owner}:4194303:1")
    engine.announcement("up")
    family = process_table.engine_processes(4194303)
    assert len(family) == 2
    engine.end()
    (child,) = process_table.engine_processes(4194303)
    with pytest.raises(AssertionError, match=str(child.pid)):
        process_table.assert_none_left(4194303)
    with pytest.raises(AssertionError, match=str(child.pid)):
        process_table.wait_gone(family, 0.1)
    child.kill()
    process_table.wait_gone(family)
    process_table.assert_none_left(4194303, within_s=5)


def test_url_of_an_engine_is_where_it_listens(start: Starter, tmp_path: Path) -> None:
    """So that a test can speak to a FakeEngine that a manager has started."""
    engine = FakeEngineProcess(tmp_path / "engine.log")
    try:
        assert process_table.url_of(psutil.Process(engine.pid)) == engine.url
    finally:
        engine.end()
    silent = start(SLEEP, None)
    silent.announcement("up")
    with pytest.raises(AssertionError, match="nothing"):
        process_table.url_of(psutil.Process(silent.pid))


def test_zombie_is_gone_and_told_as_one_that_nobody_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    try:
        process_table.wait_gone([process], 10)
        assert process in process_table.zombies_of(os.getpid())
    finally:
        child.wait()
    assert process not in process_table.zombies_of(os.getpid())
    process_table.wait_gone([process], 0)


def test_cpu_time_counts_children_living_and_ended(start: Starter) -> None:
    parent = start(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])\n{SLEEP}", None)
    parent.announcement("up")
    assert process_table.cpu_time_of(parent.pid) < 0.25
    assert process_table.cpu_time_of(parent.pid, children=True) > 0.28
    other = start(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY + SLEEP!r}])", None)
    other.announcement("up")
    wait_for(lambda: process_table.cpu_time_of(other.pid, children=True) > 0.28, "the living child counts")
    with pytest.raises(psutil.NoSuchProcess):
        process_table.cpu_time_of(4194304)
