"""ORCH-3282: a thousand open streams in one process are whole, cost little memory, and give it back."""

import asyncio
import resource
from dataclasses import dataclass
from typing import Self

import psutil
import pytest

from tests.conftest import Processes
from tests.support.engines import FakeEngineProcess
from tests.support.identities import ALICE
from tests.support.processes import wait_for
from tests.support.raw_http import exchange, request
from tests.support.service import LlorchProcess, make_config, make_pool
from tests.support.wire import FrameSplitter, check_response, check_whole, durable

TOKENS = 128
KIB_A_STREAM = 64
SECOND_ROUND = 0.1
"""What a second round may add, as a part of what the first one may cost."""
TRANSCRIPT_S = 5.0
READ_S = 180.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the most resident memory that the server had in it, in KiB."""

    streams: int
    resident_kib: float


async def stream_once(service: LlorchProcess, number: int, all_open: asyncio.Barrier) -> None:
    """Submit a task and read its stream to the end, which must be whole."""
    body = {"model_ref": "fake", "prompt": f"stream {number}", "max_tokens": TOKENS}
    submitted = check_response(await request(service.url, "POST", "/v1/tasks", ALICE.headers, body))
    assert submitted.status_code == 202, submitted.text
    path = f"/v1/tasks/{submitted.json()['task_id']}/stream"
    splitter = FrameSplitter()
    async with exchange(service.url, "GET", path, ALICE.headers) as response:
        assert response.status == 200
        await all_open.wait()
        chunks = [chunk async for chunk in response.chunks()]
    frames = check_whole(durable(splitter.feed(b"".join(chunks))))
    assert len(frames) == TOKENS + 2, f"{len(frames)} frames"
    assert frames[-1].event == "end", frames[-1]


async def run_round(service: LlorchProcess, engine: FakeEngineProcess, streams: int) -> Round:
    """Open all streams, then let the engine go until all are whole."""
    all_open = asyncio.Barrier(streams + 1)
    engine.command(set={"hold": True})
    async with asyncio.timeout(READ_S), Peak(service.pid) as peak, asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(stream_once(service, number, all_open))
        await all_open.wait()
        await asyncio.to_thread(engine.command, set={"hold": False})
        await asyncio.to_thread(release_evenly, engine)
    return Round(streams, peak.resident_kib)


class Peak:
    """Watches the resident memory of a process while it is entered."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._watch: asyncio.Task[None] | None = None
        self.resident_kib = 0.0

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._watch is not None
        self._watch.cancel()
        self._sample()

    async def _look(self) -> None:
        while True:
            self._sample()
            await asyncio.sleep(0.05)

    def _sample(self) -> None:
        self.resident_kib = max(self.resident_kib, self._process.memory_info().rss / 1024)


def release_evenly(engine: FakeEngineProcess) -> None:
    """All streams grow at the same time."""
    for _ in range(TOKENS // 8):
        engine.command(release=8)
    wait_for(lambda: engine.command(release=8)["running"] == 0, "every generation has ended", READ_S)


async def warm_up(service: LlorchProcess) -> None:
    barrier = asyncio.Barrier(2)
    for number in range(3):
        await asyncio.gather(stream_once(service, number, barrier), barrier.wait())


@pytest.mark.parametrize(
    "streams", [200, pytest.param(1000, marks=pytest.mark.prove)], ids=["200 streams", "1000 streams"]
)
async def test_streams_are_whole_and_memory_is_bounded(processes: Processes, streams: int) -> None:
    allow_open_files(4 * streams)
    engine = processes.fake(slots=streams)
    config = make_config([make_pool(engine)], streams={"transcript_ttl_s": TRANSCRIPT_S})
    service = processes.serve(config)
    await warm_up(service)
    resting_kib = psutil.Process(service.pid).memory_info().rss / 1024
    first = await run_round(service, engine, streams)
    await wait_transcripts_gone(service)
    second = await run_round(service, engine, streams)
    grown = first.resident_kib - resting_kib
    added = second.resident_kib - first.resident_kib
    print(f"{streams} streams: {grown / streams:.1f} KiB a stream, the second round {added / streams:.1f} KiB more")  # noqa: T201 (shown by `pytest -s`)
    assert grown <= KIB_A_STREAM * streams, f"{grown / streams:.1f} KiB a stream"
    assert added <= SECOND_ROUND * KIB_A_STREAM * streams, f"the second round added {added / streams:.1f} KiB a stream"
    service.stop()


async def wait_transcripts_gone(service: LlorchProcess) -> None:
    """Return when the transcript of the task that ended last has expired, and with it all of them."""
    tasks = []
    query = "limit=200"
    while query:
        page = (await request(service.url, "GET", f"/v1/tasks?{query}", ALICE.headers)).json()
        tasks += page["tasks"]
        query = f"limit=200&cursor={page['next_cursor']}" if page["next_cursor"] else ""
    last = max(tasks, key=lambda task: str(task["ended_at"]))
    path = f"/v1/tasks/{last['task_id']}/stream"
    async with asyncio.timeout(30):
        while (await request(service.url, "GET", path, ALICE.headers)).status_code != 410:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
