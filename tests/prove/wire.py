"""HTTP over raw asyncio connections that are kept: cheap enough to share two cores with the server under test.

It knows requests, answers and the cutting of event streams; what they mean is the load's business.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import httptools
import msgspec

from tests.support.identities import Identity

OnFrame = Callable[[bytes], None]
_IDLE_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; the body of a stream was handed out frame by frame."""

    status: int
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Broken(Exception):
    """The connection ended before the answer did."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    __slots__ = ("_answer", "_body", "_is_stream", "_on_frame", "_parser", "_rest", "_transport", "is_open")

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._on_frame: OnFrame | None = None
        self._is_stream = False
        self._body = b""
        self._rest = b""
        self.is_open = False

    async def exchange(self, request: bytes, on_frame: OnFrame | None = None) -> Answer:
        """Send, and wait for the whole answer. With `on_frame` a 200 is a stream, cut into frames. Raises Broken."""
        assert self._transport is not None, "connected before"
        self._answer = asyncio.get_running_loop().create_future()
        self._on_frame, self._body, self._rest = on_frame, b"", b""
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # What the transport and the parser call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Broken(str(exc or "the server closed the connection")))

    def on_headers_complete(self) -> None:
        self._is_stream = self._on_frame is not None and self._parser.get_status_code() == 200

    def on_body(self, body: bytes) -> None:
        if not self._is_stream or self._on_frame is None:
            self._body += body
            return
        *whole, self._rest = (self._rest + body).split(b"\n\n")
        for frame in whole:
            self._on_frame(frame)

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._parser.get_status_code(), self._body))


class Http:
    """Requests to one server over as many kept connections as are in use at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def ask(
        self,
        method: str,
        path: str,
        who: Identity,
        body: Mapping[str, Any] | None = None,
        on_frame: OnFrame | None = None,
    ) -> Answer:
        """One exchange. Raises Broken."""
        connection = await self._connection()
        answer = await connection.exchange(encode(method, path, who, body), on_frame)
        if connection.is_open and len(self._idle) < _IDLE_MAX:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return made


def encode(method: str, path: str, who: Identity, body: Mapping[str, Any] | None = None) -> bytes:
    """A request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {who.key}\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    data = msgspec.json.encode(body)
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
