"""The connection as uvicorn's parser sees it, with the edge's answer to what never becomes a request.

Malformed HTTP, a header section without end and a connection too many wear the one envelope like every other error.
"""

import asyncio
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from llorch.api.correlation import Correlation
from llorch.api.exchange import RESPOND_EXTENSION
from llorch.api.problems import Problems, raw_response
from llorch.errors import LlorchError, PayloadTooLarge, PoolUnavailable, SchemaFault

BODY_EXTENSION = "llorch.body"
"""The ASGI extension under which a request's ChunkedBody is found."""


class ChunkedBody:
    """The body of a chunked response, for pieces that are many and small: no coroutine and no message for each.

    The beginning and the end of the response take ASGI's way.
    """

    __slots__ = ("_cycle", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write

    def try_write(self, piece: bytes) -> bool:
        """Write a piece that is not the last; False when it has to wait, or the response is not chunked."""
        cycle = self._cycle
        if cycle.flow.write_paused or not cycle.chunked_encoding:
            return False
        if not cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True


def respond_at_once(cycle: RequestResponseCycle, status: int, headers: bytes, body: bytes) -> bool:
    """Send a whole response in one write, if the connection is kept and nothing has been sent.

    False when it has to go ASGI's way: nothing is sent then. See `exchange.Respond`.
    """
    is_ready = cycle.keep_alive and not (cycle.response_started or cycle.disconnected or cycle.flow.write_paused)
    if not is_ready or cycle.default_headers or cycle.scope["method"] == "HEAD":
        return False
    cycle.waiting_for_100_continue = False
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"%b%b%b" % (STATUS_LINE[status], headers, body))
    cycle.message_event.set()
    cycle.on_response()
    return True


class Protocol(HttpToolsProtocol):
    """One connection. `header_bytes` bounds what is read of a header section, `connections` how many may be open.

    Given to uvicorn as `http=functools.partial(Protocol, header_bytes=…, connections=…)`.
    """

    def __init__(self, *args: Any, header_bytes: int, connections: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes = header_bytes
        self._most = connections
        self._header_size = 0
        self._is_in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Let it in, or answer all that it asks with a refusal."""
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self.app = _crowded

    def data_received(self, data: bytes) -> None:
        """Parse; a header section that is still open is bounded as it grows, its pieces not yet being headers."""
        super().data_received(data)
        if self._is_in_headers:
            self._header_size += len(data)
            if self._header_size > self._header_bytes and not self.transport.is_closing():
                self._refuse(PayloadTooLarge(f"the headers exceed {self._header_bytes} bytes"))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._is_in_headers = True
        self._header_size = 0

    def on_headers_complete(self) -> None:
        """What follows is body."""
        self._is_in_headers = False
        super().on_headers_complete()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            respond = partial(respond_at_once, cycle)
            extensions: dict[str, Any] = {BODY_EXTENSION: ChunkedBody(cycle), RESPOND_EXTENSION: respond}
            self.scope["extensions"] = extensions

    def send_400_response(self, msg: str) -> None:
        """The parser gave up."""
        self._refuse(SchemaFault(msg))

    def _refuse(self, error: LlorchError) -> None:
        self.transport.write(raw_response(error))
        self.transport.close()


async def _refuse_crowd(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise PoolUnavailable("too many connections are open", policy_label="connections")


_crowded = Correlation(Problems(_refuse_crowd))
