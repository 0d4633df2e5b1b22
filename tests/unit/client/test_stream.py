"""ORCH-2012, ORCH-2003: a client's stream over connections that break, and what it leaves behind when it stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from llorch.client import (
    Accepted,
    Affinity,
    ApiError,
    AsyncClient,
    End,
    ErrorEvent,
    Event,
    Metrics,
    ProtocolFault,
    Queued,
    Started,
    StreamLost,
    Timeouts,
    Token,
    Unreachable,
    WaitReason,
    known,
)
from llorch.client import patience as pacing
from tests.unit.client.scripted_server import (
    CANCEL,
    CANCELED,
    SILENCE,
    STREAM,
    TASK_ID,
    Reply,
    ScriptedServer,
    accepted,
    frame,
    problem,
    stream,
    transcript,
)

WHOLE = transcript("Hello", ", ", "wörld")
QUEUED = frame(None, "queued", {"queue_position": 1, "predicted_start_ms": None, "reason": "slots_busy"})


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "FIRST_BACKOFF_S", 0.002)
    monkeypatch.setattr(pacing, "LONGEST_BACKOFF_S", 0.01)


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, "llk_test", patience_s=2, resumes=3) as made:
        yield made


async def _read(client: AsyncClient, after: int = 0) -> list[Event]:
    async with aclosing(client.stream(TASK_ID, after)) as events:
        return [event async for event in events]


def _ids(events: list[Event]) -> list[int]:
    return [event.id for event in events if not isinstance(event, Queued) and hasattr(event, "id")]


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token))


async def test_every_event_comes_typed_and_in_order(server: ScriptedServer, client: AsyncClient) -> None:
    server.on("GET", STREAM, stream(b": hb\n\n", QUEUED, *WHOLE))
    events = await _read(client)
    assert [type(event) for event in events] == [Queued, Started, Token, Token, Token, End]
    assert _text(events) == "Hello, wörld"
    assert server.requests[0].headers["authorization"] == "Bearer llk_test"
    assert "last-event-id" not in server.requests[0].headers


async def test_advice_is_typed_and_what_is_left_out_is_unknown(server: ScriptedServer, client: AsyncClient) -> None:
    """ORCH-2011, ORCH-2047: also of a task that made room; what this client does not know yet is left out."""
    first, *rest = WHOLE
    waiting = frame(None, "queued", {"queue_position": 0, "predicted_start_ms": 40, "reason": "quota"})
    budgets = {"tokens": 90, "time_ms": None, "cost": 0.5}
    chance = frame(None, "metrics", {"queue_depth": 4, "on_time_probability": 0.93, "budgets": budgets, "new": 1})
    preempted = frame(None, "metrics", {"queue_depth": 1, "preempted": True, "resumable": True})
    goes_on = frame(None, "metrics", {"preempted": False, "affinity": "repin", "kv_warmth": False})
    server.on("GET", STREAM, stream(waiting, chance, first, rest[0], preempted, waiting, goes_on, *rest[1:]))
    events = await _read(client)
    assert [event.frame.reason for event in events if isinstance(event, Queued)] == [WaitReason.quota] * 2
    told, broken_off, resumed = [event.frame for event in events if isinstance(event, Metrics)]
    assert (known(told.queue_depth), known(told.on_time_probability), known(told.preempted)) == (4, 0.93, None)
    left = known(told.budgets)
    assert left is not None
    assert (left.tokens, left.time_ms, left.cost) == (90, None, 0.5)
    assert (known(broken_off.preempted), known(broken_off.resumable), known(broken_off.affinity)) == (True, True, None)
    assert (known(resumed.preempted), known(resumed.affinity)) == (False, Affinity.repin)
    assert known(resumed.kv_warmth) is False
    assert _text(events) == "Hello, wörld"


@pytest.mark.parametrize("cut", range(0, len(b"".join(WHOLE)), 7))
async def test_a_connection_that_drops_at_any_byte_costs_no_frame(
    server: ScriptedServer, client: AsyncClient, cut: int
) -> None:
    data = b"".join(WHOLE)
    complete = data[:cut].count(b"\n\n")
    server.on("GET", STREAM, stream(data[:cut], is_dropped=True), stream(*WHOLE[complete:]))
    events = await _read(client)
    assert _ids(events) == [1, 2, 3, 4, 5]
    assert _text(events) == "Hello, wörld"
    assert server.requests[1].headers.get("last-event-id", "0") == str(complete)


async def test_peer_bug_21_a_resume_that_drops_before_its_first_event_keeps_the_cursor(server: ScriptedServer) -> None:
    server.on(
        "GET", STREAM,
        stream(*WHOLE[:3], is_dropped=True), stream(is_dropped=True), SILENCE, stream(QUEUED, is_dropped=True),
        stream(*WHOLE[3:]),
    )  # fmt: skip
    async with AsyncClient(server.url, resumes=4) as client:
        assert _ids(await _read(client)) == [1, 2, 3, 4, 5]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "3", "3", "3", "3"]


async def test_a_stream_that_ends_in_good_order_but_without_a_terminal_frame_is_resumed(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2]), stream(*WHOLE[2:]))
    assert _ids(await _read(client)) == [1, 2, 3, 4, 5]


async def test_attempts_are_bounded_and_the_loss_tells_where_to_go_on(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], is_dropped=True), stream(is_dropped=True))
    with pytest.raises(StreamLost) as lost:
        await _read(client)
    assert (lost.value.task_id, lost.value.cursor) == (TASK_ID, 2)
    assert len(server.requests) == 1 + 3


async def test_progress_renews_the_attempts(server: ScriptedServer, client: AsyncClient) -> None:
    frames = transcript(*"abcdefgh")
    server.on("GET", STREAM, *(stream(one, is_dropped=True) for one in frames))
    assert _ids(await _read(client)) == list(range(1, 11))


async def test_a_gateway_in_trouble_between_resumes_is_a_broken_connection(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], is_dropped=True), Reply(502), stream(*WHOLE[2:]))
    assert _ids(await _read(client)) == [1, 2, 3, 4, 5]


async def test_silence_longer_than_the_idle_timeout_is_a_broken_connection(server: ScriptedServer) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True), stream(*WHOLE[2:]))
    async with AsyncClient(server.url, timeouts=Timeouts(idle_s=0.1)) as client:
        assert _ids(await _read(client)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", [2, 4])
async def test_a_frame_twice_or_a_frame_too_few_is_never_passed_on(
    server: ScriptedServer, client: AsyncClient, wrong: int
) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], frame(wrong, "token", {"t": "?", "i": 1})))
    seen = []
    with pytest.raises(ProtocolFault, match=f"'{wrong}' came where frame 3"):
        async with aclosing(client.stream(TASK_ID)) as events:
            seen = [event.id async for event in events if isinstance(event, Started | Token)]
    assert seen == []
    assert len(server.requests) == 1


async def test_a_durable_frame_without_an_id_is_a_fault(server: ScriptedServer, client: AsyncClient) -> None:
    server.on("GET", STREAM, stream(frame(None, "token", {"t": "?", "i": 0})))
    with pytest.raises(ProtocolFault, match="without an id"):
        await _read(client)


async def test_what_later_servers_add_is_left_out(server: ScriptedServer, client: AsyncClient) -> None:
    started = frame(1, "started", {
        "queue_position": 0, "predicted_start_ms": None, "waited_ms": 0, "pool_id": "p", "replica_id": "p/0",
        "kv_warmth": None, "novelty": 1,
    })  # fmt: skip
    server.on("GET", STREAM, stream(started, frame(None, "weather", {}), frame(2, "plan", {}), *transcript("a")[2:]))
    assert _ids(await _read(client)) == [1, 3]


async def test_resume_after_the_terminal_frame_is_empty(server: ScriptedServer, client: AsyncClient) -> None:
    server.on("GET", STREAM, Reply(204))
    assert await _read(client, after=5) == []
    assert server.requests[0].headers["last-event-id"] == "5"


async def test_nothing_more_without_a_terminal_frame_is_a_fault(server: ScriptedServer, client: AsyncClient) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], is_dropped=True), Reply(204))
    with pytest.raises(ProtocolFault, match="without a terminal frame"):
        await _read(client)


async def test_an_expired_transcript_is_told_and_not_asked_for_again(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("GET", STREAM, problem(410, "STREAM_GONE"))
    with pytest.raises(ApiError) as gone:
        await _read(client)
    assert (gone.value.status, gone.value.code) == (410, "STREAM_GONE")
    assert len(server.requests) == 1


async def test_a_failed_task_ends_in_an_event_and_not_in_an_exception(
    server: ScriptedServer, client: AsyncClient
) -> None:
    envelope = {
        "code": "DECODE_TIMEOUT", "message": "m", "engine": "llamacpp", "pool_id": "p", "retriable": True,
        "retry_after_ms": None, "policy_label": None, "details": None, "correlation_id": "c",
    }  # fmt: skip
    server.on("GET", STREAM, stream(WHOLE[0], frame(2, "error", envelope)))
    last = (await _read(client))[-1]
    assert isinstance(last, ErrorEvent)
    assert last.frame.code == "DECODE_TIMEOUT"


async def test_a_web_page_is_not_taken_for_a_stream(server: ScriptedServer, client: AsyncClient) -> None:
    server.on("GET", STREAM, Reply(200, (b"<html>",), {"Content-Type": "text/html"}))
    with pytest.raises(ProtocolFault, match="text/html"):
        await _read(client)


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
            await _read(client)


async def test_generate_hands_out_the_acceptance_and_then_the_stream(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE))
    async with aclosing(client.generate(model_ref="m", prompt="p", task_id=TASK_ID)) as events:
        kinds = [type(event) async for event in events]
    assert kinds == [Accepted, Started, Token, Token, Token, End]
    assert server.seen("POST", CANCEL) == []


async def test_generate_cancels_the_task_when_its_consumer_closes_it_early(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    async with aclosing(client.generate(model_ref="m", prompt="p", task_id=TASK_ID)) as events:
        async for event in events:
            if isinstance(event, Token):
                break
    assert len(server.seen("POST", CANCEL)) == 1


async def test_generate_cancels_the_task_when_its_consumer_just_leaves_the_loop(server: ScriptedServer) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    async with AsyncClient(server.url) as client:
        async for event in client.generate(model_ref="m", prompt="p", task_id=TASK_ID):
            if isinstance(event, Token):
                break
    assert len(server.seen("POST", CANCEL)) == 1


async def test_generate_cancels_the_task_when_its_consumer_is_cancelled(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    got_token = asyncio.Event()

    async def consume() -> None:
        async with aclosing(client.generate(model_ref="m", prompt="p", task_id=TASK_ID)) as events:
            async for event in events:
                if isinstance(event, Token):
                    got_token.set()

    consumer = asyncio.create_task(consume())
    await got_token.wait()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert len(server.seen("POST", CANCEL)) == 1


async def test_generate_that_stops_at_the_terminal_event_has_nothing_to_cancel(
    server: ScriptedServer, client: AsyncClient
) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE))
    async with aclosing(client.generate(model_ref="m", prompt="p", task_id=TASK_ID)) as events:
        async for event in events:
            if isinstance(event, End):
                break
    assert server.seen("POST", CANCEL) == []
