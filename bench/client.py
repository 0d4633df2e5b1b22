"""The load client: streams and requests over raw asyncio protocols, cheap enough to share a core with the engine.

It checks what it receives: status codes, the number of token frames, and that every stream has its proper end.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httptools

from bench.processes import BenchError


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the answer of a server is counted: `token` is in every token frame and no other, `end` in the last frame."""

    token: bytes
    end: bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What one stream asks on its connection, one request after the other; the last answer is the stream.

    `statuses` are those that the answers must have.
    """

    requests: tuple[bytes, ...]
    statuses: tuple[int, ...]


@dataclass(slots=True)
class Gauge:
    """How many streams are open now, and were at most."""

    expected: int
    open: int = 0
    peak: int = 0
    are_all_open: asyncio.Event = field(default_factory=asyncio.Event)

    def opened(self) -> None:
        self.open += 1
        self.peak = max(self.peak, self.open)
        if self.open == self.expected:
            self.are_all_open.set()


class StreamClient(asyncio.Protocol):
    """One connection with one stream. `done` gets None when the connection is over, in whatever way."""

    __slots__ = (
        "_dialect",
        "_gauge",
        "_is_open",
        "_last",
        "_order",
        "_parser",
        "_rest",
        "_sent",
        "_statuses",
        "_transport",
        "done",
        "first_token_at",
        "is_complete",
        "started_at",
        "tokens",
    )

    def __init__(self, order: Order, dialect: Dialect, gauge: Gauge) -> None:
        self._order = order
        self._dialect = dialect
        self._gauge = gauge
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sent = 0
        self._is_open = False
        self._statuses: list[int] = []
        self._rest = b""
        self._last = b""
        self.tokens = 0
        self.is_complete = False
        self.started_at = 0.0
        self.first_token_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.started_at = time.perf_counter()
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the interface is asyncio's)
        self._end()

    def _send_next(self) -> None:
        if self._transport is not None:
            self._transport.write(self._order.requests[self._sent])
            self._sent += 1

    def _end(self) -> None:
        if not self.done.done():
            self._gauge.open -= self._is_open
            self._is_open = False
            self.done.set_result(None)
        if self._transport is not None:
            self._transport.close()

    def on_headers_complete(self) -> None:
        self._statuses.append(self._parser.get_status_code())
        if self._sent == len(self._order.requests):
            self._is_open = True
            self._gauge.opened()

    def on_body(self, body: bytes) -> None:
        if self._sent < len(self._order.requests):
            return
        data = self._rest + body if self._rest else body
        if data.endswith(b"\n\n"):
            self._rest = b""
        else:
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:
                self._rest = data
                return
            data, self._rest = data[:cut], data[cut:]
        self.tokens += data.count(self._dialect.token)
        self._last = data
        if self.tokens and not self.first_token_at:
            self.first_token_at = time.perf_counter()

    def on_message_complete(self) -> None:
        if self._sent < len(self._order.requests) and self._statuses[-1] == self._order.statuses[self._sent - 1]:
            # The parser goes on with the next answer when this callback has returned.
            self._send_next()
            return
        self.is_complete = True
        self._end()

    def find_fault(self, tokens: int) -> str | None:
        """What is wrong with the stream, which should have had so many tokens."""
        if tuple(self._statuses) != self._order.statuses:
            return f"status codes {self._statuses} instead of {list(self._order.statuses)}: {self._last[-300:]!r}"
        if self.tokens != tokens:
            return f"{self.tokens} token frames instead of {tokens}"
        if not self.is_complete or self._rest or self._dialect.end not in self._last:
            return f"no proper end after {self._last[-300:]!r}"
        return None


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """What a round of streams took; `first_token_s` per stream, from the first request sent. All in seconds."""

    first_token_s: list[float]
    elapsed_s: float
    peak_open: int


async def run_streams(
    port: int,
    orders: Sequence[Order],
    dialect: Dialect,
    *,
    tokens: int,
    stagger_s: float,
    timeout_s: float,
    on_all_open: Callable[[], Awaitable[None]] | None = None,
) -> StreamsResult:
    """Open all streams, one every `stagger_s`, and read them to their ends.

    `on_all_open` is awaited once every stream has its head. Raises BenchError if a stream is not as it must be.
    """
    loop = asyncio.get_running_loop()
    gauge = Gauge(len(orders))
    clients = [StreamClient(order, dialect, gauge) for order in orders]
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            for number, client in enumerate(clients):
                pause = begun + number * stagger_s - time.perf_counter()
                if pause > 0:
                    await asyncio.sleep(pause)
                await loop.create_connection(partial(_same, client), "127.0.0.1", port)
            if on_all_open is not None:
                await gauge.are_all_open.wait()
                await on_all_open()
            await asyncio.gather(*(client.done for client in clients))
    except TimeoutError:
        unfinished = sum(not client.done.done() for client in clients)
        raise BenchError(f"{unfinished} of {len(clients)} streams had not ended after {timeout_s:g} s") from None
    elapsed = time.perf_counter() - begun
    faults = [fault for client in clients if (fault := client.find_fault(tokens)) is not None]
    if faults:
        raise BenchError(f"{len(faults)} of {len(clients)} streams are wrong; the first: {faults[0]}")
    return StreamsResult([client.first_token_at - client.started_at for client in clients], elapsed, gauge.peak)


def _same(client: StreamClient) -> StreamClient:
    return client


class _RequestClient(asyncio.Protocol):
    """One keep-alive connection: the next request leaves when the answer to the one before is complete."""

    def __init__(self, requests: Sequence[bytes], status: int) -> None:
        self._requests = iter(requests)
        self._status = status
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self.answered = 0
        self.wrong: int | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the interface is asyncio's)
        if not self.done.done():
            self.done.set_result(None)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != self._status:
            self.wrong = status

    def on_message_complete(self) -> None:
        self.answered += 1
        self._send_next()

    def _send_next(self) -> None:
        request = None if self.wrong is not None else next(self._requests, None)
        if self._transport is None:
            return
        if request is None:
            self._transport.close()
        else:
            self._transport.write(request)


async def run_requests(port: int, requests: Sequence[bytes], *, status: int, timeout_s: float) -> float:
    """Send the requests on one connection, each after the answer to the one before; seconds that it took.

    Raises BenchError when an answer has another status or is missing.
    """
    client = _RequestClient(requests, status)
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", port)
            await client.done
    except TimeoutError:
        raise BenchError(f"{client.answered} of {len(requests)} requests were answered in {timeout_s:g} s") from None
    if client.wrong is not None or client.answered != len(requests):
        raise BenchError(f"{client.answered} of {len(requests)} answered, status {client.wrong} instead of {status}")
    return time.perf_counter() - begun
