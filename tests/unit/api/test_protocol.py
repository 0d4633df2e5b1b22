"""What never becomes a request wears the envelope too (ORCH-2045, ORCH-3205)."""

import asyncio
from typing import Any

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


POST = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Correlation-Id: a\r\nContent-Type: application/json\r\n"
TASK = b'{"task_id":"%b","session_id":"%b","model_ref":"smol","prompt":"x"}' % (
    (b"0" * 8 + b"-0000" * 3 + b"-" + b"0" * 12,) * 2
)
LIVE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Correlation-Id: %b\r\n%b\r\n"
LAST = LIVE % (b"last", b"Connection: close\r\n")


async def talk(port: int, *pieces: bytes) -> bytes:
    """All that the server says until it closes. The last request of `pieces` has to ask for that."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    said = await reader.read()
    writer.close()
    return said


async def test_response_in_one_write_is_what_uvicorn_would_have_sent() -> None:
    edge = Edge(is_keyless=True)
    at_once: list[bool] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            at_once[-1] = False
            await send(message)

        at_once.append(True)
        await edge.app(scope, receive, sent)

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        scope.pop("extensions", None)
        await edge.app(scope, receive, send)

    length = b"Content-Length: %d\r\n" % len(TASK)
    talks: list[tuple[list[bool], list[bytes]]] = [
        ([True, True, False], [LIVE % (b"1", b""), LIVE % (b"2", b""), LAST]),
        ([True, True, False], [LIVE % (b"1", b"") + LIVE % (b"2", b"") + LAST]),
        ([True, False], [POST + length + b"\r\n" + TASK, LAST]),
        ([True, False], [POST + length + b"Expect: 100-continue\r\n\r\n", TASK, LAST]),
        ([True, False], [POST + b"Content-Length: 1\r\n\r\n{", LAST]),
        ([False, False], [LIVE.replace(b"GET", b"PUT") % (b"1", b""), LAST]),
        ([False, False], [LIVE.replace(b"GET /healthz", b"HEAD /nope") % (b"1", b""), LAST]),
        ([False], [LIVE.replace(b"/1.1", b"/1.0") % (b"1", b"")]),
    ]
    async with serving(watched) as port, serving(plain) as plain_port:
        for expected, pieces in talks:
            at_once.clear()
            assert await talk(port, *pieces) == await talk(plain_port, *pieces), pieces
            assert at_once == expected, pieces
