"""Starts that cannot be, and starts that fail again and again: one clear message each, and little cost.

ORCH-3003, ORCH-3037, ORCH-3042, ORCH-3300, OC-POOL-3010, OC-POOL-3011.
"""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Processes
from tests.support.engines import TINY_MODEL
from tests.support.managed import QUICK, WARNINGS, Operator, fake, genuine_pool, pool, tiny
from tests.support.process_table import assert_none_left, cpu_time_of, engine_processes
from tests.support.service import LlorchProcess, make_config

STEP_S = 4.8
"""The longest wait between two starts of PATIENT, jitter included."""

STARTUP_S = 15.0
"""For three engines to load at once on a busy machine, and their self-tests."""

PATIENT = {**QUICK, "backoff_first_s": 2.0, "backoff_max_s": 4.0}


def test_start_that_cannot_be_is_told_once_each_time_and_made_when_its_cause_is_gone(processes: Processes) -> None:
    """Bar 5, ORCH-3300: in the log, in health and in `llorch pools`."""
    directory = processes.directory
    cut, later = directory / "cut.gguf", directory / "later.gguf"
    cut.write_bytes(TINY_MODEL.read_bytes()[:1_000_000])
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    digest = {"model_digest": f"sha256:{'0' * 64}"}
    faults: dict[str, tuple[str, str, str]] = {
        "corrupt": ("model", "POOL_UNAVAILABLE", "cut.gguf is cut off or corrupt"),
        "absent": ("model", "POOL_UNAVAILABLE", "later.gguf"),
        "digest": ("digest", "UNTRUSTED_ARTIFACT", ": put the right file there"),
        "port": ("port", "POOL_UNAVAILABLE", f"Port {port} of pool port is taken"),
        "binary": ("binary", "POOL_UNAVAILABLE", "no-such-engine"),
        "memory": ("headroom", "POOL_UNAVAILABLE", "are free: free memory, lower ctx or slots"),
        "device": ("gpu", "POOL_UNAVAILABLE", "is not on this host"),
    }
    pools = [
        genuine_pool("corrupt", tiny(), model="corrupt", model_path=str(cut), supervision=PATIENT),
        genuine_pool("absent", tiny(), model="absent", model_path=str(later), supervision=PATIENT),
        genuine_pool("digest", tiny(), model="digest", supervision=PATIENT, **digest),
        genuine_pool("port", tiny(port=port), model="port", supervision=PATIENT),
        genuine_pool(
            "binary", tiny(launcher="llama-server", binary="no-such-engine"), model="binary", supervision=PATIENT
        ),
        genuine_pool("memory", tiny(), model="memory", headroom={"ram_mib": 10_000_000}, supervision=PATIENT),
        genuine_pool("device", {**tiny(), "devices": [0]}, model="device", allow_cpu=False, supervision=PATIENT),
        pool("sound", fake()),
    ]
    service = processes.serve(make_config(pools), expected=WARNINGS)
    operator = Operator(service)
    for name, (cause, code, words) in faults.items():
        operator.wait(f"{name}/0", lambda found: found["process"]["restarts"] >= 1, "refused")
        found = operator.replica(f"{name}/0")
        assert (found["process"]["cause"], found["last_error"]["code"]) == (cause, code), found
        assert words in found["last_error"]["message"], found
        assert found["process"]["incarnation"] == 0, "nothing was started"
        assert 0 <= found["process"]["next_start_ms"] <= 4800
    shown = operator.command("pools")
    for name, (cause, code, words) in faults.items():
        told = [line for line in shown.splitlines() if line.startswith(f"{name}/0: {code} ({cause})")]
        assert len(told) == 1, shown
        assert words in shown.replace("\n", " ")
    check_log(service, faults)

    taken.close()
    later.write_bytes(TINY_MODEL.read_bytes())
    began = time.monotonic()
    cut.write_bytes(TINY_MODEL.read_bytes())
    for name in ("port", "absent", "corrupt"):
        operator.wait(f"{name}/0", lambda found: found["state"] == "ready", "Ready, as its cause is gone", 30)
    assert time.monotonic() - began < STEP_S + STARTUP_S
    print(f"three causes gone: Ready {time.monotonic() - began:.1f} s later")  # noqa: T201 (`pytest -s`)
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


def check_log(service: LlorchProcess, faults: dict[str, tuple[str, str, str]]) -> None:
    """One warning for each refusal, with cause and message, and nothing else of it."""
    for name, (cause, _, words) in faults.items():
        lines = [line for line in service.lines() if line.get("pool_id") == name and line["level"] == "warning"]
        refused = [line for line in lines if line["event"] == "engine_refused"]
        assert refused, name
        assert all(line["cause"] == cause and words in line["error"] for line in refused), refused
        assert [line["restarts"] for line in refused] == list(range(1, len(refused) + 1)), "one for each failure"
        assert {line["event"] for line in lines} <= {"engine_refused", "breaker_opened", "replica_changed"}, lines


def crashing(file: Path, supervision: dict[str, Any]) -> dict[str, Any]:
    """A pool whose engine ends at once as long as the file is there."""
    replica = fake(crash_file=file, crash_after_s=0, exit_code=3, last_words="no luck today")
    return pool("unlucky", replica, supervision=supervision)


def test_crash_loop_costs_little_and_ends_within_one_step_of_its_cause(processes: Processes) -> None:
    """Bar 3, a twentieth of the time: at most 6 starts in 15 s."""
    scaled = {
        "backoff_first_s": 1 / 20,
        "backoff_factor": 4,
        "backoff_max_s": 3,
        "storm_failures": 4,
        "cool_down_s": 6,
        "stable_s": 3,
    }
    starts, share, recovered_s, step_s = crash_loop(processes, scaled, quiet_s=15.0)
    assert starts <= 6, starts
    assert recovered_s <= step_s + 5, (recovered_s, step_s)
    print(f"crash loop, scaled: {starts} starts in 15 s, {share:.2%} of a core, recovered after {recovered_s:.1f} s")  # noqa: T201


@pytest.mark.chaos
def test_crash_loop_with_the_default_supervision(processes: Processes) -> None:
    """Bar 3: at most 6 starts in 5 minutes, less than 1 % of a core in between."""
    starts, share, recovered_s, step_s = crash_loop(processes, {}, quiet_s=300.0)
    print(f"crash loop: {starts} starts in 300 s, {share:.2%} of a core, recovered after {recovered_s:.1f} s")  # noqa: T201
    assert starts <= 6, starts
    assert share < 0.01, share
    assert recovered_s <= step_s + 5, (recovered_s, step_s)


def crash_loop(processes: Processes, supervision: dict[str, Any], *, quiet_s: float) -> tuple[int, float, float, float]:
    """(starts, part of a core that llorch used, seconds until it was Ready once the cause was gone, one step)."""
    file = processes.directory / "crash"
    file.touch()
    service = processes.serve(make_config([crashing(file, supervision)]), replicas=0, expected=WARNINGS)
    operator = Operator(service)
    operator.wait("unlucky/0", lambda found: found["process"]["restarts"] >= 1, "has failed")
    error = operator.replica("unlucky/0")["last_error"]
    assert "status 3" in error["message"], error
    assert "no luck today" in error["message"], error
    began, cpu_s = time.monotonic(), cpu_time_of(service.pid)
    while (left_s := began + quiet_s - time.monotonic()) > 0:
        time.sleep(min(1.0, left_s))  # nothing is waited for: this is the time that is measured
    share = (cpu_time_of(service.pid) - cpu_s) / quiet_s
    process = operator.replica("unlucky/0")["process"]
    lines = [line for line in service.lines() if line["event"] == "engine_ended"]
    assert len(lines) == process["restarts"], "each end is told once"
    file.unlink()
    gone_at, step_s = time.monotonic(), process["next_start_ms"] / 1000 if process["next_start_ms"] else 0.0
    operator.wait("unlucky/0", lambda found: found["state"] == "ready", "Ready again", step_s + 30)
    recovered_s = time.monotonic() - gone_at
    assert len(engine_processes(service.pid)) == 1
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)
    return process["incarnation"], share, recovered_s, step_s
