"""ORCH-3283, ORCH-2003, ORCH-2012, ORCH-2013, ORCH-2033: random interleavings of many clients leave nothing behind."""

import asyncio
from collections import Counter

import httpx
import pytest

from tests.conftest import Processes
from tests.support.chaos import FINAL, ChaosClient, audit
from tests.support.engines import FakeEngineProcess
from tests.support.identities import ALICE, BOB, WATCHER
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config, make_pool

CLIENTS = 24
GRACE_S = 0.1
SETTLE_S = 60.0

STREAMS = {"disconnect_grace_s": GRACE_S, "heartbeat_s": 0.5, "transcript_ttl_s": 3600, "records_per_tenant": 100_000}


def serve(processes: Processes) -> tuple[LlorchProcess, list[FakeEngineProcess]]:
    """Two routes: one with seven slots on two replicas, one of which lets go slowly; one with two slots."""
    quick = processes.fake("wide", slots=4, token_interval_ms=15)
    slow = processes.fake("wide", slots=3, token_interval_ms=15)
    slow.command(set={"slow_abort_s": 0.05})
    narrow = processes.fake("narrow", slots=2, token_interval_ms=10)
    pools = [make_pool(quick, slow, queue={"capacity": 16}), make_pool(narrow, queue={"capacity": 8})]
    config = make_config(pools, streams=STREAMS, sessions={"turns": 8})
    warnings = ["task_ended", "task_requeued", "attempt_ended", "replica_changed"]
    return processes.serve(config, replicas=3, expected=warnings), [quick, slow, narrow]


async def break_engines(engines: list[FakeEngineProcess], clients: "asyncio.Future[list[None]]") -> int:
    """Time and again an engine breaks off a few generations, before or after their first token. How often."""
    count = 0
    while not clients.done():
        engine = engines[count % len(engines)]
        slow = {"slow_abort_s": 0.05} if engine is engines[1] else {}
        fault = {"close_after": (0, 1, 3)[count % 3], "times": 2, **slow}
        await asyncio.to_thread(engine.command, set=fault)
        count += 1
        await asyncio.wait([clients], timeout=0.25)
    return count


async def run_chaos(service: LlorchProcess, engines: list[FakeEngineProcess], interleavings: int) -> Counter[str]:
    people = [ALICE, BOB]
    clients = [
        ChaosClient(service.url, people[number % 2], ["wide", "wide", "narrow"], seed=number)
        for number in range(CLIENTS)
    ]
    everybody = asyncio.gather(*(client.live(-(-interleavings // CLIENTS)) for client in clients))
    breaks, _ = await asyncio.gather(break_engines(engines, everybody), everybody)
    assert breaks > 0
    for who in people:
        await asyncio.to_thread(wait_all_final, service, who)
    outcomes: Counter[str] = Counter()
    for client in clients:
        outcomes += await audit(client)
    assert sum(outcomes.values()) == sum(len(client.books) for client in clients)
    check_variety(outcomes, clients)
    return outcomes


def wait_all_final(service: LlorchProcess, who: object) -> None:
    """No task is left queued or running: those that nobody follows any more end by themselves."""

    def look() -> bool:
        with service.client(who) as http:  # type: ignore[arg-type]
            states = [http.get("/v1/tasks", params={"state": state}).json()["tasks"] for state in ("queued", "running")]
        return states == [[], []]

    wait_for(look, f"every task is one of {FINAL}", SETTLE_S, every_s=0.1)


def check_variety(outcomes: Counter[str], clients: list[ChaosClient]) -> None:
    """FAULT-23: a run in which everything was refused, or everything ended in one way, would prove nothing."""
    accepted = sum(outcomes.values())
    refused = sum((client.refused for client in clients), Counter[str]())
    assert accepted > 4 * sum(refused.values()) / 5, (outcomes, refused)
    assert outcomes["succeeded"] > accepted / 5, outcomes
    assert outcomes["CANCELED"] > accepted / 10, outcomes
    assert outcomes["WORKER_RESET"] > 0, outcomes
    statuses = sum((client.statuses for client in clients), Counter[tuple[str, int]]())
    for step in (("POST cancel", 204), ("GET stream", 200), ("DELETE sessions", 204)):
        assert statuses[step] > 0, (step, statuses)


def check_nothing_left(service: LlorchProcess, engines: list[FakeEngineProcess]) -> None:
    """No lease, no busy slot, no waiting task, no reader: at llorch and by the engines' own record."""
    with service.client(WATCHER) as http:
        wait_for(lambda: count_busy(http) == 0, "no slot is leased", SETTLE_S)
        for replica_set in http.get("/v1/replica-sets").json()["replica_sets"]:
            assert replica_set["load"]["slots_busy"] == replica_set["load"]["queued"] == 0, replica_set
        metrics = http.get("/metrics").text
    for family in ("open_streams", "slots_busy", "queue_depth"):
        samples = [line for line in metrics.splitlines() if line.startswith((f"{family} ", f"{family}{{"))]
        assert samples
        assert all(line.endswith(" 0.0") for line in samples), samples
    for engine in engines:
        report = engine.report()
        assert report["running"] == report["queued"] == 0, report
        assert report["max_running"] <= engine.slots, report


def count_busy(http: httpx.Client) -> int:
    pools = [http.get(f"/v1/pools/{pool}/health").json() for pool in ("wide", "narrow")]
    return sum(replica["slots_busy"] for pool in pools for replica in pool["replicas"])


@pytest.mark.parametrize("interleavings", [500, pytest.param(10_000, marks=pytest.mark.prove)])
async def test_peer_bug_05_random_interleavings_leave_every_slot_free(processes: Processes, interleavings: int) -> None:
    service, engines = serve(processes)
    outcomes = await run_chaos(service, engines, interleavings)
    check_nothing_left(service, engines)
    print(f"{interleavings} interleavings: {dict(outcomes)}")  # noqa: T201 (shown by `pytest -s`)
    service.stop()
