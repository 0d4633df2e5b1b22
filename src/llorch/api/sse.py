"""Server-sent events on the wire: a reader's frames go out as they come, and a client that is gone is noticed.

Nothing is done per token but a read and a send.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Receive

from llorch.api.exchange import Exchange
from llorch.errors import StreamGone
from llorch.service.streams import Reader

HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))


class Following(AsyncIterator[bytes]):
    """A reader of a task as a reply of the contract holds it. Whoever sends it calls `reader.leave`."""

    __slots__ = ("reader",)

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    async def __anext__(self) -> bytes:
        chunk = await self.reader.read()
        if not chunk:
            raise StopAsyncIteration
        return chunk


async def send_events(exchange: Exchange, status: int, reader: Reader) -> None:
    """Send everything that the reader gets, until the terminal frame or until the client has left.

    The reader has left when this returns, however it does.
    """
    watch = asyncio.ensure_future(_leave_when_disconnected(exchange.receive, reader))
    try:
        await exchange.start(status, HEADERS)
        await _relay(exchange, reader)
    finally:
        watch.cancel()
        reader.leave()


async def _relay(exchange: Exchange, reader: Reader) -> None:
    read, write = reader.read, exchange.write
    more = True
    while more:
        try:
            chunk = await read()
        except StreamGone:
            # The transcript expired under a reader that was too slow: what it has is all that it gets.
            await write(b"")
            return
        more = not reader.is_done
        await write(chunk, more=more)


async def _leave_when_disconnected(receive: Receive, reader: Reader) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reader.leave()
