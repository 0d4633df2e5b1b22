"""ORCH-2002: the framing of a task stream, read however the network cuts it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.client import sse
from llorch.client.errors import ProtocolFault
from llorch.client.sse import Frame, FrameParser

FRAMES = [
    Frame("queued", '{"queue_position":3}', None),
    Frame("started", "{}", "1"),
    Frame("token", '{"t":"é\\n","i":0}', "2"),
    Frame("end", "one\ntwo", "3"),
]


def _encode(frames: list[Frame], line_end: str) -> bytes:
    text = ": hb\n\n"
    for frame in frames:
        text += "" if frame.id is None else f"id: {frame.id}\n"
        text += f"event: {frame.event}\n" + "".join(f"data: {line}\n" for line in frame.data.split("\n")) + "\n"
        text += ": hb\n\n"
    return text.replace("\n", line_end).encode()


def _feed(pieces: list[bytes]) -> list[Frame]:
    parser = FrameParser()
    return [frame for piece in pieces for frame in parser.feed(piece)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@given(cuts=st.lists(st.integers(0, 400), max_size=30))
def test_frames_are_the_same_wherever_the_network_cuts_them(line_end: str, cuts: list[int]) -> None:
    data = _encode(FRAMES, line_end)
    marks = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert _feed([data[start:end] for start, end in pairwise(marks)]) == FRAMES


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_frames_that_come_byte_by_byte_are_complete(line_end: str) -> None:
    data = _encode(FRAMES, line_end)
    assert _feed([data[index : index + 1] for index in range(len(data))]) == FRAMES


def test_a_frame_is_handed_out_with_its_last_byte_and_not_later() -> None:
    parser = FrameParser()
    assert parser.feed(b"id: 1\r\nevent: token\r\ndata: {}\r\n") == []
    assert parser.feed(b"\r") == [Frame("token", "{}", "1")]
    assert parser.feed(b"\nid: 2\r\ndata: x\r\n\r\n") == [Frame("message", "x", "2")]


def test_an_incomplete_frame_is_no_frame() -> None:
    assert _feed([b"id: 1\nevent: token\ndata: {}\n"]) == []


def test_a_frame_without_data_is_no_frame_and_leaves_nothing_to_the_next() -> None:
    assert _feed([b"id: 7\nevent: token\n\ndata: x\n\n"]) == [Frame("message", "x", None)]


def test_a_byte_order_mark_at_the_start_is_skipped() -> None:
    assert _feed([b"\xef\xbb\xbfdata: x\n\n", b"\xef\xbb\xbfdata: y\n\n"]) == [Frame("message", "x", None)]


def test_one_space_after_the_colon_belongs_to_the_framing() -> None:
    assert _feed([b"data:x\n\ndata:  x\n\ndata\n\n"]) == [
        Frame("message", "x", None),
        Frame("message", " x", None),
        Frame("message", "", None),
    ]


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(ProtocolFault):
        _feed([b"data: \xff\n\n"])


@pytest.mark.parametrize("piece", [b"data: xxxxxxxxx\n", b"data: " + b"x" * 9])
def test_a_frame_without_an_end_is_refused_before_memory_is(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ProtocolFault):
        _feed([piece] * 20)
