"""ORCH-3265, ORCH-3266, ORCH-3267: SIGTERM and SIGINT are events, and the end is bounded whatever comes."""

import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Processes
from tests.support.driver import Caller
from tests.support.engines import FakeEngineProcess
from tests.support.identities import ALICE
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config, make_pool
from tests.support.wire import check_whole


def serve(
    processes: Processes, grace_s: float, expected: Collection[str] = ()
) -> tuple[LlorchProcess, FakeEngineProcess]:
    engine = processes.fake("fake", slots=1)
    config = make_config([make_pool(engine)], server={"shutdown_grace_s": grace_s})
    return processes.serve(config, expected=expected), engine


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_peer_bug_28_running_stream_ends_whole_after_signal(processes: Processes, number: signal.Signals) -> None:
    service, engine = serve(processes, grace_s=20)
    engine.command(set={"hold": True})
    alice = Caller(service, ALICE)
    task = alice.accept(model_ref="fake", max_tokens=50)
    with alice.follow(task["task_id"]) as stream:
        engine.wait_running(1)
        engine.release(10)
        stream.until("token", 10)
        service.signal(number)
        service.announcement("shutdown_requested")
        engine.release(40)
        frames = check_whole(stream.to_end())
    assert frames[-1].event == "end"
    assert [frame.event for frame in frames].count("token") == 50
    alice.close()
    assert service.wait(10) == 0
    service.check_log()


def test_task_that_outlasts_the_grace_ends_in_a_retriable_error(processes: Processes) -> None:
    service, engine = serve(processes, grace_s=0.5, expected=["task_ended"])
    engine.command(set={"hold": True})
    alice = Caller(service, ALICE)
    running = alice.accept(model_ref="fake")["task_id"]
    queued = alice.accept(model_ref="fake")["task_id"]
    engine.wait_running(1)
    with alice.follow(running) as one, alice.follow(queued) as other:
        service.signal()
        start = time.monotonic()
        errors = [check_whole(stream.to_end())[-1].data for stream in (other, one)]
        assert time.monotonic() - start < 5
    for error in errors:
        assert (error["retriable"], error["policy_label"]) == (True, "shutdown"), error
    alice.close()
    assert service.wait(10) == 0
    service.check_log()
    engine.wait_running(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_grace_and_no_stream_without_its_last_frame(
    processes: Processes, number: signal.Signals
) -> None:
    service, engine = serve(processes, grace_s=60, expected=["task_ended"])
    engine.command(set={"hold": True})
    alice = Caller(service, ALICE)
    task = alice.accept(model_ref="fake")["task_id"]
    with alice.follow(task) as stream:
        engine.wait_running(1)
        service.signal(number)
        service.announcement("shutdown_requested")
        service.signal(number)
        frames = check_whole(stream.to_end())
    assert (frames[-1].event, frames[-1].data["policy_label"]) == ("error", "shutdown"), frames
    alice.close()
    assert service.wait(20) == 0
    service.check_log()


def test_idle_server_with_idle_connections_ends_at_once(processes: Processes) -> None:
    service, _ = serve(processes, grace_s=20)
    with service.client(ALICE) as http:
        assert http.get("/healthz").status_code == 200
        start = time.monotonic()
        service.signal()
        assert service.wait(10) == 0
        assert time.monotonic() - start < 5
    service.check_log()


def test_shutdown_under_load_loses_no_terminal_frame(processes: Processes) -> None:
    engine = processes.fake("fake", slots=4, token_interval_ms=5)
    service = processes.serve(
        make_config([make_pool(engine)], server={"shutdown_grace_s": 0.5}), expected=["task_ended"]
    )
    callers = [Caller(service, ALICE) for _ in range(12)]
    tasks = [caller.accept(model_ref="fake", max_tokens=400)["task_id"] for caller in callers]
    ends: list[str] = []

    def read(caller: Caller, task_id: str) -> None:
        with caller.follow(task_id) as stream:
            ends.append(check_whole(stream.to_end())[-1].event)

    readers = [threading.Thread(target=read, args=pair) for pair in zip(callers, tasks, strict=True)]
    for reader in readers:
        reader.start()
    with service.client(ALICE) as http:
        wait_for(lambda: len(http.get("/v1/tasks", params={"state": "running"}).json()["tasks"]) == 4, "4 run")
    wait_for(lambda: count_readers(service) >= 12, "everybody reads")
    service.signal()
    for reader in readers:
        reader.join(20)
    assert len(ends) == 12, ends
    for caller in callers:
        caller.close()
    assert service.wait(10) == 0
    service.check_log()


def count_readers(service: LlorchProcess) -> float:
    with service.client(ALICE) as http:
        lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("open_streams "))


def test_no_engine_process_outlives_the_server(processes: Processes, tmp_path: Path) -> None:
    """ORCH-3181, also when the server is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        service = processes.serve(None, name=f"demo-{number.name}", expected=["keyless", "cpu_demonstration"])
        children = psutil.Process(service.pid).children(recursive=True)
        assert children
        service.signal(number)
        service.wait(20)
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, alive
        assert gone


def test_port_in_use_is_one_readable_message(processes: Processes) -> None:
    """ORCH-3260."""
    service, engine = serve(processes, grace_s=1)
    second = LlorchProcess(
        processes.directory,
        make_config([make_pool(engine)]),
        name="second",
        environment={"LLORCH_SERVER__PORT": str(service.port)},
    )
    assert second.wait(30) != 0
    assert "Traceback" not in second.text
    assert str(service.port) in second.text
    with httpx.Client(base_url=service.url) as http:
        assert http.get("/healthz").status_code == 200
    service.stop()
