"""What is refused before anything is looked up: too many header bytes and, without keys, what a browser could be told.

Without keys the machine itself is the only border. A foreign web page in a browser on it must not cross: neither under
a name that resolves to loopback (DNS rebinding) nor by requests that a browser sends without asking first.
"""

import ipaddress
import re
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from llorch.api.bodies import is_json
from llorch.api.exchange import Exchange, exchange_of
from llorch.errors import Forbidden, PayloadTooLarge, UnsupportedMediaType

_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]{1,5})?")


class Guard:
    """Checks the outside of every request. `header_bytes` bounds the request target and all headers together."""

    def __init__(self, app: ASGIApp, *, header_bytes: int, is_keyless: bool) -> None:
        self._app = app
        self._header_bytes = header_bytes
        self._is_keyless = is_keyless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check_size(scope)
            if self._is_keyless:
                _check_origin(exchange_of(scope))
        await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        size = len(scope["path"]) + len(scope["query_string"])
        for name, value in scope["headers"]:
            size += len(name) + len(value)
        if size > self._header_bytes:
            message = f"the headers exceed {self._header_bytes} bytes"
            raise PayloadTooLarge(message, details={"limit_bytes": self._header_bytes})


def _check_origin(exchange: Exchange) -> None:
    """1. Host is this machine. 2. a page that asks was served from here. 3. a body could not come from a plain form."""
    headers = exchange.headers
    host = headers.get(b"host", b"")
    if not is_loopback(host) or _has_two_hosts(exchange):  # 1
        raise Forbidden("without API keys only requests to a loopback name or address are answered")
    origin = headers.get(b"origin")
    if origin is not None and origin.lower() != b"http://" + host.lower():  # 2
        raise Forbidden("requests from other origins are not answered")
    if _has_body(headers) and not is_json(headers.get(b"content-type", b"")):  # 3
        raise UnsupportedMediaType(details={"choices": ["application/json"]})


@lru_cache(maxsize=64)
def is_loopback(host: bytes) -> bool:
    """Whether a Host header, with or without a port, names this machine: `localhost`, 127.0.0.0/8 or [::1]."""
    match = _HOST.fullmatch(host.decode("latin-1").lower())
    if match is None:
        return False
    try:
        return match["name"] == "localhost" or ipaddress.ip_address(match["v6"] or match["name"]).is_loopback
    except ValueError:
        return False


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _has_two_hosts(exchange: Exchange) -> bool:
    pairs = exchange.scope["headers"]
    return len(pairs) != len(exchange.headers) and sum(name == b"host" for name, _ in pairs) > 1
