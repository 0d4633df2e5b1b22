"""Streams by themselves: framing, readers, advice, heartbeats and expiry."""

import asyncio
from itertools import pairwise

import pytest

from llorch.errors import StreamGone
from llorch.service.streams import HEARTBEAT, OpenReaders, Reader, TaskStream


def no_op() -> None:
    pass


def follow(stream: TaskStream, after: int = 0) -> Reader:
    return stream.join(after, no_op)


async def read(reader: Reader) -> bytes:
    """What is ready, or else the next thing that comes; empty when nothing will."""
    ready = asyncio.Event()
    reader.on_ready = ready.set
    while not (piece := reader.take()) and not reader.is_done:
        ready.clear()
        await ready.wait()
    return piece


async def drain(reader: Reader) -> bytes:
    """Everything up to the end."""
    got = b""
    while piece := await read(reader):
        got += piece
    return got


def finished() -> TaskStream:
    stream = TaskStream()
    stream.append("started", {"queue_position": 0})
    stream.append_tokens(["On", "ce ", 'up"on\n'])
    stream.append_tokens(["a", "ü🙂"])
    stream.close("end", {"tokens_out": 5})
    return stream


EXPECTED = [
    b'id: 1\nevent: started\ndata: {"queue_position":0}\n\n',
    b'id: 2\nevent: token\ndata: {"t":"On","i":0}\n\n',
    b'id: 3\nevent: token\ndata: {"t":"ce ","i":1}\n\n',
    b'id: 4\nevent: token\ndata: {"t":"up\\"on\\n","i":2}\n\n',
    b'id: 5\nevent: token\ndata: {"t":"a","i":3}\n\n',
    'id: 6\nevent: token\ndata: {"t":"ü🙂","i":4}\n\n'.encode(),
    b'id: 7\nevent: end\ndata: {"tokens_out":5}\n\n',
]


def test_durable_frames_have_these_bytes() -> None:
    """ORCH-2032, ORCH-2033: ids from 1, token numbers from 0, both without gaps."""
    assert finished().frames == EXPECTED


async def test_peer_bug_30_every_frame_ends_with_exactly_two_newlines_and_has_none_inside() -> None:
    stream = finished()
    other = TaskStream()
    reader = follow(other)
    other.advise("queued", {"queue_position": 1})
    advice = await read(reader)
    for frame in [*stream.frames[0:], advice, HEARTBEAT]:
        assert frame.endswith(b"\n\n")
        assert not frame.endswith(b"\n\n\n")
        assert b"\n\n" not in frame[:-2]


@pytest.mark.parametrize("after", range(7))
async def test_resume_after_every_durable_frame_gives_the_rest_byte_for_byte(after: int) -> None:
    """ORCH-2012, ORCH-2034."""
    assert await drain(follow(finished(), after)) == b"".join(EXPECTED[after:])


async def test_peer_bug_21_resume_that_breaks_before_its_first_frame_loses_nothing() -> None:
    stream = finished()
    for _ in range(3):
        follow(stream, 2).leave()
    assert await drain(follow(stream, 2)) == b"".join(EXPECTED[2:])


async def test_all_readers_get_the_same_bytes_whenever_they_came() -> None:
    stream = TaskStream()
    early = asyncio.create_task(drain(follow(stream)))
    await asyncio.sleep(0)
    stream.append("started", {"queue_position": 0})
    stream.append_tokens(["a", "b"])
    await asyncio.sleep(0)
    midway = asyncio.create_task(drain(follow(stream)))
    await asyncio.sleep(0)
    stream.append_tokens(["c"])
    stream.close("end", {})
    late = await drain(follow(stream))
    assert await early == await midway == late == b"".join(stream.frames[0:])


def test_after_the_gate_is_shut_only_the_terminal_frame_comes() -> None:
    """ORCH-2003."""
    stream = TaskStream()
    stream.append("started", {})
    stream.append_tokens(["a"])
    stream.shut_gate()
    stream.append_tokens(["b"])
    stream.append("started", {})
    stream.close("error", {"code": "CANCELED"})
    assert [frame.split(b"\n")[1] for frame in stream.frames[0:]] == [
        b"event: started",
        b"event: token",
        b"event: error",
    ]


async def test_advice_is_not_given_once_the_gate_is_shut() -> None:
    stream = TaskStream()
    reader = follow(stream)
    stream.shut_gate()
    stream.advise("queued", {"queue_position": 0})
    stream.close("error", {"code": "CANCELED"})
    assert await drain(reader) == b'id: 1\nevent: error\ndata: {"code":"CANCELED"}\n\n'


def test_stream_closes_exactly_once() -> None:
    """ORCH-2002."""
    stream = finished()
    stream.close("error", {"code": "CANCELED"})
    stream.append_tokens(["more"])
    stream.append("end", {})
    assert stream.frames[0:] == EXPECTED
    assert stream.last_id == 7


async def test_frames_that_are_ready_together_leave_together() -> None:
    """ORCH-2038."""
    stream = TaskStream()
    reader = follow(stream)
    stream.append("started", {})
    stream.append_tokens(["a", "b"])
    assert await read(reader) == b"".join(stream.frames[0:])
    stream.append_tokens(["c"])
    assert await read(reader) == stream.frames[3:][0]


async def test_peer_bug_13_a_waiting_reader_gets_a_token_without_time_passing() -> None:
    stream = TaskStream()
    reading = asyncio.create_task(read(follow(stream)))
    await asyncio.sleep(0)
    before = asyncio.get_running_loop().time()
    stream.append_tokens(["a"])
    assert await reading == stream.frames[0:][0]
    assert asyncio.get_running_loop().time() == before


async def test_reader_that_does_not_read_holds_nobody_up() -> None:
    stream = TaskStream()
    follow(stream)
    other = follow(stream)
    stream.append_tokens(["a"] * 1000)
    stream.close("end", {})
    assert await drain(other) == b"".join(stream.frames[0:])


async def test_only_the_newest_advice_is_kept_and_it_is_never_replayed() -> None:
    """ORCH-2011."""
    stream = TaskStream()
    reader = follow(stream)
    stream.advise("queued", {"queue_position": 2})
    stream.advise("queued", {"queue_position": 1})
    assert await read(reader) == b'event: queued\ndata: {"queue_position":1}\n\n'
    stream.append("started", {})
    stream.close("end", {})
    assert await drain(reader) == await drain(follow(stream)) == b"".join(stream.frames[0:])


async def test_advice_comes_before_the_frames_that_were_ready_with_it() -> None:
    stream = TaskStream()
    reader = follow(stream)
    stream.advise("queued", {"queue_position": 0})
    stream.append("started", {})
    assert await read(reader) == b'event: queued\ndata: {"queue_position":0}\n\n' + stream.frames[0:][0]


async def test_reader_is_called_once_for_tokens_that_came_together_and_not_after_it_left() -> None:
    stream = TaskStream()
    calls: list[bytes] = []
    left: list[bool] = []
    reader = stream.join(0, lambda: left.append(True))
    reader.on_ready = lambda: calls.append(reader.take())
    stream.append_tokens(["a", "b"])
    stream.append_tokens(["c"])
    assert calls == [b"".join(stream.frames[:2]), stream.frames[2]]
    reader.leave()
    reader.leave()
    stream.append_tokens(["d"])
    assert len(calls) == 2
    assert left == [True]
    assert reader.is_done
    assert stream.readers == 0


async def test_reader_that_leaves_when_it_is_called_does_not_disturb_the_others() -> None:
    stream = TaskStream()
    leaving, staying = follow(stream), follow(stream)
    leaving.on_ready = leaving.leave
    got: list[bytes] = []
    staying.on_ready = lambda: got.append(staying.take())
    stream.append_tokens(["a"])
    stream.close("end", {})
    assert got == stream.frames


# Expiry


def test_expired_transcript_can_be_joined_no_more() -> None:
    """ORCH-2036, ORCH-2037."""
    stream = finished()
    stream.drop_transcript()
    with pytest.raises(StreamGone):
        follow(stream)


async def test_reader_that_is_still_behind_is_cut_off_and_not_told_an_end() -> None:
    """ORCH-2037."""
    stream = finished()
    behind = follow(stream, 3)
    woken: list[bool] = []
    behind.on_ready = lambda: woken.append(True)
    stream.drop_transcript()
    assert woken == [True]
    assert behind.take() == b""
    assert behind.is_done


def test_output_is_the_text_of_the_tokens() -> None:
    assert finished().output() == 'Once up"on\naü🙂'
    assert TaskStream().output() == ""


def test_text_that_looks_like_a_frame_is_only_text() -> None:
    stream = TaskStream()
    stream.append("started", {"t": "\nevent: token\n", "data": "data: "})
    stream.append_tokens(["data: {}\n\nevent: end\n"])
    assert stream.output() == "data: {}\n\nevent: end\n"
    assert all(frame.count(b"\n") == 4 for frame in stream.frames[0:])


# Heartbeats


async def beating(readers: OpenReaders, seconds: float) -> None:
    async with asyncio.TaskGroup() as group:
        beat = group.create_task(readers.beat())
        await asyncio.sleep(seconds)
        beat.cancel()


async def test_peer_bug_27_a_silent_stream_is_never_silent_longer_than_the_interval() -> None:
    stream = TaskStream()
    reader, readers = follow(stream), OpenReaders(heartbeat_s=10.0)
    readers.add(reader)
    times: list[float] = [asyncio.get_running_loop().time()]

    async def listen() -> None:
        while True:
            assert await read(reader) == HEARTBEAT
            times.append(asyncio.get_running_loop().time())

    listening = asyncio.create_task(listen())
    await beating(readers, 60.0)
    listening.cancel()
    assert len(times) >= 7
    assert max(later - earlier for earlier, later in pairwise(times)) <= 10.0


async def test_stream_with_tokens_gets_no_heartbeat() -> None:
    stream = TaskStream()
    reader, readers = follow(stream), OpenReaders(heartbeat_s=10.0)
    readers.add(reader)
    reading = asyncio.create_task(drain(reader))
    sweeping = asyncio.create_task(beating(readers, 20.0))
    for _ in range(20):
        await asyncio.sleep(1.0)
        stream.append_tokens(["a"])
    stream.close("end", {})
    await sweeping
    assert HEARTBEAT not in await reading


async def test_heartbeat_does_not_displace_advice() -> None:
    stream = TaskStream()
    reader, readers = follow(stream), OpenReaders(heartbeat_s=10.0)
    readers.add(reader)
    stream.advise("queued", {"queue_position": 3})
    await beating(readers, 30.0)
    assert await read(reader) == b'event: queued\ndata: {"queue_position":3}\n\n'


async def test_reader_that_left_is_swept_no_more() -> None:
    readers = OpenReaders(heartbeat_s=10.0)
    reader = follow(TaskStream())
    readers.add(reader)
    readers.discard(reader)
    readers.discard(reader)
    assert len(readers) == 0
