"""The supervisor with real processes: starts, failures of every kind, restarts, succession, and nothing is left."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from llorch.domain.backoff import Breaker, RestartPolicy
from llorch.poolmanager import attention, supervisor
from llorch.poolmanager.health import ask
from llorch.poolmanager.marks import START_VARIABLE
from llorch.service.launching import Cause, HostFacts, LaunchReport, Phase
from llorch.testing.devices import FakeDevices
from tests.support.engines import TINY_MODEL
from tests.unit.poolmanager.supervised import AT_ONCE, SERVER, SOON_S, Watched, order, owner_for, python

CRASH = ("--crash-after-s", "0")
NEVER_READY = ("--load-s", "600")

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a scenario on each event loop: the service has uvloop, and must not need it."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    async with Watched(owner_for(tmp_path)) as watched:
        yield watched
    assert watched.processes() == []


def kill(report: LaunchReport, number: signal.Signals = signal.SIGKILL) -> None:
    assert report.pid is not None
    os.kill(report.pid, number)


def parent_of(code: str) -> str:
    """An engine that has a child which does this."""
    return f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-I', '-S', '-c', {code!r}])\n{SERVER}"


# Starting


def test_engine_comes_up_and_nothing_is_left_of_it(tmp_path: Path, run: Run) -> None:
    """ORCH-3001, on both event loops."""

    async def scenario() -> None:
        async with Watched(owner_for(tmp_path)) as watched:
            watched.manager.want(order(generation=7))
            report = await watched.until(Phase.UP)
            assert report.url is not None
            assert report.api_key is not None
            assert report.api_key.isalnum()  # one that began with a dash would be an option
            assert await ask(f"{report.url}/v1/models", api_key=report.api_key, timeout_s=5) == 200
            assert await ask(f"{report.url}/v1/models", api_key="another", timeout_s=5) == 401
            assert (report.generation, report.incarnation, report.restarts) == (7, 1, {})
            assert report.load_s is not None
            assert 0 < report.load_s < SOON_S
            assert os.getsid(report.pid or 0) == report.pid
            assert [process.pid for process in watched.processes()] == [report.pid]
        assert watched.phases() == [Phase.STARTING, Phase.UP, Phase.STOPPING, Phase.STOPPED]
        assert watched.processes() == []
        assert [entry["pid"] for entry in watched.events("engine_up")] == [report.pid]

    run(scenario())


async def test_real_llamacpp_tells_its_own_port_version_and_digest(watched: Watched) -> None:
    """ORCH-3032."""
    watched.manager.want(
        order(launcher="llamacpp", command=(), model="tiny", model_path=str(TINY_MODEL), ctx=256, threads=1, start_s=60)
    )
    report = await watched.until(Phase.UP)
    assert report.engine_version is not None
    assert report.engine_version.startswith("xllamacpp-")
    assert report.model_digest == "sha256:291846574cb40ded4c65a09dad2413854683c254d77aebb6b3e1da380d7eb529"
    command_line = psutil.Process(report.pid or 0).cmdline()
    assert report.api_key is not None
    assert report.api_key not in " ".join(command_line)
    assert await ask(f"{report.url}/props", api_key=report.api_key, timeout_s=5) == 200
    kill(report)
    again = await watched.until(Phase.WAITING)
    assert again.cause is Cause.SIGNAL


async def test_loading_is_told_apart_from_starting(watched: Watched) -> None:
    watched.manager.want(order("--load-s", "0.5"))
    report = await watched.until(Phase.UP)
    assert watched.phases() == [Phase.STARTING, Phase.LOADING, Phase.UP]
    assert report.load_s is not None
    assert report.load_s >= 0.5


async def test_engine_that_is_not_ready_in_time_is_ended(watched: Watched) -> None:
    """ORCH-3038."""
    watched.manager.want(order(*NEVER_READY, start_s=1.0))
    report = await watched.until(Phase.WAITING)
    assert report.cause is Cause.START_TIMEOUT
    assert report.error is not None
    assert "not ready within 1 s" in report.error.message
    assert (report.pid, report.url) == (None, None)
    assert watched.phases() in (
        [Phase.STARTING, Phase.LOADING, Phase.WAITING],
        [Phase.STARTING, Phase.WAITING],
    )
    assert watched.processes() == []


async def test_missing_binary_is_refused_and_tried_again(watched: Watched) -> None:
    watched.manager.want(order(command=("/no/such/engine",), restart=AT_ONCE))
    report = await watched.until(lambda report: report.restarts.get(Cause.BINARY, 0) >= 3)
    assert report.cause is Cause.BINARY
    assert report.error is not None
    assert "/no/such/engine" in report.error.message
    assert report.incarnation == 0
    assert watched.events("engine_refused")[0]["cause"] == "binary"


async def test_file_that_cannot_be_executed_after_all_is_refused(watched: Watched, tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/no/such/interpreter")
    program.chmod(0o755)
    watched.manager.want(order(command=(str(program),)))
    report = await watched.until(Phase.WAITING)
    assert report.cause is Cause.BINARY
    assert report.error is not None
    assert "No such file" in report.error.message


async def test_port_that_is_taken_is_refused(watched: Watched) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        watched.manager.want(order(port=taken.getsockname()[1]))
        report = await watched.until(Phase.WAITING)
        assert report.cause is Cause.PORT


# Failing


@pytest.mark.parametrize("words", [(), NEVER_READY], ids=["up", "loading"])
async def test_killed_engine_is_started_anew(watched: Watched, words: tuple[str, ...]) -> None:
    """ORCH-3053, OC-POOL-3010."""
    watched.manager.want(order(*words, restart=AT_ONCE))
    phase = Phase.LOADING if words else Phase.UP
    first = await watched.until(phase)
    assert first.error is None
    kill(first)
    second = await watched.until(lambda report: report.phase is phase and report.incarnation == 2)
    assert second.pid != first.pid
    assert second.api_key != first.api_key
    assert second.restarts == {Cause.SIGNAL: 1}
    assert second.cause is Cause.SIGNAL
    assert second.error is not None
    assert "killed by SIGKILL" in second.error.message
    assert len(watched.processes()) == 1
    ended = watched.events("engine_ended")
    assert (ended[0]["cause"], ended[0]["restarts"]) == ("signal", 1)


async def test_engine_that_hears_nothing_is_killed(watched: Watched) -> None:
    """OC-POOL-3011."""
    watched.manager.want(order(unresponsive_s=0.3))
    kill(await watched.until(Phase.UP), signal.SIGSTOP)
    report = await watched.until(Phase.WAITING)
    assert report.cause is Cause.UNRESPONSIVE
    assert report.error is not None
    assert "answered no health check for 0.3 s" in report.error.message
    assert watched.processes() == []


async def test_exit_is_told_with_the_last_words_of_the_engine(watched: Watched) -> None:
    watched.manager.want(order(*CRASH, "--exit-code", "3", "--last-words", "CUDA error: out of memory"))
    report = await watched.until(Phase.WAITING)
    assert report.cause is Cause.VRAM_OOM
    assert report.error is not None
    assert "exit status 3" in report.error.message
    assert "CUDA error: out of memory" in report.error.message
    assert watched.events("engine_log")[0]["stream"] == "stderr"


async def test_crash_loop_opens_the_breaker_and_stays_within_what_is_promised(watched: Watched) -> None:
    """ORCH-3053: waits grow, then nothing starts; the one trial after that shows that it is not over."""
    policy = RestartPolicy(first_s=0.02, factor=2.0, max_s=0.1, storm_failures=3, cool_down_s=0.4)
    code = "raise SystemExit(1)"
    watched.manager.want(order(command=python(code), restart=policy))
    opened = await watched.until(lambda report: report.breaker is Breaker.OPEN)
    assert opened.incarnation == 3
    assert opened.restarts == {Cause.EXIT: 3}
    assert opened.next_start_s is not None
    assert 0.39 < opened.next_start_s < 0.5
    opened_at = time.monotonic()
    await watched.until(lambda report: report.incarnation == 4)
    assert time.monotonic() - opened_at > 0.35
    assert watched.reports[-1].breaker is Breaker.HALF_OPEN
    again = await watched.until(Phase.WAITING)
    assert (again.breaker, again.incarnation) == (Breaker.OPEN, 4)
    waits = [report.next_start_s for report in watched.reports if report.phase is Phase.WAITING]
    assert [round(wait or 0, 2) for wait in waits[:2]] == sorted(round(wait or 0, 2) for wait in waits[:2])
    assert len(watched.events("breaker_opened")) == 2


async def test_breaker_closes_once_the_engine_was_up_for_long_enough(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "HEALTH_S", 0.05)
    policy = RestartPolicy(first_s=0.01, max_s=0.01, storm_failures=1, cool_down_s=0.05, stable_s=0.2)
    broken = tmp_path / "broken"
    broken.touch()
    watched.manager.want(order("--crash-file", str(broken), "--crash-after-s", "0", restart=policy))
    await watched.until(lambda report: report.breaker is Breaker.OPEN)
    broken.unlink()
    report = await watched.until(lambda report: report.phase is Phase.UP and report.breaker is Breaker.CLOSED)
    assert report.cause is Cause.EXIT
    assert len(watched.events("breaker_closed")) == 1


async def test_engine_over_its_memory_limit_is_killed_with_the_numbers(watched: Watched) -> None:
    """ORCH-3039."""
    hog = "hog = bytearray(120 << 20)\n" + SERVER
    watched.manager.want(order(command=python(hog), memory_limit_bytes=60 << 20))
    report = await watched.until(Phase.WAITING)
    assert report.cause is Cause.HOST_OOM
    assert report.error is not None
    assert "its limit is 60 MiB" in report.error.message


async def test_children_count_for_the_memory_limit(watched: Watched) -> None:
    """ORCH-3039."""
    hog = parent_of("import time; hog = bytearray(120 << 20); time.sleep(600)")
    watched.manager.want(order(command=python(hog), memory_limit_bytes=100 << 20))
    assert (await watched.until(Phase.WAITING)).cause is Cause.HOST_OOM
    assert watched.processes() == []


async def test_lost_gpu_ends_the_engines_that_run_on_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORCH-3038."""
    monkeypatch.setattr("llorch.poolmanager.host.READ_S", 0.05)
    devices = FakeDevices()
    devices.put(0, total_gib=24)
    devices.put(1, total_gib=24)
    async with Watched(owner_for(tmp_path), devices) as watched:
        for index in (0, 1):
            one = order(command=python(SERVER), replica_id=f"small/{index}", devices=(index,), allow_cpu=False)
            watched.manager.want(one)
            await watched.until(Phase.UP, f"small/{index}")
        devices.lose(1)
        report = await watched.until(Phase.WAITING, "small/1")
        assert report.cause is Cause.DRIVER_RESET
        assert watched.of("small/0")[-1].phase is Phase.UP
        assert watched.manager.host.gpus[1].is_lost


async def test_engine_that_dies_of_a_lost_gpu_first_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORCH-3038: the driver takes a moment to tell what the engine has felt already."""
    monkeypatch.setattr("llorch.poolmanager.host.READ_S", 600)
    devices = FakeDevices()
    devices.put(0, total_gib=24)
    async with Watched(owner_for(tmp_path), devices) as watched:
        watched.manager.want(order(command=python(SERVER), allow_cpu=False))
        report = await watched.until(Phase.UP)
        devices.lose(0)
        kill(report, signal.SIGABRT)
        report = await watched.until(Phase.WAITING)
        assert report.cause is Cause.DRIVER_RESET
        assert report.error is not None
        assert "gave up GPU 0" in report.error.message


# Being told


async def test_restart_ends_the_incarnation_that_is_meant_and_no_other(watched: Watched) -> None:
    watched.manager.want(order(command=python(SERVER), restart=AT_ONCE))
    first = await watched.until(Phase.UP)
    watched.manager.restart("small/0", first.incarnation - 1, Cause.SELF_TEST)
    watched.manager.restart("other/0", first.incarnation, Cause.SELF_TEST)
    watched.manager.restart("small/0", first.incarnation, Cause.SELF_TEST)
    watched.manager.restart("small/0", first.incarnation, Cause.SELF_TEST)
    second = await watched.until(lambda report: report.phase is Phase.UP and report.incarnation == 2)
    assert second.restarts == {Cause.SELF_TEST: 1}
    assert Phase.STOPPING in watched.phases()


async def test_same_order_again_changes_nothing(watched: Watched) -> None:
    watched.manager.want(order(command=python(SERVER)))
    first = await watched.until(Phase.UP)
    count = len(watched.reports)
    watched.manager.want(order(command=python(SERVER)))
    await asyncio.sleep(0)
    assert len(watched.reports) == count
    assert psutil.pid_exists(first.pid or 0)


async def test_other_order_waits_until_the_old_process_is_gone_and_forgets_its_failures(watched: Watched) -> None:
    """Two processes of one replica would fight for its port and its memory."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    watched.manager.want(order(command=python(stubborn), restart=AT_ONCE, stop_s=0.3))
    kill(await watched.until(Phase.UP))
    old = await watched.until(lambda report: report.phase is Phase.UP and report.incarnation == 2)
    process = psutil.Process(old.pid or 0)
    watched.manager.want(order(command=python(SERVER), generation=1))
    watched.manager.want(order(command=python(SERVER), generation=2))
    stopping = await watched.until(Phase.STOPPING)
    assert (stopping.generation, stopping.pid, stopping.incarnation, stopping.url) == (2, old.pid, 2, None)
    assert process.is_running()
    await watched.until(lambda report: report.phase is Phase.STARTING and report.generation == 2)
    assert not process.is_running()
    new = await watched.until(Phase.UP)
    assert (new.generation, new.incarnation, new.restarts, new.cause) == (2, 3, {}, None)
    assert 1 not in {report.generation for report in watched.reports}
    assert len(watched.processes()) == 1


async def test_released_replica_is_stopped_and_forgotten(watched: Watched) -> None:
    watched.manager.want(order(command=python(SERVER)))
    first = await watched.until(Phase.UP)
    watched.manager.release("small/0")
    watched.manager.release("small/0")
    watched.manager.release("other/0")
    last = await watched.until(Phase.STOPPED)
    assert (last.pid, last.url, last.api_key) == (None, None, None)
    assert not psutil.pid_exists(first.pid or 0)
    watched.manager.want(order(command=python(SERVER)))
    again = await watched.until(Phase.UP)
    assert again.incarnation == 2


async def test_release_before_anything_happened_is_told_as_stopped(watched: Watched) -> None:
    watched.manager.want(order())
    watched.manager.release("small/0")
    await watched.until(Phase.STOPPED)
    assert watched.phases() == [Phase.STOPPED]


@pytest.mark.parametrize("passes", [1, 2, 4, 8, 12, 20, 40])
async def test_release_at_any_moment_of_a_start_leaves_nothing(watched: Watched, passes: int) -> None:
    """A start is cut off after so many reports or passes of the event loop."""
    watched.manager.want(order(command=python(SERVER)))
    for _ in range(passes):
        await asyncio.sleep(0.002)
    watched.manager.release("small/0")
    await watched.until(Phase.STOPPED)
    assert watched.processes() == []


async def test_order_that_is_wanted_again_while_it_ends_starts_anew(watched: Watched) -> None:
    watched.manager.want(order(command=python(SERVER)))
    first = await watched.until(Phase.UP)
    watched.manager.release("small/0")
    watched.manager.want(order(command=python(SERVER)))
    again = await watched.until(lambda report: report.phase is Phase.UP and report.incarnation == 2)
    assert again.pid != first.pid
    assert Phase.STOPPED not in watched.phases()


# Leaving


def test_leaving_ends_everything_at_the_same_time(tmp_path: Path, run: Run) -> None:
    """On both event loops; one engine is stopped, one ignores SIGTERM, one has children, one waits for its restart."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    parent = parent_of("import os, time; os.setsid(); time.sleep(600)")

    async def scenario() -> None:
        async with Watched(owner_for(tmp_path)) as watched:
            for index in range(3):
                one = order(command=python(stubborn), replica_id=f"small/{index}", stop_s=0.5)
                watched.manager.want(one)
            watched.manager.want(order(command=python(parent), replica_id="small/3", stop_s=0.5))
            watched.manager.want(order(command=python("1/0"), replica_id="small/4"))
            for index in range(4):
                await watched.until(Phase.UP, f"small/{index}")
            await watched.until(Phase.WAITING, "small/4")
            kill(watched.of("small/0")[-1], signal.SIGSTOP)
            assert len(watched.processes()) == 5
            began = time.monotonic()
        assert time.monotonic() - began < 1.4
        assert watched.processes() == []
        assert {watched.of(f"small/{index}")[-1].phase for index in range(5)} == {Phase.STOPPED}

    run(scenario())


def test_cancelled_manager_leaves_nothing(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        watched = Watched(owner_for(tmp_path))

        async def live() -> None:
            async with watched:
                watched.manager.want(order(command=python(SERVER)))
                await asyncio.Event().wait()

        task = asyncio.create_task(live())
        await watched.until(Phase.UP)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert watched.processes() == []

    run(scenario())


async def test_bug_of_a_keeper_is_told_and_hurts_no_other(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.manager.want(order(command=python(SERVER)))
    await watched.until(Phase.UP)

    def explode(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("llorch.poolmanager.keeper.command_for", explode)
    watched.manager.want(order(command=python(SERVER), replica_id="other/0"))
    report = await watched.until(Phase.WAITING, "other/0")
    assert report.error is not None
    assert report.error.code == "INTERNAL"
    assert watched.events("unforeseen_error")
    assert watched.of("small/0")[-1].phase is Phase.UP


async def test_listener_that_fails_hurts_no_process(tmp_path: Path) -> None:
    watched = Watched(owner_for(tmp_path))
    hear = watched._hear

    def fail(report: LaunchReport) -> None:
        hear(report)
        raise RuntimeError("a bug")

    watched.manager._report = fail
    async with watched:
        watched.manager.want(order(command=python(SERVER)))
        await watched.until(Phase.UP)
        assert watched.events("unforeseen_error")[0]["where"] == "pool manager, report"


async def test_replica_that_waits_has_no_task_but_its_keeper(watched: Watched) -> None:
    """Nothing polls while nothing runs."""
    watched.manager.want(order(command=python("1/0")))
    await watched.until(Phase.WAITING)
    tasks = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]
    assert {name for name in tasks if not name.startswith(("keeper-", "pool-manager-host"))} == set()


async def test_host_is_known_from_the_start(watched: Watched) -> None:
    assert watched.manager.host != HostFacts()
    assert (
        supervisor.Supervisor(owner="x", devices=FakeDevices(), report=print, log=watched.manager._log).host
        == HostFacts()
    )


async def test_engine_is_marked_with_its_start_and_sees_its_environment(watched: Watched) -> None:
    watched.manager.want(order(command=python(SERVER), environment=(("SOME_SETTING", "on"),)))
    report = await watched.until(Phase.UP)
    environment = psutil.Process(report.pid or 0).environ()
    assert environment["SOME_SETTING"] == "on"
    assert environment[START_VARIABLE]
