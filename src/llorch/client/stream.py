"""Following one task's stream over as many connections as it takes.

The cursor moves with every durable frame that is handed out and with nothing else, so a connection that breaks, however
early, costs nothing: the next one continues after the cursor.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from llorch.client.errors import ApiError, ClientError, ProtocolFault, StreamLost, Unreachable
from llorch.client.events import End, ErrorEvent, Event, decode
from llorch.client.patience import Draw, backoff_s
from llorch.client.sse import Frame, FrameParser
from llorch.client.transport import Transport

STEADY_S: Final = 5.0
"""A connection that held this long was a good one, even when a waiting task had nothing durable to say."""

_PASSING_STATUSES: Final = frozenset({500, 502, 504})
"""Answers that a server in trouble, or a proxy before one that restarts, gives for a while."""


class Follower:
    """One reader of one task, from the frame after `after` to the terminal one."""

    def __init__(self, transport: Transport, path: str, task_id: str, after: int, *, resumes: int, draw: Draw) -> None:
        self._transport = transport
        self._path = path
        self._task_id = task_id
        self._after = after
        self._cursor = after
        self._resumes = resumes
        self._draw = draw
        self._failures = 0
        self._has_met = False
        self._is_over = False

    async def events(self) -> AsyncGenerator[Event, None]:
        """Every durable event once, in order, and what advice comes.

        Raises StreamLost after `resumes` failures in a row without progress, Unreachable when the first connection
        cannot be made, ApiError, ProtocolFault.
        """
        clock = asyncio.get_running_loop().time
        while True:
            opened_at = clock()
            try:
                async with aclosing(self._connection()) as events:
                    async for event in events:
                        yield event
                if self._is_over:
                    return
                lost: ClientError = Unreachable("the connection ended before the task did", dropped=True)
            except Unreachable as exc:
                lost = exc
            except ApiError as exc:
                if exc.status not in _PASSING_STATUSES:
                    raise
                lost = exc
            if clock() - opened_at >= STEADY_S:
                self._failures = 0
            await self._back_off(lost)

    async def _connection(self) -> AsyncGenerator[Event, None]:
        """The events of one connection, until it ends or the task does."""
        headers = {"Last-Event-ID": str(self._cursor)} if self._cursor else {}
        async with self._transport.open(self._path, headers) as chunks:
            if chunks is None:
                self._check_nothing_missed()
                return
            self._has_met = True
            parser = FrameParser()
            async for chunk in chunks:
                for frame in parser.feed(chunk):
                    event = self._take(frame)
                    if event is not None:
                        yield event
                    if self._is_over:
                        return

    def _take(self, frame: Frame) -> Event | None:
        event = decode(frame, self._cursor + 1)
        if frame.id is not None:
            self._cursor += 1
            self._failures = 0
        self._is_over = isinstance(event, End | ErrorEvent)
        return event

    def _check_nothing_missed(self) -> None:
        """204 says that the cursor is at the terminal frame, which is true only of a cursor that the caller brought."""
        if self._cursor != self._after:
            raise ProtocolFault(
                f"the stream of task {self._task_id} ended after frame {self._cursor} without a terminal frame"
            )
        self._is_over = True

    async def _back_off(self, lost: ClientError) -> None:
        if not self._has_met and not (isinstance(lost, Unreachable) and lost.dropped):
            raise lost
        self._failures += 1
        if self._failures > self._resumes:
            raise StreamLost(self._task_id, self._cursor, lost) from lost
        await self._transport.wait(backoff_s(self._failures, self._draw), lost)
