"""Whether an engine answers: one plain HTTP GET, on a connection of its own. What the answer means is not judged."""

import asyncio
from urllib.parse import urlsplit


async def ask(url: str, *, api_key: str, timeout_s: float) -> int | None:
    """The status of the answer to GET; None when there is none within `timeout_s` seconds. 0: it is no HTTP."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask(url, api_key)
    except (OSError, TimeoutError):
        return None


async def _ask(url: str, api_key: str) -> int | None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
            return None  # TCP lets a client find itself where nobody listens, if it happens upon the same port
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        head = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {api_key}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode())
        return _status(await _read_line(reader))
    finally:
        writer.close()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError:
        return b"a line without an end"


def _status(line: bytes) -> int | None:
    """The status in the first line; None without one, because it hung up."""
    if not line:
        return None
    words = line.split()
    return int(words[1]) if line.startswith(b"HTTP/") and len(words) > 1 and words[1].isdigit() else 0
