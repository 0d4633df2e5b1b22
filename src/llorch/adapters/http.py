"""The streaming HTTP/1.1 client of the engine adapters: a pool of keep-alive connections to one replica.

It owns connecting, reuse, the retry that reuse makes necessary, and the mapping of what the network can raise to
LlorchErrors. It refuses to know any engine's protocol. Made for token streams: see `llorch.adapters.connections`.
"""

import asyncio
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from llorch.adapters.connections import Connection, Response
from llorch.errors import ConfigError, LlorchError, WorkerReset

MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024
"""Largest ordinary (not streamed) answer that is accepted."""

_IDLE_CONNECTIONS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an engine may take, in seconds, each > 0."""

    connect_s: float = 5.0
    """Until the connection stands, TLS included; then WorkerReset."""
    first_byte_s: float = 300.0
    """From a streamed request to the first byte of its answer, the engine's own queue included; then DecodeTimeout."""
    idle_s: float = 60.0
    """Between two arrivals of a streamed answer; then DecodeTimeout."""
    answer_s: float = 30.0
    """First byte, and any pause, of an ordinary answer (tokenize, templates); then DecodeTimeout."""
    probe_s: float = 5.0
    """The same for probes: health, properties, slots; then DecodeTimeout."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An ordinary answer, complete."""

    status: int
    body: bytes


@contextmanager
def typed_errors(authority: str, *, engine: str | None = None) -> Iterator[None]:
    """Map what sockets, TLS and name look-up raise to WorkerReset, and name the engine in every LlorchError."""
    try:
        yield
    except LlorchError as exc:
        exc.engine = exc.engine or engine
        raise
    except TimeoutError as exc:
        raise WorkerReset(f"The engine at {authority} could not be reached in time.", engine=engine) from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise WorkerReset(f"The engine at {authority} cannot be reached: {reason}.", engine=engine) from exc


class HttpClient:
    """Client of one server. Connections that ended an answer are kept for the next one and dropped before the
    server drops them; each serves one request at a time, and there is no upper bound but the caller's slots.

    Raises ConfigError when `base_url` is not an http(s) URL or a header is not printable ASCII.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeouts: Timeouts | None = None,
        ssl_context: ssl.SSLContext | None = None,
        engine: str | None = None,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ConfigError(f"{base_url!r} is not the URL of an engine, such as http://127.0.0.1:8081.")
        self.authority = url.netloc.rpartition("@")[2]
        self.timeouts = timeouts or Timeouts()
        self.engine = engine
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._ssl = (ssl_context or ssl.create_default_context()) if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        self._head = _encode_headers({"Host": self.authority, "Accept": "*/*", **(headers or {})})
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._reaper: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def request(self, method: str, path: str, body: bytes = b"", *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its whole answer, whatever its status.

        Raises WorkerReset or DecodeTimeout; `timeout_s` replaces `Timeouts.answer_s`.
        """
        pause_s = timeout_s or self.timeouts.answer_s
        response = await self._exchange(method, path, body, first_byte_s=pause_s, idle_s=pause_s)
        with typed_errors(self.authority, engine=self.engine):
            try:
                return Answer(response.status, await response.read(MAX_ANSWER_BYTES))
            finally:
                await response.aclose()

    async def stream(self, method: str, path: str, body: bytes = b"") -> Response:
        """Send a request and return its answer as soon as its status is known. The caller must close it.

        Raises WorkerReset or DecodeTimeout.
        """
        timeouts = self.timeouts
        return await self._exchange(method, path, body, first_byte_s=timeouts.first_byte_s, idle_s=timeouts.idle_s)

    async def aclose(self) -> None:
        """Close every connection; answers under way end with an error. Idempotent."""
        self._is_closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        connections = list(self._open)
        for connection in connections:
            connection.abort(WorkerReset("The connection to the engine was closed by llorch."))
        for connection in connections:
            await connection.wait_closed()

    async def _exchange(self, method: str, path: str, body: bytes, *, first_byte_s: float, idle_s: float) -> Response:
        """Send, and return when the head of the answer is here.

        A server may close an idle connection in the moment it is used again. Then, and only when no byte of an answer
        came, the request is sent once more, on a new connection; every other retry is the caller's decision.
        """
        request = self._encode(method, path, body)
        with typed_errors(self.authority, engine=self.engine):
            if self._is_closed:
                raise WorkerReset("The connection to the engine was closed by llorch.")
            connection = self._take_idle()
            if connection is not None:
                response = connection.send(request, first_byte_s=first_byte_s, idle_s=idle_s)
                try:
                    return await _with_head(response)
                except WorkerReset:
                    if response.begun or self._is_closed:
                        raise
            connection = await self._connect()
            return await _with_head(connection.send(request, first_byte_s=first_byte_s, idle_s=idle_s))

    def _encode(self, method: str, path: str, body: bytes) -> bytes:
        length = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n" if body else ""
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{length}\r\n".encode("latin-1") + body

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(self._on_idle, self._on_lost)
        try:
            async with asyncio.timeout(self.timeouts.connect_s):
                await loop.create_connection(lambda: connection, self._host, self._port, ssl=self._ssl)
            if self._is_closed or not connection.is_open:
                raise ConnectionResetError("the connection was closed as soon as it stood")
        except BaseException:
            connection.abort(WorkerReset())
            raise
        self._open.add(connection)
        return connection

    def _take_idle(self) -> Connection | None:
        """The connection used last, so that those which are not needed grow old."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.expires_at > now:
                return connection
            connection.abort(WorkerReset())
        return None

    def _on_idle(self, connection: Connection) -> None:
        if self._is_closed or len(self._idle) >= _IDLE_CONNECTIONS_MAX:
            connection.abort(WorkerReset())
            return
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().call_at(connection.expires_at, self._reap)

    def _on_lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _reap(self) -> None:
        """Drop what has grown old; one timer serves all idle connections."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._reaper = None
        old = [connection for connection in self._idle if connection.expires_at <= now]
        self._idle = [connection for connection in self._idle if connection.expires_at > now]
        for connection in old:
            connection.abort(WorkerReset())
        if self._idle:
            self._reaper = loop.call_at(min(each.expires_at for each in self._idle), self._reap)


async def _with_head(response: Response) -> Response:
    try:
        await response.read_head()
    except BaseException:
        await response.aclose()
        raise
    return response


def _encode_headers(headers: Mapping[str, str]) -> str:
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(f"The header {name} of an engine has characters that HTTP does not allow.")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())
