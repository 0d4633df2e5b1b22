"""One engine process, on both event loops: its output, its end, and that nothing is left of it."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from llorch.poolmanager.marks import find_managed, mark_of
from llorch.poolmanager.process import ReplicaProcess
from llorch.poolmanager.shielding import to_the_end
from tests.support.process_table import is_gone
from tests.unit.poolmanager.supervised import SOON_S, owner_for, python

Run = Callable[[Coroutine[Any, Any, None]], None]

SLEEP = "import time; print('here', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
CHILD = "import os, time; os.setsid(); os.write(1, b'child\\n'); time.sleep(600)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-I', '-S', '-c', {CHILD!r}]);"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


class Begun:
    """A process of a test, and what it wrote."""

    def __init__(self, directory: Path) -> None:
        self.owner = owner_for(directory)
        self.lines: list[tuple[str, str]] = []
        self._news = asyncio.Event()

    async def start(self, code: str, **environment: str) -> ReplicaProcess:
        return await ReplicaProcess.start(
            python(code), environment=environment, mark=mark_of(self.owner), on_output=self._hear
        )

    async def until(self, line: str) -> None:
        async with asyncio.timeout(SOON_S):
            while line not in [text for _, text in self.lines]:
                self._news.clear()
                await self._news.wait()

    def left(self) -> list[psutil.Process]:
        return [process for _, process in find_managed(self.owner)]

    def _hear(self, stream: str, line: str, _dropped: int) -> None:
        self.lines.append((stream, line))
        self._news.set()


def test_everything_that_it_writes_is_heard_although_it_ends_at_once(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        begun = Begun(tmp_path)
        code = "import sys; print('out'); print('err', file=sys.stderr); print('x' * 300_000); sys.stdout.write('end')"
        process = await begun.start(code)
        assert await process.wait() == 0
        await process.stop(1)
        assert ("stderr", "err") in begun.lines
        assert [line for stream, line in begun.lines if stream == "stdout"][0::2] == ["out", "end"]
        assert process.status == 0

    run(scenario())


def test_environment_is_the_given_one_and_input_is_empty(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        begun = Begun(tmp_path)
        process = await begun.start("import os, sys; print(sorted(os.environ), repr(sys.stdin.read()))", ONE="1")
        await process.wait()
        await process.stop(1)
        told = begun.lines[0][1]
        assert "'LLORCH_ENGINE_START', 'LLORCH_MANAGER', 'ONE'" in told
        assert "'HOME'" not in told
        assert told.endswith("''")

    run(scenario())


@pytest.mark.parametrize(
    ("code", "grace_s", "status"),
    [(SLEEP, 10, -signal.SIGTERM), (STUBBORN, 0.1, -signal.SIGKILL), (SLEEP, 0, -signal.SIGKILL)],
)
@pytest.mark.parametrize("is_stopped", [False, True])
def test_stop_ends_it_whatever_it_does(
    tmp_path: Path, run: Run, *, code: str, grace_s: float, status: int, is_stopped: bool
) -> None:
    async def scenario() -> None:
        begun = Begun(tmp_path)
        process = await begun.start(code)
        await begun.until("here")
        if is_stopped:
            os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        await asyncio.gather(process.stop(grace_s), process.stop(grace_s))
        await process.stop(grace_s)
        assert time.monotonic() - began < 5
        assert process.status == status
        assert begun.left() == []

    run(scenario())


@pytest.mark.parametrize("ends_by_itself", [False, True])
def test_children_that_left_the_group_are_ended_too(tmp_path: Path, run: Run, ends_by_itself: bool) -> None:
    """They hold the pipes open, and `wait` does not wait for them."""

    async def scenario() -> None:
        begun = Begun(tmp_path)
        process = await begun.start(PARENT + (" sys.stdin.read()" if ends_by_itself else SLEEP))
        await begun.until("child")
        if ends_by_itself:
            async with asyncio.timeout(SOON_S):
                await process.wait()
            assert len(begun.left()) == 1
        await process.stop(1)
        assert begun.left() == []

    run(scenario())


def test_child_that_dropped_its_environment_is_found_by_its_session(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        begun = Begun(tmp_path)
        bare = "import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"
        process = await begun.start(
            f"import subprocess, sys; subprocess.Popen([sys.executable, '-I', '-S', '-c', {bare!r}],"
            " env={}, process_group=0).wait()"
        )
        async with asyncio.timeout(SOON_S):
            while not begun.lines:
                await begun._news.wait()
        child = psutil.Process(int(begun.lines[0][1]))
        assert os.getpgid(child.pid) != process.pid
        await process.stop(1)
        assert is_gone(child)

    run(scenario())


def test_memory_of_children_counts(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        begun = Begun(tmp_path)
        process = await begun.start(PARENT + SLEEP)
        await begun.until("child")
        alone = psutil.Process(process.pid).memory_info().rss
        assert await process.read_rss() > alone
        await process.stop(0)
        assert await process.read_rss() == 0

    run(scenario())


@pytest.mark.parametrize("program", ["/no/such/program", "/etc"])
def test_program_that_cannot_be_executed_is_told_and_leaves_no_descriptor(
    tmp_path: Path, run: Run, program: str
) -> None:
    async def scenario() -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (what is listed is gone at once)
        for _ in range(3):
            with pytest.raises(OSError, match=r"No such file|denied"):
                await ReplicaProcess.start(
                    [program], environment={}, mark=mark_of(str(tmp_path)), on_output=lambda *_: None
                )
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208

    run(scenario())


def test_start_that_is_cancelled_leaves_no_process(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        for passes in range(1, 12):
            begun = Begun(tmp_path)
            task = asyncio.create_task(begun.start(SLEEP))
            for _ in range(passes):
                await asyncio.sleep(0)
            was_done = task.done()
            task.cancel()
            if was_done:
                await task.result().stop(0)
            else:
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert begun.left() == []

    run(scenario())


def test_stop_that_is_cancelled_kills_at_once(tmp_path: Path, run: Run) -> None:
    """Whoever has no patience left still leaves no process."""

    async def scenario() -> None:
        begun = Begun(tmp_path)
        process = await begun.start(STUBBORN)
        await begun.until("here")
        task = asyncio.create_task(process.stop(600))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await process.wait() == -signal.SIGKILL
        await process.stop(0)

    run(scenario())


def test_work_is_done_to_its_end_before_a_cancellation_is_told(run: Run) -> None:
    async def scenario() -> None:
        steps: list[int] = []

        async def work() -> str:
            for step in range(5):
                await asyncio.sleep(0)
                steps.append(step)
            return "done"

        assert await to_the_end(work()) == "done"
        steps.clear()
        task = asyncio.create_task(to_the_end(work()))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == [0, 1, 2, 3, 4]

    run(scenario())
