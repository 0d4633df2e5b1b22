"""The service itself killed, ended, and without a single engine: nothing is left behind, nothing grows, nothing is cut.

ORCH-3303, ORCH-3267, ORCH-3114, ORCH-3151, ORCH-3005.
"""

import signal
import sys
import threading
import time

import httpx
import psutil

from tests.conftest import Processes
from tests.support.identities import ALICE
from tests.support.load import KEEPING, Load, Want, fake_answer
from tests.support.managed import WARNINGS, Operator, fake, pool
from tests.support.process_table import assert_none_left, engine_processes, is_gone, wait_gone
from tests.support.processes import NO_TLS, wait_for
from tests.support.service import LlorchProcess, make_config

WRAPPER = """
import subprocess, sys, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(subprocess.call(sys.argv[1:]))
"""
"""An engine whose server is a child of what llorch starts, and so does not die with llorch by itself."""


def wrapped() -> dict[str, object]:
    replica = fake(2, token_interval_ms=5)
    command = replica["managed"]["command"]
    replica["managed"]["command"] = [sys.executable, "-c", WRAPPER, *command]
    return replica


def test_engines_of_a_killed_server_are_ended_and_those_of_a_living_one_never(processes: Processes) -> None:
    config = make_config([pool("plain", fake()), pool("wrapped", wrapped(), model="wrapped")], streams=KEEPING)
    first = processes.serve(config, replicas=2, expected=WARNINGS)
    engines = engine_processes(first.pid)
    assert len(engines) == 3, engines

    # A second one by mistake, with the same file and the same port.
    second = LlorchProcess(
        processes.directory,
        config,
        log_name="second",
        expected=WARNINGS,
        environment={"LLORCH_SERVER__PORT": str(first.port)},
    )
    assert second.wait(60) != 0
    assert "Traceback" not in second.text
    assert_none_left(second.pid, within_s=5)
    assert not any(map(is_gone, engines)), "the living one's engines are its own"

    first.signal(signal.SIGKILL)
    first.wait(10)
    wait_for(lambda: len(engine_processes(first.pid)) < 3, "what the kernel ends has ended")
    third = processes.serve(config, replicas=2, log_name="third", expected=(*WARNINGS, "orphans_ended"))
    wait_gone(engines, 5)
    assert_none_left(first.pid)
    ended = [line for line in third.lines() if line["event"] == "orphans_ended"]
    assert len(ended) == 1, "the child that outlived its parent was found"
    assert len(engine_processes(third.pid)) == 3
    third.stop()
    assert_none_left(third.pid, within_s=5)


def test_peer_bug_28_sigterm_under_load_finishes_streams_refuses_new_ones_and_ends_engines_last(
    processes: Processes,
) -> None:
    """FAULT-28, ORCH-3114, ORCH-3267."""
    config = make_config(
        [pool("only", fake(8, token_interval_ms=20))], streams=KEEPING, server={"shutdown_grace_s": 15}
    )
    service = processes.serve(config, expected=WARNINGS)
    engines = engine_processes(service.pid)
    bodies = [{"model_ref": "fake", "prompt": f"p {n} <out:60>", "max_tokens": 60, "seed": n} for n in range(8)]
    ends: list[str] = []

    def follow(task_id: str) -> None:
        with httpx.Client(base_url=service.url, headers=ALICE.headers, verify=NO_TLS, timeout=60) as http:
            text = http.get(f"/v1/tasks/{task_id}/stream").text
        ends.append(text)

    with service.client(ALICE) as http:
        tasks = [http.post("/v1/tasks", json=body).json()["task_id"] for body in bodies]
        readers = [threading.Thread(target=follow, args=(task_id,)) for task_id in tasks]
        for reader in readers:
            reader.start()
        wait_for(lambda: len(http.get("/v1/tasks", params={"state": "running"}).json()["tasks"]) == 8, "8 run")
        service.signal(signal.SIGTERM)
        service.announcement("shutdown_requested")
        refused = http.post("/v1/tasks", json=bodies[0])
        assert (refused.status_code, refused.json()["policy_label"]) == (503, "shutdown"), refused.text
        assert 1 <= int(refused.headers["Retry-After"]) <= 24, refused.headers
        assert not any(map(is_gone, engines))
    for reader in readers:
        reader.join(30)
    assert service.wait(30) == 0
    assert len(ends) == 8
    for text in ends:
        assert text.count("event: token\n") == 60
        assert text.rstrip().splitlines()[-2] == "event: end", text[-300:]
    service.check_log()
    wait_gone(engines, 1)
    assert_none_left(service.pid)


def test_peer_bug_16_memory_stays_bounded_while_no_engine_answers(processes: Processes) -> None:
    """FAULT-16: the queue's bound holds, and what is refused leaves nothing."""
    file = processes.directory / "crash"
    file.touch()
    dead = pool("dead", fake(crash_file=file, crash_after_s=0, exit_code=1), queue={"capacity": 20})
    service = processes.serve(make_config([dead], streams=KEEPING), replicas=0, expected=WARNINGS)
    memory = psutil.Process(service.pid).memory_info
    body = {"model_ref": "fake", "prompt": "x" * 10_000, "max_tokens": 5}
    statuses: dict[int, int] = {}
    with service.client(ALICE) as http:
        before = 0
        until = time.monotonic() + 6
        while time.monotonic() < until:
            status = http.post("/v1/tasks", json=body).status_code
            statuses[status] = statuses.get(status, 0) + 1
            if sum(statuses.values()) == 200:
                before = memory().rss
        grown = memory().rss - before
        assert set(statuses) == {202, 429}, statuses
        assert statuses[202] == 20
        assert statuses[429] > 500, statuses
        assert grown < 8 * 1024 * 1024, f"{grown} bytes for {statuses}"
        file.unlink()
        wait_for(lambda: not http.get("/v1/tasks", params={"state": "queued"}).json()["tasks"], "served at last", 60)
    service.stop()
    assert_none_left(service.pid, within_s=5)


def test_peer_bug_18_engine_whose_metrics_fail_is_served_by_own_counts(processes: Processes) -> None:
    """FAULT-18, ORCH-3151."""
    config = make_config([pool("mute", fake(2, token_interval_ms=2))], streams=KEEPING)
    service = processes.serve(config, expected=WARNINGS)
    operator = Operator(service)
    with Load(service.url, [Want("fake", max_tokens=(4, 10))], clients=4, oracle=fake_answer) as load:
        load.wait_succeeded(5)
        operator.set_faults("mute/0", slots_status=500)
        began = time.monotonic()
        while time.monotonic() < began + 6:  # longer than a report of the engine is believed
            load.wait_succeeded(5)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}
    assert report.longest_gap_s < 3, report
    assert operator.replica("mute/0")["state"] == "ready"
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)
