"""What never becomes a request wears the envelope too (ORCH-2045, ORCH-3205)."""

import asyncio

from llorch_contract import models
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import Edge, serving


async def exchange(port: int, *pieces: bytes) -> tuple[bytes, models.Problem]:
    """Send the pieces on a fresh connection; the status line, and the body checked against the contract."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"\r\nx-correlation-id: " in head
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    return head.partition(b"\r\n")[0], models.Problem.model_validate_json(body)


async def test_malformed_http_wears_the_envelope(client: Client) -> None:
    for garbage in (
        b"BREW /healthz HTTP/1.1\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        status, problem = await exchange(client.port, garbage)
        assert status == b"HTTP/1.1 400 Bad Request", garbage
        assert problem.code == models.ErrorCode.INVALID_PARAMS


async def test_header_section_without_end_is_cut_off(client: Client) -> None:
    start = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: "
    status, problem = await exchange(client.port, start, *[b"x" * 1000] * 9)
    assert status.startswith(b"HTTP/1.1 413 ")
    assert problem.code == models.ErrorCode.PAYLOAD_TOO_LARGE


async def test_one_connection_too_many_is_refused_with_the_envelope() -> None:
    async with serving(Edge().app, connections=1) as port:
        _, first = await asyncio.open_connection("127.0.0.1", port)
        first.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        status, problem = await exchange(port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        first.close()
    assert status == b"HTTP/1.1 503 Service Unavailable"
    assert (problem.code, problem.retriable) == (models.ErrorCode.POOL_UNAVAILABLE, True)
