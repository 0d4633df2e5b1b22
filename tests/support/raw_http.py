"""HTTP/1.1 over a bare socket, one connection for each request: for tests with very many clients at once.

Leaving a stream closes its socket, as a client that dies does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httptools
import httpx

CHUNK = 65_536


class RawResponse:
    """A response that is being read. Bounds for time are the caller's."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._has_headers = False
        self._is_complete = False
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def status(self) -> int:
        status: int = self._parser.get_status_code()
        return status

    async def read_headers(self) -> None:
        while not self._has_headers:
            await self._feed()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes, to its end. Raises EOFError when the connection breaks before."""
        while True:
            body, self._body = self._body, []
            if body:
                yield b"".join(body)
            elif self._is_complete:
                return
            else:
                await self._feed()

    async def read(self) -> httpx.Response:
        """The whole response."""
        content = b"".join([chunk async for chunk in self.chunks()])
        return httpx.Response(self.status, headers=self.headers, content=content)

    async def _feed(self) -> None:
        data = await self._reader.read(CHUNK)
        if not data:
            raise EOFError("the server closed the connection before the end of its answer")
        self._parser.feed_data(data)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() != b"transfer-encoding":
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._is_complete = True


@asynccontextmanager
async def exchange(
    url: str, method: str, path: str, headers: Mapping[str, str], body: Any = None
) -> AsyncIterator[RawResponse]:
    """Send a request, with a body as JSON where there is one; the socket is closed at the end, whatever came."""
    address = urlsplit(url)
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append("Content-Type: application/json")
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write("\r\n".join((*lines, "", "")).encode() + content)
        response = RawResponse(reader)
        await response.read_headers()
        yield response
    finally:
        writer.transport.abort()


async def request(url: str, method: str, path: str, headers: Mapping[str, str], body: Any = None) -> httpx.Response:
    """Send a request and read the whole answer."""
    async with exchange(url, method, path, headers, body) as response:
        return await response.read()
