"""Bodies are bounded, JSON, and validated by the generated model (ORCH-2045, ORCH-2046, ORCH-3205)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llorch.api.bodies import JsonBody, is_json
from llorch.errors import SchemaFault
from llorch_contract import models
from tests.unit.api.conftest import Client

BODY = b'{"model_ref":"smol","prompt":"x"}'
JSON = {"Content-Type": "application/json"}


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON;charset=UTF-8",
        'application/json; charset="utf-8"',
        "application/json;profile=x",
    ],
)
def test_json_in_utf8_is_json(kind: str) -> None:
    assert is_json(kind.encode())


@pytest.mark.parametrize(
    "kind", ["", "text/json", "application/json; charset=latin-1", "application/jsonx", "application/problem+json"]
)
def test_other_media_types_are_not_json(kind: str) -> None:
    assert not is_json(kind.encode())


async def test_wrong_media_type_is_unsupported(client: Client) -> None:
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=utf-16"},
        {},
        JSON | {"Content-Encoding": "gzip"},
    ):
        response = await client.post("/v1/tasks", content=BODY, headers=headers)
        assert (response.status_code, response.json()["code"]) == (415, "INVALID_PARAMS"), headers


async def test_chunked_body_is_accepted(client: Client) -> None:
    response = await client.post("/v1/tasks", content=pieces(BODY[:5], BODY[5:9], BODY[9:]), headers=JSON)
    assert response.status_code == 202
    assert client.edge.tasks.submissions[0].prompt == "x"


async def test_missing_body_is_a_schema_fault(client: Client) -> None:
    for headers in (JSON, {}):
        response = await client.post("/v1/tasks", headers=headers)
        assert (response.status_code, response.json()["message"]) == (400, "a body is required")
    assert (await client.post("/v1/tasks", content=pieces(), headers=JSON)).status_code == 400


async def test_body_over_the_limit_is_too_large_by_its_announced_length(client: Client) -> None:
    response = await client.post("/v1/tasks", content=b" " * 4097, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert response.json()["details"] == {"limit_bytes": 4096}


async def test_body_at_the_limit_is_read(client: Client) -> None:
    assert (await client.post("/v1/tasks", content=BODY.ljust(4096), headers=JSON)).status_code == 202


async def test_announced_length_is_refused_before_anything_is_sent(client: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    auth = client.headers["Authorization"]
    writer.write(
        f"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nAuthorization: {auth}\r\nContent-Type: application/json\r\n"
        "Expect: 100-continue\r\nContent-Length: 999999\r\n\r\n".encode()
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_chunked_body_over_the_limit_is_refused_while_it_comes(client: Client) -> None:
    """The last chunk never comes: the answer must not wait for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    auth = client.headers["Authorization"]
    writer.write(
        f"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nAuthorization: {auth}\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    for _ in range(5):
        writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head
    writer.close()
    assert client.edge.tasks.submissions == []


async def test_client_that_sends_everything_first_still_gets_the_refusal(client: Client) -> None:
    """Closing at once would reset the connection under the client's hands, and its answer with it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    auth, body = client.headers["Authorization"], b" " * 8_000_000
    writer.write(
        f"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nAuthorization: {auth}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
    )
    for start in range(0, len(body), 100_000):
        writer.write(body[start : start + 100_000])
        await writer.drain()
    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe",
        b'{"model_ref":"smol","prompt":"\xff"}',
        b"{",
        b"nul",
        b'{"model_ref":"smol","prompt":"x",}',
        b'{"model_ref":"smol","prompt":"x","sampling":{"json_schema":{"a":NaN}}}',
        b'{"model_ref":"smol","prompt":"x","sampling":{"json_schema":{"a":[-Infinity]}}}',
        b'{"model_ref":"smol","prompt":"x","sampling":{"json_schema":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}}",
        b'\xef\xbb\xbf{"model_ref":"smol","prompt":"x"}',
    ],
)
async def test_what_is_not_json_is_a_schema_fault(raw: bytes) -> None:
    fault = await fault_of(raw)
    assert fault.message == "the body is not valid JSON"


async def test_the_word_nan_in_a_text_is_just_a_text() -> None:
    body = await read(b'{"model_ref":"smol","prompt":"NaN Infinity"}')
    assert body.prompt == "NaN Infinity"


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"max_tokens": 0}, "/max_tokens", "must be at least 1"),
        ({"max_tokens": "5"}, "/max_tokens", "must be an integer"),
        ({"max_tokens": None}, "/max_tokens", "must be an integer"),
        ({"model_ref": "a b"}, "/model_ref", "must match ^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}$"),
        ({"priority": "urgent"}, "/priority", "must be 'interactive' or 'batch'"),
        ({"colour": 1}, "/colour", "is not known here"),
        ({"sampling": {"temperature": 9}}, "/sampling/temperature", "must be at most 5.0"),
        ({"prompt": ""}, "/prompt", "must have at least 1 character(s)"),
        ({"seed": 2**32 - 1}, "/seed", "must be at most 4294967294"),
        ({"messages": [{"role": "user", "content": "x"}]}, "", "exactly one of prompt, messages, inputs is required"),
        ({"a/b~c": 1}, "/a~1b~0c", "is not known here"),
    ],
)
async def test_schema_fault_says_where_and_what_was_expected(change: dict[str, Any], path: str, reason: str) -> None:
    fault = await fault_of(json.dumps({"model_ref": "smol", "prompt": "x"} | change).encode())
    assert fault.details == {"path": path, "reason": reason}
    assert fault.message.endswith(reason)


async def test_schema_fault_never_repeats_the_input() -> None:
    for body in ({"model_ref": "top secret"}, {"model_ref": "smol", "prompt": ["top secret"]}, ["top secret"]):
        fault = await fault_of(json.dumps(body).encode())
        assert "secret" not in fault.message + str(fault.details)


async def test_a_body_full_of_faults_gets_a_short_answer_peer_bug_14() -> None:
    """Listing hundreds of thousands of faults would hold up the event loop for everybody."""
    fault = await fault_of(json.dumps({"model_ref": "smol"} | {f"a{i}": 1 for i in range(1000)}).encode())
    assert fault.details == {"path": "", "reason": "too many faults"}
    long_name = await fault_of(json.dumps({"model_ref": "smol", "prompt": "x", "y" * 9000: 1}).encode())
    assert len(long_name.message) < 200


async def read(raw: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    return await JsonBody(models.TaskRequest, 100_000).read({b"content-type": b"application/json"}, receive)


async def fault_of(raw: bytes) -> SchemaFault:
    with pytest.raises(SchemaFault) as caught:
        await read(raw)
    return caught.value
