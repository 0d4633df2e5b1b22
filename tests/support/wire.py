"""The wire, judged by the contract: frames of a stream byte for byte, and every response that has a problem in it."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

from llorch_contract.specs import load_spec
from tools.contract.schemas import as_draft4

DURABLE = ("started", "token", "result", "end", "error")
TERMINAL = ("end", "error")
HEARTBEAT = b": hb\n\n"
_FRAME = re.compile(rb"(?:id: ([1-9]\d*)\n)?event: ([a-z]+)\ndata: (\{[^\n]*\})\n\n")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came; `event` is `hb` for a heartbeat."""

    raw: bytes
    event: str
    id: int | None = None
    data: Any = None

    @property
    def is_durable(self) -> bool:
        return self.event in DURABLE

    @property
    def is_terminal(self) -> bool:
        return self.event in TERMINAL


class FrameSplitter:
    """Cuts bytes into frames, whatever the chunks. Raises AssertionError for what the contract does not allow."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """The beginning of a frame that has not come to its end."""
        return self._rest

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        *whole, self._rest = (self._rest + chunk).split(b"\n\n")
        for each in whole:
            yield parse_frame(each + b"\n\n")


def parse_frame(raw: bytes) -> Frame:
    """The frame, checked: its form, which frames have an id, and its content against the contract's schema."""
    if raw == HEARTBEAT:
        return Frame(raw, "hb")
    match = _FRAME.fullmatch(raw)
    assert match is not None, f"not a frame: {raw!r}"
    event = match[2].decode()
    data = json.loads(match[3])
    frame_schema(event).validate(data)
    frame = Frame(raw, event, int(match[1]) if match[1] else None, data)
    assert (frame.id is not None) == frame.is_durable, f"only durable frames have an id: {raw!r}"
    return frame


def split(raw: bytes) -> list[Frame]:
    """All frames of a stream that ended."""
    splitter = FrameSplitter()
    frames = list(splitter.feed(raw))
    assert splitter.rest == b"", f"the stream broke within a frame: {splitter.rest!r}"
    return frames


def durable(frames: Iterable[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.is_durable]


def check_whole(frames: Iterable[Frame], after: int = 0) -> list[Frame]:
    """The durable frames of a stream read to its end behind the frame `after`: the rules of ORCH-2032 and ORCH-2033."""
    kept = durable(frames)
    assert [frame.id for frame in kept] == list(range(after + 1, after + 1 + len(kept))), "ids count without gaps"
    assert [frame.is_terminal for frame in kept] == [False] * (len(kept) - 1) + [True], "one terminal frame, the last"
    if after == 0:
        started = [number for number, frame in enumerate(kept) if frame.event == "started"]
        assert started in ([], [0]), "started comes at most once, and first"
        tokens = [frame.data["i"] for frame in kept if frame.event == "token"]
        assert tokens == list(range(len(tokens))), "the tokens count from 0"
        assert started or not tokens, "no token before started"
    return kept


def check_response(response: httpx.Response) -> httpx.Response:
    """What every response keeps: a correlation id, and the one envelope for errors. Read the body before."""
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", response.headers.get("x-correlation-id", "")), response.headers
    if response.status_code >= 400:
        problem = response.json()
        schema("Problem").validate(problem)
        assert problem["correlation_id"] == response.headers["x-correlation-id"]
        assert ("retry-after" in response.headers) == (problem["retry_after_ms"] is not None)
        assert ("x-backoff-ms" in response.headers) == (problem["retry_after_ms"] is not None)
    return response


@cache
def schema(name: str, spec: str = "data") -> jsonschema_rs.Draft4Validator:
    """The validator of a component of the contract."""
    document = load_spec(spec)
    return jsonschema_rs.Draft4Validator(as_draft4(document, {"$ref": f"#/components/schemas/{name}"}))


@cache
def frame_schema(event: str) -> jsonschema_rs.Draft4Validator:
    """The validator of the data of a frame."""
    names = load_spec("data")["components"]["schemas"]["StreamEvent"]["x-frames"]
    return schema(names[event])
