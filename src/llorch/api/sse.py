"""Server-sent events on the wire: a reader's frames go out as they come, and a client that is gone is noticed.

A frame is sent by whoever appended it, within the same turn of the event loop: no task is woken for it. Only when the
client's buffer is full does a task wait until it has room.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, cast

import structlog
from starlette.types import Message

from llorch.api.exchange import Exchange
from llorch.api.protocol import BODY_EXTENSION, ChunkedBody
from llorch.service.streams import Reader

_log = structlog.get_logger("llorch.api")

HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))


class Following(AsyncIterator[bytes]):
    """A reader of a task as a reply of the contract holds it. `send_events` sends it and calls `reader.leave`."""

    __slots__ = ("reader",)

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


async def send_events(exchange: Exchange, status: int, reader: Reader) -> None:
    """Send everything that the reader gets, until the terminal frame or until the client has left.

    The reader has left when this returns, however it does.
    """
    sender = _Sender(exchange, reader)
    try:
        await exchange.start(status, HEADERS)
        reader.on_ready = sender.send_ready
        reader.write = sender.write_now
        sender.send_ready()
        # ASGI tells this when the client has left, and also when the response is complete.
        while (await exchange.receive())["type"] != "http.disconnect":
            pass
    finally:
        sender.stop()
        reader.leave()


class _Sender:
    """Sends what is ready, as long as that needs no waiting; what has to wait goes on in a task."""

    __slots__ = ("_reader", "_send", "_waiting", "write_now")

    def __init__(self, exchange: Exchange, reader: Reader) -> None:
        self._send = cast(Callable[[Message], Coroutine[Any, Any, None]], exchange.send)
        body: ChunkedBody | None = exchange.scope.get("extensions", {}).get(BODY_EXTENSION)
        self.write_now = body.try_write if body is not None else None
        self._reader = reader
        self._waiting: asyncio.Task[None] | None = None

    def send_ready(self) -> None:
        """Send all that the reader has to give."""
        if self._waiting is not None:
            return
        reader = self._reader
        chunk = reader.take()
        is_last = reader.is_done
        if is_last:
            reader.on_ready = None
        elif not chunk or (self.write_now is not None and self.write_now(chunk)):
            return
        sending = self._send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
        try:
            awaited = sending.send(None)
        except StopIteration:
            return
        except Exception as exc:  # noqa: BLE001 (whoever appended the frame has nothing to do with it)
            reader.on_ready = reader.write = None
            _log.error("stream_failed", exc_info=exc)
            return
        reader.write = None  # or a later token could be written between the client's having room and the task's turn
        self._waiting = asyncio.ensure_future(self._send_rest(sending, awaited))

    def stop(self) -> None:
        """Send nothing more."""
        if self._waiting is not None:
            self._waiting.cancel()

    async def _send_rest(self, sending: Coroutine[Any, Any, None], awaited: Any) -> None:
        await _Begun(sending, awaited)
        self._waiting = None
        if self._reader.on_ready is not None:
            self._reader.write = self.write_now
            self.send_ready()


class _Begun:
    """The rest of a coroutine that was begun outside of a task and came to a point where it has to wait."""

    __slots__ = ("_awaited", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        awaited = self._awaited
        while True:
            try:
                try:
                    result = yield awaited
                except BaseException as exc:  # noqa: BLE001 (whatever it is belongs to the coroutine)
                    awaited = self._coroutine.throw(exc)
                else:
                    awaited = self._coroutine.send(result)
            except StopIteration:
                return
