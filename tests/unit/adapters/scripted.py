"""Servers that follow a script, for what no engine does on purpose."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from llorch.adapters.http import HttpClient

COMPLETION = json.dumps({"prompt": "a b c", "n_predict": 5, "stream": True, "seed": 1}).encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def count_open(client: HttpClient) -> int:
    """Connections of the client that stand, idle ones included."""
    return len(client._open)


def count_idle(client: HttpClient) -> int:
    """Connections of the client that wait for another request."""
    return len(client._idle)


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The URL of a server that lets the script have every connection, after the head of its first request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    server.close()


def answers(*parts: bytes) -> Script:
    """A script that sends the parts and closes."""

    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return script


async def until_closed(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """A script that answers nothing and returns when the client closes."""
    while await reader.read(1024):
        pass
