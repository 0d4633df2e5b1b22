"""The stream of one task: durable frames, encoded once, for any number of readers, closed exactly once.

Owns SSE framing, ids and transcripts. A token costs one encoding and, per reader, one call for all tokens that arrived
together; nothing a reader does reaches the engine.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from llorch.errors import StreamGone

HEARTBEAT = b": hb\n\n"
OVERHEAD_FRAMES = 3
"""Durable frames beside one per token: `started`, a piece of text that comes with the end, and the terminal one."""

_encode = msgspec.json.encode


class _TokenData(msgspec.Struct):
    t: str
    i: int


_decode_token = msgspec.json.Decoder(_TokenData).decode


class TaskStream:
    """Durable frames of one task in order; the frame with id n is `frames[n - 1]`.

    After `shut_gate` nothing but the terminal frame is taken in; after `close` nothing at all.
    """

    __slots__ = ("_call", "_call_at", "_gate_open", "_readers", "frames", "is_closed", "is_gone", "tokens")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._readers: tuple[Reader, ...] = ()
        self._call: Callable[[], None] | None = None
        self._call_at = 0
        self.tokens = 0
        self._gate_open = True
        self.is_closed = False
        self.is_gone = False

    @property
    def last_id(self) -> int:
        """Id of the newest durable frame; 0 before the first."""
        return len(self.frames)

    @property
    def readers(self) -> int:
        """How many follow now."""
        return len(self._readers)

    def append(self, event: str, data: Any) -> None:
        """Add a durable frame, unless the gate is shut."""
        if self._gate_open:
            self._add(event, data)

    def append_tokens(self, texts: Iterable[str]) -> None:
        """Add a `token` frame for each text, unless the gate is shut."""
        if not self._gate_open:
            return
        frames = self.frames
        before = n = len(frames)
        i = self.tokens
        new = b""
        for text in texts:
            n += 1
            new = b'id: %d\nevent: token\ndata: {"t":%b,"i":%d}\n\n' % (n, _encode(text), i)
            frames.append(new)
            i += 1
        self.tokens = i
        if n > before + 1:
            new = b"".join(frames[before:])
        for reader in self._readers:
            write = reader.write
            if write is not None and reader.cursor == before and not reader.advice and write(new):
                reader.cursor = n
            elif reader.on_ready is not None:
                reader.on_ready()
        if i >= self._call_at and self._call is not None:
            self._call()

    def call_at(self, tokens: int | None, call: Callable[[], None] | None = None) -> None:
        """Call this each time that tokens come, from the one on that makes them so many; None: no more."""
        self._call_at, self._call = tokens or 0, call

    def shut_gate(self) -> None:
        """From now on only the terminal frame may come."""
        self._gate_open = False

    def close(self, event: str, data: Any) -> None:
        """Add the terminal frame. A second call changes nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        self._gate_open = False
        self._add(event, data)

    def drop_transcript(self) -> None:
        """Give the frames back. A reader that has not taken them all is done; who joins later gets StreamGone."""
        self.is_gone = True
        self.frames = []
        for reader in self._readers:
            reader.wake()

    def texts(self) -> list[str]:
        """The text of each token so far."""
        tokens = [frame for frame in self.frames if b"\nevent: token\n" in frame]
        return [_decode_token(frame[frame.index(b"data: ") + 6 :]).t for frame in tokens]

    def output(self) -> str:
        """The text of all tokens so far."""
        return "".join(self.texts())

    def advise(self, event: str, data: Any) -> None:
        """Tell present readers something of the moment: no id, never replayed, only the newest is kept."""
        self.advise_all([(event, data)])

    def advise_all(self, frames: Iterable[tuple[str, Any]]) -> None:
        """The same of several frames, which belong together."""
        if not self._readers or not self._gate_open:
            return
        advice = b"".join(b"event: %b\ndata: %b\n\n" % (event.encode(), _encode(data)) for event, data in frames)
        for reader in self._readers:
            reader.advise(advice)

    def join(self, after: int, on_leave: Callable[[], None]) -> "Reader":
        """A reader that continues behind the frame with id `after` (0: from the start)."""
        if self.is_gone:
            raise StreamGone
        reader = Reader(self, after, on_leave)
        self._readers = (*self._readers, reader)
        return reader

    def leave(self, reader: "Reader") -> None:
        """The reader follows no more."""
        self._readers = tuple(other for other in self._readers if other is not reader)

    def _add(self, event: str, data: Any) -> None:
        self.frames.append(b"id: %d\nevent: %b\ndata: %b\n\n" % (len(self.frames) + 1, event.encode(), _encode(data)))
        for reader in self._readers:
            reader.wake()


class Reader:
    """One follower of a stream. `take` gives bytes for the wire until the terminal frame was given.

    `on_ready` is called, at once and by whoever caused it, when there is something new to take; it must not raise.
    `write` is a shorter way for tokens: it writes a piece at once, or gives False and writes nothing.
    """

    __slots__ = ("_on_leave", "_stream", "_swept_at", "advice", "cursor", "on_ready", "write")

    def __init__(self, stream: TaskStream, after: int, on_leave: Callable[[], None]) -> None:
        self._stream = stream
        self._on_leave: Callable[[], None] | None = on_leave
        self.advice = b""
        self._swept_at = -1
        self.cursor = after
        self.on_ready: Callable[[], None] | None = None
        self.write: Callable[[bytes], bool] | None = None

    @property
    def is_done(self) -> bool:
        """Nothing will follow: the terminal frame was given, the transcript has expired, or the reader has left."""
        stream = self._stream
        return (stream.is_closed and self.cursor >= stream.last_id) or self._on_leave is None

    def take(self) -> bytes:
        """Everything that is ready, in one piece; empty when nothing is."""
        frames, cursor = self._stream.frames, self.cursor
        newest = len(frames)
        if newest == cursor + 1 and not self.advice:
            self.cursor = newest
            return frames[cursor]
        ready = frames[cursor:]
        self.cursor = max(cursor, newest)
        advice, self.advice = self.advice, b""
        return advice + b"".join(ready)

    def wake(self) -> None:
        """There may be something to take."""
        if self.on_ready is not None:
            self.on_ready()

    def advise(self, advice: bytes) -> None:
        """Give this out before the next durable frames, instead of older advice that was not taken."""
        self.advice = advice
        self.wake()

    def beat_if_idle(self) -> None:
        """Send a heartbeat when no durable frame was given since the last call."""
        if self._swept_at == self.cursor and not self.advice:
            self.advise(HEARTBEAT)
        self._swept_at = self.cursor

    def leave(self) -> None:
        """Stop following. Idempotent."""
        if self._on_leave is not None:
            on_leave, self._on_leave = self._on_leave, None
            self.on_ready = self.write = None
            self._stream.leave(self)
            on_leave()


class OpenReaders:
    """All readers of the service; beats for the idle ones. One timer serves them all."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._readers: dict[Reader, str] = {}
        self._by_tenant: dict[str, set[Reader]] = {}

    def __len__(self) -> int:
        return len(self._readers)

    def __iter__(self) -> Iterator[Reader]:
        return iter(self._readers)

    def count(self, tenant: str) -> int:
        """How many of the tenant's readers are open."""
        return len(self._by_tenant.get(tenant, ()))

    def add(self, reader: Reader, tenant: str = "") -> None:
        """Beat for this one too."""
        self._readers[reader] = tenant
        self._by_tenant.setdefault(tenant, set()).add(reader)

    def discard(self, reader: Reader) -> None:
        """Beat no more for it. Idempotent."""
        tenant = self._readers.pop(reader, None)
        if tenant is None:
            return
        self._by_tenant[tenant].discard(reader)
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]

    async def beat(self) -> None:
        """Sweep for ever; a silent stream gets a heartbeat after at most `heartbeat_s` seconds."""
        while True:
            await asyncio.sleep(self._heartbeat_s / 2)
            for reader in self._readers:
                reader.beat_if_idle()
