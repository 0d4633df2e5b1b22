"""Faults of other systems, looked for in a live server: `.plan/spec/faults.md` has the rules."""

import asyncio
import statistics
import time
from collections.abc import Iterator

import pytest

from llorch.testing.fake_dialects import make_tokens
from tests.conftest import Processes
from tests.support.chaos import ChaosClient
from tests.support.driver import Caller, accepted
from tests.support.engines import FakeEngineProcess
from tests.support.identities import ALICE, BOB
from tests.support.processes import wait_for
from tests.support.raw_http import exchange, request
from tests.support.service import LlorchProcess, make_config, make_pool
from tests.support.wire import check_whole

HEARTBEAT_S = 0.3
TRANSCRIPT_S = 0.5


class Bench:
    """A server with the routes `busy` (one slot, room for one) and `idle` (two slots), and two people."""

    def __init__(self, processes: Processes) -> None:
        self.busy = processes.fake("busy")
        self.idle = processes.fake("idle", slots=2, ctx=200_000)
        pools = [make_pool(self.busy, queue={"capacity": 1}), make_pool(self.idle, ctx=200_000)]
        config = make_config(
            pools,
            streams={"heartbeat_s": HEARTBEAT_S, "transcript_ttl_s": TRANSCRIPT_S},
            server={"limits": {"body_bytes": 4_194_304, "prompt_chars": 2_000_000}},
        )
        self.service: LlorchProcess = processes.serve(config, replicas=2)
        self.alice = Caller(self.service, ALICE)
        self.bob = Caller(self.service, BOB)

    def tidy(self) -> None:
        for engine in (self.busy, self.idle):
            engine.command(release=1_000_000)
            engine.command(reset=True)
        for caller in (self.alice, self.bob):
            for state in ("queued", "running"):
                for task in caller.http.get("/v1/tasks", params={"state": state}).json()["tasks"]:
                    assert caller.cancel(task["task_id"]).status_code == 204
        for engine in (self.busy, self.idle):
            engine.wait_running(0)

    def end(self) -> None:
        self.alice.close()
        self.bob.close()
        self.service.stop()


@pytest.fixture(scope="module")
def module_bench(module_processes: Processes) -> Iterator[Bench]:
    bench = Bench(module_processes)
    yield bench
    bench.end()


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    yield module_bench
    module_bench.tidy()


def hold(engine: FakeEngineProcess) -> None:
    engine.command(set={"hold": True})


def test_peer_bug_12_idle_route_does_not_hide_a_full_one(bench: Bench) -> None:
    hold(bench.busy)
    bench.alice.accept(model_ref="busy")
    bench.alice.accept(model_ref="busy")
    refused = bench.alice.submit({"model_ref": "busy"})
    assert (refused.status_code, refused.json()["code"]) == (429, "ADMISSION_REJECT")
    assert bench.alice.accept(model_ref="idle")["state"] == "running"


def test_peer_bug_13_first_token_is_not_held_for_a_tick(bench: Bench) -> None:
    """The engine answers at once, so what passes until the first token is llorch's own time, HTTP included."""
    taken_ms = []
    for _ in range(30):
        task = bench.alice.accept(model_ref="idle", max_tokens=1)
        frames = bench.alice.read(task["task_id"])
        taken_ms.append(frames[-1].data["first_token_ms"])
    assert statistics.median(taken_ms) <= 25, taken_ms


def test_peer_bug_13_token_reaches_the_reader_when_the_engine_sends_it(bench: Bench) -> None:
    hold(bench.idle)
    task = bench.alice.accept(model_ref="idle", max_tokens=40)
    taken_ms = []
    with bench.alice.follow(task["task_id"]) as stream:
        bench.idle.wait_running(1)
        for _ in range(40):
            start = time.perf_counter()
            bench.idle.release(1)
            stream.until("token")
            taken_ms.append((time.perf_counter() - start) * 1000)
        check_whole(stream.to_end())
    assert statistics.median(taken_ms) <= 50, taken_ms


async def test_peer_bug_14_long_prompts_do_not_hold_the_event_loop(bench: Bench) -> None:
    """Prompts of 600 KB, counted by the engine, while /healthz is asked all the time."""
    url = bench.service.url
    body = {"model_ref": "idle", "prompt": "word " * 120_000, "max_tokens": 1}
    waits_ms: list[float] = []

    async def ask() -> None:
        start = time.perf_counter()
        response = await request(url, "GET", "/healthz", {})
        assert response.status_code == 200
        waits_ms.append((time.perf_counter() - start) * 1000)

    async def submit() -> int:
        return (await request(url, "POST", "/v1/tasks", ALICE.headers, body)).status_code

    for _ in range(20):
        await ask()
    quiet_ms, waits_ms = statistics.median(waits_ms), []
    submits = asyncio.gather(*(submit() for _ in range(10)))
    while not submits.done():
        await ask()
    assert set(await submits) == {202}
    assert len(waits_ms) > 5, waits_ms
    assert max(waits_ms) <= 500, (quiet_ms, waits_ms)
    assert statistics.median(waits_ms) <= 100, (quiet_ms, waits_ms)


def test_peer_bug_15_transcripts_expire_also_after_a_pause(bench: Bench) -> None:
    """The first transcript has expired, only its record is left to expire; the second one's time is none the later."""
    for _ in range(2):
        task = bench.alice.accept(model_ref="idle")
        bench.alice.read(task["task_id"])
        path = f"/v1/tasks/{task['task_id']}/stream"
        wait_for(lambda path=path: bench.alice.http.get(path).status_code == 410, "the transcript expired", 5)  # type: ignore[misc]


async def test_peer_bug_21_resume_that_breaks_before_its_first_frame_keeps_the_position(bench: Bench) -> None:
    hold(bench.idle)
    body = {"model_ref": "idle", "prompt": "a", "max_tokens": 6, "seed": 1, "on_disconnect": "continue"}
    task_id = accepted(await request(bench.service.url, "POST", "/v1/tasks", ALICE.headers, body))["task_id"]
    path = f"/v1/tasks/{task_id}/stream"
    bench.idle.wait_running(1)
    bench.idle.release(3)
    bench.alice.wait_state(task_id, "running")
    for _ in range(5):
        async with exchange(bench.service.url, "GET", path, {**ALICE.headers, "Last-Event-ID": "1"}) as response:
            assert response.status == 200
    bench.idle.release(10)
    frames = bench.alice.read(task_id, after=1)
    assert [frame.data["t"] for frame in frames[:-1]] == make_tokens("a", 1, 6)


def test_peer_bug_22_transcript_is_served_to_its_owner_only(bench: Bench) -> None:
    task = bench.alice.accept(model_ref="idle")["task_id"]
    frames = bench.alice.read(task)
    for after in (None, *range(len(frames) + 2)):
        with bench.bob.follow(task, after) as stream:
            assert (stream.response.status_code, stream.response.json()["code"]) == (404, "NOT_FOUND")


async def test_peer_bug_23_load_client_fails_when_the_answers_are_errors(bench: Bench) -> None:
    """The client of the random histories looks at every status: a server that refuses everything does not pass."""
    client = ChaosClient(bench.service.url, ALICE, ["nobody"], seed=1)
    with pytest.raises(AssertionError, match="404"):
        await client.live(1)


def test_peer_bug_27_queued_stream_gets_heartbeats(bench: Bench) -> None:
    hold(bench.busy)
    bench.alice.accept(model_ref="busy")
    queued = bench.alice.accept(model_ref="busy")
    with bench.alice.follow(queued["task_id"]) as stream:
        stream.until("queued")
        for _ in range(4):
            start = time.monotonic()
            stream.until("hb")
            assert time.monotonic() - start <= 4 * HEARTBEAT_S
    assert bench.alice.look(queued["task_id"])["state"] == "queued"
