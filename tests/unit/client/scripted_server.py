"""A real HTTP server that answers what a test wrote down, to the byte: also half a frame and a broken connection."""

import asyncio
import json
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

TASK_ID = "6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a10"
SESSION_ID = "0b9f5a6c-77de-4c51-8f0e-5a3c2e1d4b60"
TASK = f"/v1/tasks/{TASK_ID}"
STREAM = f"{TASK}/stream"
CANCEL = f"{TASK}/cancel"

STARTED = {
    "queue_position": 0, "predicted_start_ms": None, "waited_ms": 3, "pool_id": "small", "replica_id": "small/0",
    "kv_warmth": None,
}  # fmt: skip
END = {
    "tokens_out": 2, "decode_ms": 5, "first_token_ms": 2, "waited_ms": 3, "finish_reason": "stop",
    "usage": {"prompt_tokens": 4, "completion_tokens": 2, "cached_tokens": None},
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """`is_dropped`: the connection is reset after the body. `is_held`: it stays open until the client leaves.

    `pieces` are sent one after the other, each its own TCP write, with `pause_s` between them.
    """

    status: int = 200
    pieces: tuple[bytes, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    is_dropped: bool = False
    is_held: bool = False
    pause_s: float = 0.0
    is_silent: bool = False
    """Not even a status line: the connection just ends."""


def body(value: Any, status: int = 200, **headers: str) -> Reply:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, (json.dumps(value).encode(),), {"Content-Type": "application/json", **names})


def problem(status: int, code: str, message: str = "told so", *, retriable: bool = False, **headers: str) -> Reply:
    envelope = {
        "code": code, "message": message, "engine": None, "pool_id": None, "retriable": retriable,
        "retry_after_ms": None, "policy_label": None, "details": None, "correlation_id": "req-1",
    }  # fmt: skip
    return body(envelope, status, **headers)


def frame(number: int | None, event: str, data: Any) -> bytes:
    id_line = f"id: {number}\n" if number is not None else ""
    return f"{id_line}event: {event}\ndata: {json.dumps(data)}\n\n".encode()


def transcript(*texts: str) -> list[bytes]:
    """The durable frames of a task that succeeded."""
    tokens = [frame(2 + index, "token", {"t": text, "i": index}) for index, text in enumerate(texts)]
    return [frame(1, "started", STARTED), *tokens, frame(2 + len(texts), "end", END)]


def stream(*pieces: bytes, is_dropped: bool = False, is_held: bool = False) -> Reply:
    return Reply(
        200, pieces, {"Content-Type": "text/event-stream; charset=utf-8"}, is_dropped=is_dropped, is_held=is_held
    )  # fmt: skip


def accepted(position: int = 0) -> Reply:
    return body(
        {
            "task_id": TASK_ID, "session_id": SESSION_ID, "state": "queued", "queue_position": position,
            "predicted_start_ms": None, "backoff_ms": None,
        },
        202,
    )  # fmt: skip


CANCELED = Reply(204)
SILENCE = Reply(is_silent=True)


class ScriptedServer:
    """Answers each (method, path) with its replies in order, the last one again and again. Runs in its own thread.

    With `tls` it speaks HTTPS.
    """

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._replies: dict[tuple[str, str], deque[Reply]] = defaultdict(deque)
        self._by_ending: dict[str, deque[Reply]] = defaultdict(deque)
        self.requests: list[Request] = []
        self._arrived = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls), self._loop
        ).result(5)
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def on(self, method: str, path: str, *replies: Reply) -> None:
        self._replies[method, path].extend(replies)

    def on_any_stream(self, *replies: Reply) -> None:
        """For tasks whose id the client makes up."""
        self._by_ending["stream"].extend(replies)

    def on_any_cancel(self, *replies: Reply) -> None:
        """For tasks whose id the client makes up."""
        self._by_ending["cancel"].extend(replies)

    def seen(self, method: str, path: str) -> list[Request]:
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def wait_for(self, method: str, path: str, timeout_s: float = 10.0) -> Request:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.seen(method, path), timeout_s):
                raise AssertionError(f"no {method} {path} within {timeout_s} s")
        return self.seen(method, path)[-1]

    async def _close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await _read(reader)
        by_ending = self._by_ending.get(request.path.rpartition("/")[2])
        replies = self._replies[request.method, request.path] if by_ending is None else by_ending
        reply = Reply(404) if not replies else replies[0] if len(replies) == 1 else replies.popleft()
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        if reply.is_silent:
            return False
        await _write(writer, reply)
        if reply.is_held:
            await reader.read(1)
        if reply.is_dropped:
            writer.transport.abort()
        return not (reply.is_dropped or reply.is_held)


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    url = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    return Request(method, url.path, query, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _write(writer: asyncio.StreamWriter, reply: Reply) -> None:
    is_open_ended = "event-stream" in reply.headers.get("Content-Type", "")
    length = {"Transfer-Encoding": "chunked"} if is_open_ended else {"Content-Length": str(sum(map(len, reply.pieces)))}
    if reply.status == 204:
        length = {}
    lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in {**reply.headers, **length}.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    await writer.drain()
    for piece in reply.pieces:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_open_ended else piece)
        await writer.drain()
        await asyncio.sleep(reply.pause_s)
    if is_open_ended and not (reply.is_dropped or reply.is_held):
        writer.write(b"0\r\n\r\n")
        await writer.drain()
