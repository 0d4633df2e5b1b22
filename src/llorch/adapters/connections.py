"""One TCP connection to an engine and the one answer that may be under way on it.

This is the token path: a segment that arrives costs one parser call and one wake-up of its consumer, no timer and
no task. It owns parsing, backpressure and the deadline of an answer; it knows nothing of pools, retries or engines.
"""

import asyncio
from collections.abc import Callable
from typing import Final, cast

import httptools

from llorch.errors import Canceled, DecodeTimeout, LlorchError, WorkerReset

HIGH_WATER_BYTES: Final = 256 * 1024
"""Bytes received and not yet taken at which a connection stops reading; it reads again once they are taken."""

_DEFAULT_IDLE_S: Final = 4.0
_DRAIN_S: Final = 1.0


class Response:
    """An answer that is arriving. Its consumer takes what is there and waits when there is nothing.

    `status` and `headers` (names in lower case) are set once `has_head` is true, `is_last` (the connection ends with
    it) once `complete` is. Exactly one task may consume it.
    """

    __slots__ = (
        "_connection",
        "_waiter",
        "begun",
        "chunks",
        "complete",
        "error",
        "has_head",
        "headers",
        "is_last",
        "on_arrival",
        "on_body",
        "parser",
        "status",
    )

    def __init__(self, connection: "Connection") -> None:
        self._connection: Connection | None = connection
        self.chunks: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.has_head = False
        self.begun = False
        self.complete = False
        self.is_last = True
        self.error: LlorchError | None = None
        self.on_arrival: Callable[[], None] | None = None
        """Called at once when `take` may have something new, instead of waking a waiter. It must not raise."""
        # The parser calls list.append itself, so that a chunk costs no Python frame.
        self.on_body: Callable[[bytes], None] = self.chunks.append
        self.parser = httptools.HttpResponseParser(self)

    def take(self) -> bytes | None:
        """Everything that has arrived, in one piece; b"" at the end of the answer, None when nothing is there yet.

        Raises WorkerReset, DecodeTimeout or Canceled when the answer broke off, after what had arrived was taken.
        """
        chunks = self.chunks
        if not chunks:
            if self.error is not None:
                raise self.error
            return b"" if self.complete else None
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        connection = self._connection
        if connection is not None and connection.buffered:
            connection.taken()
        return data

    def discard(self) -> None:
        """What has arrived was looked at in `chunks` and is not needed any more."""
        self.chunks.clear()
        connection = self._connection
        if connection is not None and connection.buffered:
            connection.taken()

    def wait(self) -> "asyncio.Future[None]":
        """A future that is done when `take` may have something new."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        if self.complete or self.error is not None:
            waiter.set_result(None)
        return waiter

    def wake(self) -> None:
        """Tell the consumer to look again."""
        if self.on_arrival is not None:
            self.on_arrival()
            return
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def read_head(self) -> None:
        """Return when status and headers are known. Raises as `take` does."""
        while not self.has_head:
            if self.error is not None:
                raise self.error
            await self.wait()

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes; WorkerReset when it is larger, and the connection is closed."""
        parts: list[bytes] = []
        size = 0
        while (data := self.take()) != b"":
            if data is None:
                await self.wait()
                continue
            size += len(data)
            if size > limit:
                await self.aclose()
                raise WorkerReset(f"The engine's answer is larger than the {limit} bytes that llorch accepts.")
            parts.append(data)
        return b"".join(parts)

    def __aiter__(self) -> "Response":
        return self

    async def __anext__(self) -> bytes:
        """All chunks that arrived together, as one item."""
        while (data := self.take()) is None:
            await self.wait()
        if not data:
            raise StopAsyncIteration
        return data

    def let_finish(self) -> None:
        """Stop consuming: all that mattered was read. What still comes is dropped and the connection then reused."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drain()

    async def aclose(self) -> None:
        """Give up the answer: unless it is complete, close the connection at once; return when it is. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort(Canceled("The answer was closed before its end."))
            await connection.wait_closed()

    def release(self, *, keep_connection: bool = False) -> None:
        """The connection needs this answer no more. Of one that breaks off `aclose` still awaits the closing."""
        if not keep_connection:
            self._connection = None
        del self.parser  # it holds this object's callbacks: without the cycle both are freed at once

    def on_message_begin(self) -> None:
        """Parser callback."""
        if self.complete:
            raise ValueError("data after the end of the answer")
        self.begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser callback."""
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Parser callback."""
        status = self.parser.get_status_code()
        if status >= 200:
            self.status = status
            self.has_head = True

    def on_message_complete(self) -> None:
        """Parser callback. An informational answer (1xx) is followed by the real one."""
        if self.has_head:
            self.complete = True
            self.is_last = not self.parser.should_keep_alive()  # the parser knows it here and only here
        else:
            self.headers.clear()

    @property
    def ends_with_connection(self) -> bool:
        """Whether the body has no other end than that of the connection (RFC 9112, 6.3)."""
        return self.has_head and b"content-length" not in self.headers and b"transfer-encoding" not in self.headers


class Connection(asyncio.Protocol):
    """A connection that carries one answer at a time.

    `on_idle(connection)` is called when an answer ended and the connection can carry another one,
    `on_lost(connection)` when it is gone; the owner decides what follows.
    """

    __slots__ = (
        "_closed",
        "_deadline",
        "_feed",
        "_idle_s",
        "_is_draining",
        "_is_paused",
        "_loop",
        "_on_idle",
        "_on_lost",
        "_response",
        "_timer",
        "_timer_at",
        "_transport",
        "buffered",
        "expires_at",
    )

    def __init__(self, on_idle: "Callable[[Connection], None]", on_lost: "Callable[[Connection], None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._response: Response | None = None
        self._feed: Callable[[bytes], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deadline = 0.0
        self._idle_s = 0.0
        self.buffered = 0
        self._is_paused = False
        self._is_draining = False
        self.expires_at = 0.0
        """When it must not be reused any more (loop time), because the engine may be about to close it."""

    @property
    def is_open(self) -> bool:
        """Whether a request could be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, *, first_byte_s: float, idle_s: float) -> Response:
        """Send a request. The answer must begin within `first_byte_s` and never pause for longer than `idle_s`."""
        response = Response(self)
        self._response = response
        self._feed = response.parser.feed_data
        self._idle_s = idle_s
        self._is_draining = False
        self._arm(self._loop.time() + first_byte_s)
        if self._transport is not None:
            self._transport.write(request)
        return response

    def taken(self) -> None:
        """The consumer has taken all that was buffered."""
        self.buffered = 0
        if self._is_paused:
            self._resume()

    def drain(self) -> None:
        """Nobody consumes the answer any more: let it end within a second, else close the connection."""
        if self._response is None:
            return
        self._is_draining = True
        if self._is_paused:
            self._resume()
        self._arm(self._loop.time() + _DRAIN_S)

    def abort(self, reason: LlorchError) -> None:
        """Close at once, without sending what is left; an unfinished answer ends with `reason`."""
        self._fail(reason)
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when the socket is closed. Cancelling the waiter leaves the closing as it is."""
        await asyncio.shield(self._closed)

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None or self._feed is None:
            self.abort(WorkerReset("The engine sent data that nobody asked for."))
            return
        try:
            self._feed(data)
        except httptools.HttpParserError as exc:
            self._refuse(response, exc)
            return
        if response.complete:
            self._finish(response)
        elif not self._is_draining:
            deadline = self._deadline = self._loop.time() + self._idle_s
            if deadline < self._timer_at:
                self._arm(deadline)
        on_arrival = response.on_arrival
        if on_arrival is not None:
            on_arrival()
            return
        if response is self._response:
            self.buffered += len(data)
            if self.buffered > HIGH_WATER_BYTES:
                self._pause()
        response.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        response = self._response
        if response is not None and exc is None and response.ends_with_connection:
            response.complete = True
            self._detach(response)
            response.wake()
        else:
            error = WorkerReset("The engine closed the connection before its answer was complete.")
            error.__cause__ = exc
            self._fail(error)
        if not self._closed.done():
            self._closed.set_result(None)
        self._on_lost(self)

    # The life of an answer.

    def _finish(self, response: Response) -> None:
        idle_s = 0.0 if response.is_last else idle_lifetime_s(response.headers.get(b"keep-alive"))
        self._detach(response)
        if self._is_paused:
            self._resume()
        if idle_s > 0.0 and self.is_open:
            self.expires_at = self._loop.time() + idle_s
            self._on_idle(self)
        elif self._transport is not None:
            self._transport.abort()

    def _refuse(self, response: Response, exc: httptools.HttpParserError) -> None:
        """What came is not HTTP, or came after the end of the answer: an answer that was complete by then stays so."""
        if response.complete:
            self._detach(response)
            response.wake()
        error = WorkerReset("The engine's answer is not valid HTTP.")
        error.__cause__ = exc
        self.abort(error)

    def _fail(self, error: LlorchError) -> None:
        response = self._response
        if response is not None:
            response.error = error
            self._detach(response, keep_connection=True)
            response.wake()

    def _detach(self, response: Response, *, keep_connection: bool = False) -> None:
        response.release(keep_connection=keep_connection)
        self._response = None
        self._feed = None
        self.buffered = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        """The only timer of an answer: it fires once per period, sees how far the deadline moved, and is set again."""
        self._timer = None
        response = self._response
        if response is None:
            return
        now = self._loop.time()
        if self._is_paused:
            # It is the consumer that is slow; the engine is not even being read.
            self._deadline = now + self._idle_s
        if self._deadline > now:
            self._arm(self._deadline)
            return
        what = "went silent in the middle of its answer" if response.begun else "did not begin to answer in time"
        self.abort(DecodeTimeout(f"The engine {what}."))

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        self._is_paused = False
        self._deadline = self._loop.time() + self._idle_s
        if self.is_open and self._transport is not None:
            self._transport.resume_reading()


def idle_lifetime_s(keep_alive: bytes | None) -> float:
    """Seconds that an idle connection may be kept: less than the engine says (`timeout=5`), at most 4."""
    for part in (keep_alive or b"").split(b","):
        name, _, value = part.strip().partition(b"=")
        if name.lower() == b"timeout" and value.isdigit():
            told_s = int(value)
            return min(_DEFAULT_IDLE_S, max(told_s - 1.0, told_s / 2))
    return _DEFAULT_IDLE_S
