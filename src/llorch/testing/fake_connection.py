"""The server's side of one HTTP connection to FakeEngine: parsing, keep-alive, and writing in ordered pieces.

What a request means and when a generation sends is decided elsewhere.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol, cast

import httptools
import msgspec

from llorch.testing.fake_faults import Faults, Frost
from llorch.testing.fake_generation import Run

_REASONS: Final = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request, complete."""

    method: str
    path: str
    query: str
    body: bytes
    authorization: bytes


class Server(Protocol):
    """The engine, as a connection sees it."""

    frost: Frost
    keep_alive_s: float
    connections_made: int
    idle_closed: int
    connections: "set[FakeConnection]"

    @property
    def faults(self) -> Faults:
        """What goes wrong now."""
        ...

    def serve(self, connection: "FakeConnection", request: Request) -> None:
        """Answer, now or later."""
        ...

    def changed(self) -> None:
        """Something happened."""
        ...


class FakeConnection(asyncio.Protocol):
    """The server's side of one connection."""

    __slots__ = (
        "_authorization",
        "_body",
        "_engine",
        "_idle_timer",
        "_is_closing",
        "_loop",
        "_outbox",
        "_parser",
        "_requests",
        "_run",
        "_transport",
        "_url",
        "is_full",
    )

    def __init__(self, engine: Server) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._authorization = b""
        self._requests = 0
        self._run: Run | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._outbox: deque[bytes] = deque()
        self._is_closing = False
        self.is_full = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._engine.connections_made += 1
        self._engine.connections.add(self)
        if self._engine.faults.refuse:
            self.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the interface is asyncio's)
        self._engine.connections.discard(self)
        self._stop_idle_timer()
        run, self._run = self._run, None
        if run is not None:
            run.client_gone()
        self._engine.changed()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self._run is not None:
            self._run.writable()

    # What the parser calls.

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._authorization = value

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self._stop_idle_timer()
        self._requests += 1
        method = self._parser.get_method().decode()
        url, body, authorization = self._url.decode("latin-1"), self._body, self._authorization
        self._url = self._body = self._authorization = b""
        if self._requests > 1 and self._engine.faults.drop_reused:
            self.abort()
            return
        self._engine.serve(self, Request(method, *url.partition("?")[::2], body, authorization))

    # Answering.

    def begin(self, run: Run) -> None:
        """A generation answers the request; it may have ended already."""
        if run.seen.state in ("queued", "running"):
            self._run = run

    def answer(self, status: int, body: Any) -> None:
        """Send a whole answer, encoded as JSON, and wait for another request."""
        self.send(status, msgspec.json.encode(body))
        self.answered()

    def send(self, status: int, body: bytes, content_type: str = "application/json; charset=utf-8") -> None:
        """Send a whole answer."""
        self.send_head(status, content_type, length=len(body))
        if self._transport is not None:
            self._transport.write(body)

    def send_head(self, status: int, content_type: str, *, length: int = 0, chunked: bool = False) -> None:
        """Send status and headers."""
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
        head = (
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\nServer: fake\r\nContent-Type: {content_type}\r\n"
            f"{framing}\r\nKeep-Alive: timeout={int(self._engine.keep_alive_s)}, max=100\r\n\r\n"
        )
        if self._transport is not None:
            self._transport.write(head.encode())

    def write(self, data: bytes, faults: Faults) -> None:
        """Send part of a body, in the pieces that the faults ask for."""
        if self._transport is None or self._transport.is_closing():
            return
        if not faults.split_at and not self._outbox:
            self._transport.write(data)
            return
        cuts = [0, *(cut for cut in faults.split_at if 0 < cut < len(data)), len(data)]
        is_idle = not self._outbox
        self._outbox.extend(data[start:end] for start, end in pairwise(cuts))
        if is_idle:
            self._pump(faults.split_pause_s)

    def answered(self) -> None:
        """The answer is complete: wait for another request, but not for ever."""
        self._run = None
        self._stop_idle_timer()
        if self._transport is not None and not self._transport.is_closing():
            self._idle_timer = self._loop.call_later(self._engine.keep_alive_s, self._close_idle)

    def close(self) -> None:
        """Close after what was written; the client sees the end of the connection, not of the answer."""
        self._is_closing = True
        if not self._outbox and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            self._transport.abort()

    def drop_if_idle(self) -> None:
        """Close the connection unless an answer is under way."""
        if self._run is None and self._transport is not None:
            self._transport.close()

    def _pump(self, pause_s: float) -> None:
        if self._transport is None or self._transport.is_closing():
            self._outbox.clear()
            return
        if self._engine.frost.is_frozen:
            self._engine.frost.hold(lambda: self._pump(pause_s))
            return
        self._transport.write(self._outbox.popleft())
        if self._outbox:
            self._loop.call_later(pause_s, self._pump, pause_s)
        elif self._is_closing:
            self._transport.close()

    def _close_idle(self) -> None:
        if self._engine.frost.is_frozen:
            return
        self._engine.idle_closed += 1
        self.drop_if_idle()

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
