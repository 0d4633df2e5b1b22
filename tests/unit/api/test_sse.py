"""The stream on the wire (ORCH-2002, ORCH-2012, ORCH-2013, ORCH-2034)."""

import asyncio
from typing import Any

import pytest

from llorch.api.exchange import Exchange
from llorch.api.protocol import BODY_EXTENSION
from llorch.api.sse import send_events
from llorch.service.streams import TaskStream
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import TASK

STREAM = f"/v1/tasks/{TASK}/stream"
WHOLE = (
    b'id: 1\nevent: started\ndata: {"queue_position":0}\n\n'
    b'id: 2\nevent: token\ndata: {"t":" Par","i":0}\n\n'
    b'id: 3\nevent: token\ndata: {"t":"is","i":1}\n\n'
    b'id: 4\nevent: end\ndata: {"tokens_out":2}\n\n'
)


def whole_stream() -> TaskStream:
    stream = TaskStream()
    stream.append("started", {"queue_position": 0})
    stream.append_tokens([" Par", "is"])
    stream.close("end", {"tokens_out": 2})
    return stream


class Wire:
    """Both ends of an ASGI server: it is over when the client leaves or the response is complete.

    While `has_room` is cleared the client's buffer is full and a send has to wait.
    """

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.is_over = asyncio.Event()
        self.has_room = asyncio.Event()
        self.has_room.set()

    async def send(self, message: Any) -> None:
        await self.has_room.wait()
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message["more_body"]:
            self.is_over.set()

    async def receive(self) -> Any:
        await self.is_over.wait()
        return {"type": "http.disconnect"}

    def exchange(self) -> Exchange:
        return Exchange({"headers": []}, self.receive, self.send, "req-1")

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent if message["type"] == "http.response.body")


async def test_stream_is_sent_as_it_is_under_the_right_headers(client: Client) -> None:
    client.edge.tasks.streams["tenant-admin", TASK] = whole_stream()
    response = await client.get(STREAM)
    assert (response.status_code, response.content) == (200, WHOLE)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert client.edge.tasks.left == 1


async def test_resume_goes_on_behind_the_last_event(client: Client) -> None:
    client.edge.tasks.streams["tenant-admin", TASK] = whole_stream()
    for last, frames in (("0", 4), ("1", 3), ("3", 1)):
        response = await client.get(STREAM, headers={"Last-Event-ID": last})
        assert (response.status_code, response.content.count(b"\n\n")) == (200, frames)
        assert WHOLE.endswith(response.content)
    nothing_follows = await client.get(STREAM, headers={"Last-Event-ID": "4"})
    assert (nothing_follows.status_code, nothing_follows.content) == (204, b"")
    assert client.edge.tasks.followed == [0, 1, 3, 4]


async def test_malformed_last_event_id_is_400(client: Client) -> None:
    client.edge.tasks.streams["tenant-admin", TASK] = whole_stream()
    assert (await client.get(STREAM, headers={"Last-Event-ID": "x"})).status_code == 400


async def test_frames_arrive_while_the_task_still_runs(client: Client) -> None:
    stream = client.edge.tasks.streams["tenant-admin", TASK] = TaskStream()
    async with client.stream("GET", STREAM) as response:
        chunks = response.aiter_raw()
        stream.append("started", {})
        assert await anext(chunks) == b"id: 1\nevent: started\ndata: {}\n\n"
        stream.append_tokens(["a", "b"])
        assert (await anext(chunks)).count(b"event: token") == 2
        stream.close("end", {})
        assert b"".join([chunk async for chunk in chunks]) == b"id: 4\nevent: end\ndata: {}\n\n"


async def test_client_that_leaves_an_idle_stream_is_noticed(client: Client) -> None:
    tasks = client.edge.tasks
    stream = tasks.streams["tenant-admin", TASK] = TaskStream()
    left = asyncio.Event()
    tasks.on_leave = left.set
    async with client.stream("GET", STREAM) as response:
        assert response.status_code == 200
        assert stream.readers == 1
    await asyncio.wait_for(left.wait(), 5)
    assert (stream.readers, tasks.left) == (0, 1)


async def test_last_frame_ends_the_response_in_the_same_message() -> None:
    wire = Wire()
    await send_events(wire.exchange(), 200, whole_stream().join(0, lambda: None))
    assert [message["type"] for message in wire.sent] == ["http.response.start", "http.response.body"]
    assert (wire.sent[1]["body"], wire.sent[1]["more_body"]) == (WHOLE, False)


async def test_disconnect_ends_the_sending_and_leaves_once() -> None:
    wire, stream = Wire(), TaskStream()
    left: list[int] = []
    sending = asyncio.ensure_future(send_events(wire.exchange(), 200, stream.join(0, lambda: left.append(1))))
    wire.is_over.set()
    await asyncio.wait_for(sending, 5)
    stream.append("started", {})
    assert (left, stream.readers, wire.body) == ([1], 0, b"")


async def test_frame_is_sent_by_the_time_it_is_appended() -> None:
    wire, stream = Wire(), TaskStream()
    sending = asyncio.ensure_future(send_events(wire.exchange(), 200, stream.join(0, lambda: None)))
    await asyncio.sleep(0)
    stream.append_tokens(["a"])
    assert wire.body.endswith(b'data: {"t":"a","i":0}\n\n')
    stream.close("end", {})
    await asyncio.wait_for(sending, 5)


async def test_frames_for_a_client_without_room_leave_together_and_in_order() -> None:
    wire, stream = Wire(), TaskStream()
    sending = asyncio.ensure_future(send_events(wire.exchange(), 200, stream.join(0, lambda: None)))
    await asyncio.sleep(0)
    wire.has_room.clear()
    for text in "abcde":
        stream.append_tokens([text])
    stream.close("end", {})
    assert wire.body == b""
    wire.has_room.set()
    await asyncio.wait_for(sending, 5)
    assert [line for line in wire.body.split(b"\n") if line.startswith(b"id: ")] == [b"id: %d" % n for n in range(1, 7)]
    assert [message["type"] for message in wire.sent].count("http.response.body") == 2


async def test_reader_leaves_when_sending_is_cancelled_or_fails() -> None:
    left: list[int] = []
    stream = TaskStream()
    sending = asyncio.ensure_future(send_events(Wire().exchange(), 200, stream.join(0, lambda: left.append(1))))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending

    async def broken(_message: Any) -> None:
        raise OSError("broken pipe")

    reader = stream.join(0, lambda: left.append(2))
    with pytest.raises(OSError, match="broken pipe"):
        await send_events(Exchange({"headers": []}, Wire().receive, broken, "req-1"), 200, reader)
    assert (left, stream.readers) == ([1, 2], 0)


async def test_transcript_that_expires_under_a_slow_reader_just_ends_the_stream() -> None:
    wire, stream = Wire(), TaskStream()
    sending = asyncio.ensure_future(send_events(wire.exchange(), 200, stream.join(0, lambda: None)))
    await asyncio.sleep(0)
    wire.has_room.clear()
    stream.append("started", {})
    stream.append_tokens(["never read"])
    stream.close("end", {})
    stream.drop_transcript()
    wire.has_room.set()
    await asyncio.wait_for(sending, 5)
    assert wire.body == b"id: 1\nevent: started\ndata: {}\n\n"
    assert wire.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_nothing_stays_behind_when_a_stream_has_ended() -> None:
    before = asyncio.all_tasks()
    wire = Wire()
    await send_events(wire.exchange(), 200, whole_stream().join(0, lambda: None))
    assert asyncio.all_tasks() == before
    stream = TaskStream()
    wire = Wire()
    sending = asyncio.ensure_future(send_events(wire.exchange(), 200, stream.join(0, lambda: None)))
    await asyncio.sleep(0)
    wire.has_room.clear()
    stream.append("started", {})
    wire.is_over.set()
    await asyncio.wait_for(sending, 5)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_stream_of_another_tenant_is_not_found_peer_bug_22(client: Client) -> None:
    client.edge.tasks.streams["tenant-admin", TASK] = whole_stream()
    foreign = await client.get(STREAM, headers=client.edge.bearer("data"))
    unknown = await client.get(STREAM.replace(TASK[:8], "00000000"), headers=client.edge.bearer("data"))
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json() | {"correlation_id": ""} == unknown.json() | {"correlation_id": ""}


class DirectBody:
    """The shorter way to the wire, shut while the client's buffer is full."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def try_write(self, piece: bytes) -> bool:
        if not self._wire.has_room.is_set():
            return False
        self._wire.sent.append({"type": "http.response.body", "body": piece, "more_body": True})
        return True


async def test_token_does_not_overtake_a_piece_that_waited_for_room() -> None:
    wire = Wire()
    exchange = wire.exchange()
    exchange.scope["extensions"] = {BODY_EXTENSION: DirectBody(wire)}
    stream = TaskStream()
    following = asyncio.create_task(send_events(exchange, 200, stream.join(0, lambda: None)))
    while not wire.sent:  # noqa: ASYNC110 (the head of the response)
        await asyncio.sleep(0)
    wire.has_room.clear()
    stream.append_tokens(["waits"])
    await asyncio.sleep(0)
    wire.has_room.set()
    stream.append_tokens(["comes before the waiting task has had its turn"])
    stream.close("end", {})
    await following
    assert wire.body == b"".join(stream.frames)
