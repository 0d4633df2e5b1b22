"""Without keys a foreign page in a browser on the same machine gets nowhere (ORCH-3203, ORCH-3204)."""

import asyncio

import pytest

from llorch.api.guard import is_loopback
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import LEASE, NODE, TASK

BODY = b'{"model_ref":"smol","prompt":"x"}'
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:8080", "127.8.9.1:80", "[::1]", "[::1]:8080"]
)
def test_loopback_names_and_addresses_are_this_machine(host: str) -> None:
    assert is_loopback(host.encode())


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "0.0.0.0",
        "[::2]",
        "[::1",
        "::1",
        "localhost:80:80",
        "localhost:evil",
        "[::1]evil.example",
        "\xe9",
    ],
)
def test_other_hosts_are_not_this_machine(host: str) -> None:
    assert not is_loopback(host.encode("latin-1"))


async def test_rebound_name_is_forbidden_everywhere(keyless: Client) -> None:
    for path in ("/healthz", "/v1/tasks", "/metrics", "/nope"):
        response = await keyless.get(path, headers={"Host": "evil.example"})
        assert (response.status_code, response.json()["code"]) == (403, "FORBIDDEN")


async def test_token_of_a_node_opens_no_rebound_name(keyless: Client) -> None:
    """ORCH-2105: a server without keys is for this machine only, for nodes as for everybody."""
    headers = keyless.edge.bearer(NODE)
    params = {"lease_id": LEASE}
    refused = await keyless.delete(f"/v1/nodes/{NODE}", params=params, headers=headers | {"Host": "evil.example"})
    assert (refused.status_code, keyless.edge.nodes.left) == (403, [])
    assert (await keyless.delete(f"/v1/nodes/{NODE}", params=params, headers=headers)).status_code == 204


async def test_two_host_headers_are_forbidden(keyless: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", keyless.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 403 ")
    writer.close()


async def test_page_of_another_origin_is_forbidden_and_gets_no_cors_header(keyless: Client) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"):
        for method, path in (("POST", f"/v1/tasks/{TASK}/cancel"), ("GET", "/v1/tasks"), ("OPTIONS", "/v1/tasks")):
            response = await keyless.request(method, path, headers={"Origin": origin})
            assert response.status_code == 403, (origin, method)
            assert not [name for name in response.headers if name.startswith("access-control")]
    assert keyless.edge.tasks.canceled == []


async def test_page_of_the_same_origin_is_served_without_cors_headers(keyless: Client) -> None:
    response = await keyless.get("/v1/tasks", headers={"Origin": f"http://127.0.0.1:{keyless.port}"})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_body_that_a_form_could_send_is_refused(keyless: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        for path in ("/v1/tasks", f"/v1/tasks/{TASK}/cancel"):
            response = await keyless.post(path, content=BODY, headers={"Content-Type": kind})
            assert response.status_code == 415, (kind, path)
    assert keyless.edge.tasks.submissions == []
    assert keyless.edge.tasks.canceled == []


async def test_everybody_is_the_tenant_local_whatever_key_comes(keyless: Client) -> None:
    for headers in ({}, {"Authorization": "Bearer llk_other"}, {"Authorization": "junk"}):
        assert (await keyless.post("/v1/tasks", content=BODY, headers=JSON | headers)).status_code == 202
    assert {submission.tenant for submission in keyless.edge.tasks.submissions} == {"local"}


async def test_with_keys_any_host_is_served(client: Client) -> None:
    headers = {"Host": "llorch.example", "Origin": "http://elsewhere.example"}
    response = await client.get("/v1/tasks", headers=headers)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_too_many_header_bytes_are_refused(client: Client) -> None:
    for oversized in ({"headers": {"X-Long": "x" * 3000}}, {"params": {"limit": "1" * 3000}}):
        response = await client.get("/v1/tasks", **oversized)  # type: ignore[arg-type]
        assert (response.status_code, response.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
