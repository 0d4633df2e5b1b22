"""The outermost layer: gives every request its correlation id and refuses what is not HTTP."""

import os
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from llorch.api.exchange import SCOPE_KEY, Exchange, Observe

HEADER = b"x-correlation-id"

_is_valid = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch


def correlation_id_of(headers: list[tuple[bytes, bytes]]) -> str:
    """The caller's id when it has the contract's form, else a new one: what has another form is never echoed."""
    for name, value in headers:
        if name == HEADER and _is_valid(value):
            return value.decode("ascii")
    return new_correlation_id()


def new_correlation_id() -> str:
    """128 random bits in hex."""
    return os.urandom(16).hex()


class Correlation:
    """Opens the Exchange of a request."""

    def __init__(self, app: ASGIApp, observe: Observe | None = None) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            scope[SCOPE_KEY] = Exchange(scope, receive, send, correlation_id_of(scope["headers"]), self._observe)
            try:
                await self._app(scope, receive, send)
            finally:
                # What refers back to the request would keep it, and its connection, until a collection of garbage.
                del scope[SCOPE_KEY]
                scope.pop("extensions", None)
