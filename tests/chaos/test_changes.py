"""Drain, reload and reload of the configuration under load: no running task is ended by them, no admission refused.

ORCH-2101, ORCH-2102, ORCH-2106, ORCH-3031, ORCH-3251, ORCH-3252.
"""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Processes
from tests.support.load import KEEPING, Load, StreamSet, Want, fake_answer
from tests.support.managed import WARNINGS, Operator, fake, genuine_pool, pool, rewrite, tiny
from tests.support.process_table import assert_none_left, engine_processes
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config

WANTS = [Want("fake", max_tokens=(4, 40), share=3), Want("fake", priority="batch", max_tokens=(20, 60))]
CHANGES = (*WARNINGS, "pool_change", "config_reload", "config_reload_refused")


def config(*pools: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return make_config(pools, streams=KEEPING, **sections)


PAIR = pool("pair", fake(4, token_interval_ms=10), fake(4, token_interval_ms=10))
SIDE = pool("side", fake(4, token_interval_ms=10))


@pytest.fixture
def operator(processes: Processes) -> Iterator[Operator]:
    """A pool of two and one of one, on one route."""
    service = processes.serve(config(PAIR, SIDE), replicas=3, expected=CHANGES)
    operator = Operator(service)
    yield operator
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


def loaded(service: LlorchProcess) -> Load:
    """Nothing may fail, nothing may be refused."""
    return Load(service.url, WANTS, clients=10, oracle=fake_answer)


def test_peer_bug_29_rolling_reload_under_20_streams_ends_none_and_refuses_nothing(operator: Operator) -> None:
    """FAULT-29, bar 2."""
    want = Want("fake", max_tokens=(30, 120))
    with StreamSet(operator.service.url, want, 20, oracle=fake_answer) as streams:
        before = {each.pid for each in engine_processes(operator.service.pid)}
        operator.post("/v1/pools/pair/reload", {})
        change = operator.wait_change("pair")
        assert (change["state"], change["replicas_done"], change["moved"]) == ("done", 2, 0), change
        assert 0 < change["ready_ms"] < 20_000
        assert sorted(operator.replicas("pair")) == ["pair/0+", "pair/1+"]
        streams.wait_succeeded(20)
        report = streams.stop()
    after = {each.pid for each in engine_processes(operator.service.pid)}
    assert len(after - before) == 2
    assert len(after) == 3
    assert set(report.outcomes) == {"succeeded"}
    assert not report.refused
    print(f"rolling reload of two under 20 streams: ready after {change['ready_ms']} ms, {report.accepted} tasks")  # noqa: T201 (`pytest -s`)


def test_peer_bug_29_drain_moves_what_outlasts_it_and_reload_brings_the_pool_back(operator: Operator) -> None:
    """FAULT-29: every token comes once, on whichever replica."""
    with loaded(operator.service) as load:
        load.wait_succeeded(5)
        said = operator.command("drain", "pair", "--deadline-s", "0")
        assert "drain done" in said
        assert operator.health("pair")["change"]["moved"] > 0
        assert {each["state"] for each in operator.replicas("pair").values()} == {"stopped"}
        assert len(engine_processes(operator.service.pid)) == 1
        load.wait_succeeded(10)
        operator.command("reload", "pair")
        load.wait_succeeded(10)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}
    assert {each["state"] for each in operator.replicas("pair").values()} == {"ready"}


def test_peer_bug_29_configuration_changes_as_one_under_load(operator: Operator, processes: Processes) -> None:
    """FAULT-29: what changed is replaced, what is new comes up, what is gone is drained, and back again."""
    service, directory = operator.service, processes.directory
    untouched = operator.engine("side/0").pid
    changed = pool("pair", fake(4, token_interval_ms=9), fake(4, token_interval_ms=10))
    with loaded(service) as load:
        load.wait_succeeded(5)
        rewrite(service, directory, config(changed, SIDE, pool("new", fake(2), model="new")))
        service.signal(signal.SIGHUP)
        wait_for(lambda: operator.get("/v1/config")["revision"] == 2, "the file is in force", 60)
        assert sorted(operator.replicas("pair")) == ["pair/0+", "pair/1"]
        assert operator.replica("new/0")["state"] == "ready"
        assert operator.engine("side/0").pid == untouched

        rewrite(service, directory, {**config(changed, SIDE), "pols": []})
        said = operator.command("reload", "--config", status=2)
        assert "pols" in said
        assert "pools" in said, "the nearest name"
        rewrite(service, directory, config(changed, SIDE, server={"shutdown_grace_s": 5}))
        assert "server.shutdown_grace_s" in operator.command("reload", "--config", status=2)

        failing = pool("pair", fake(4, token_interval_ms=8), fake(4, crash_after_s=0, exit_code=3))
        rewrite(service, directory, config(failing, SIDE))
        said = operator.command("reload", "--config", status=1)
        assert "rolled back" in said
        assert sorted(operator.replicas("pair")) == ["pair/0+", "pair/1"], "as before"
        assert operator.get("/v1/config")["revision"] == 2

        operator.command("reload", "--revert")
        assert sorted(operator.replicas("pair")) == ["pair/0", "pair/1"]
        assert [each["id"] for each in operator.get("/v1/pools")["pools"]] == ["pair", "side"]
        load.wait_succeeded(10)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}
    assert not report.refused
    assert len(engine_processes(service.pid)) == 3


def test_reload_of_a_pool_without_room_for_two_drains_first_and_keeps_what_waits(processes: Processes) -> None:
    """ORCH-2102: a fixed port lets only one process of the replica live."""
    from tests.support.processes import free_port

    only = pool("only", fake(2, token_interval_ms=5, managed={"port": free_port()}))
    service = processes.serve(config(only), expected=CHANGES)
    operator = Operator(service)
    with Load(service.url, WANTS, clients=5, oracle=fake_answer) as load:
        load.wait_succeeded(5)
        first = operator.engine("only/0").pid
        operator.command("reload", "only")
        assert operator.engine("only/0").pid != first
        load.wait_succeeded(5)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


@pytest.mark.chaos
def test_peer_bug_29_rolling_reload_of_genuine_engines_under_20_streams(processes: Processes) -> None:
    """Bar 2 with llama.cpp."""
    pair = genuine_pool("pair", tiny(8), tiny(8), supervision={})
    service = processes.serve(config(pair), replicas=2, expected=CHANGES)
    operator = Operator(service)
    want = Want("tiny", max_tokens=(100, 300), prompts=["Once upon a time"])
    with StreamSet(service.url, want, 20) as streams:
        operator.post("/v1/pools/pair/reload", {})
        change = operator.wait_change("pair", 120)
        assert change["state"] == "done", change
        streams.wait_succeeded(20, 60)
        report = streams.stop()
    assert set(report.outcomes) == {"succeeded"}
    assert not report.refused
    print(f"rolling reload of two llama.cpp under 20 streams: ready after {change['ready_ms']} ms")  # noqa: T201
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)
