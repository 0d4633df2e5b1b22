"""ORCH-2105: what a pool manager's client sends, whom it trusts, how long it waits, and what it makes of refusals."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llorch.client import ApiError, InvalidRequest, NodeClient, ProtocolFault, Timeouts, Unreachable
from llorch.client import nodes as room
from llorch.service.launching import Cause, HostFacts, LastError, LaunchReport, Phase
from llorch.service.nodes import Registration
from tests.unit.client.scripted_server import SILENCE, Reply, ScriptedServer, body, problem

CERTIFICATE = Path(__file__).parents[1] / "adapters" / "localhost.pem"
TOKEN = "lln_test"
LEASE = "00000000-0000-4000-8000-0000000000f1"
NODE = "/v1/nodes/gpu-2"
HEARTBEAT = f"{NODE}/heartbeat"
ORDERS = {"lease_id": LEASE, "lease_ms": 10_000, "heartbeat_ms": 2000, "wanted": [], "restarts": []}
HOST = HostFacts(ram_total_bytes=2, ram_available_bytes=1)
REPORT = LaunchReport("small/0", 3, Phase.WAITING, cause=Cause.EXIT, error=LastError("WORKER_RESET", "x" * 5000, 1.5))

Call = Callable[[NodeClient], Awaitable[object]]


async def register(client: NodeClient) -> object:
    return await client.register(Registration("gpu-2", "boot", "1.2.3", "10.0.0.2", HOST, (REPORT,)))


async def renew(client: NodeClient) -> object:
    return await client.renew("gpu-2", LEASE, host=HOST, reports=(REPORT,))


async def leave(client: NodeClient) -> None:
    await client.leave("gpu-2", LEASE)


every_call = pytest.mark.parametrize(
    ("call", "method", "path"),
    [(register, "PUT", NODE), (renew, "POST", HEARTBEAT), (leave, "DELETE", NODE)],
)


@asynccontextmanager
async def connected(url: str, *, ca_file: str | None = None) -> AsyncIterator[NodeClient]:
    client = NodeClient(url, TOKEN, ca_file=ca_file)
    try:
        yield client
    finally:
        await client.aclose()


async def test_what_a_node_tells_goes_out_under_its_token(server: ScriptedServer) -> None:
    server.on("PUT", NODE, body(ORDERS))
    server.on("POST", HEARTBEAT, body(ORDERS))
    server.on("DELETE", NODE, Reply(204))
    async with connected(server.url) as client:
        for call in (register, renew, leave):
            await call(client)
    joined, renewed, left = server.requests
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TOKEN}"}
    assert (joined.json["boot_id"], joined.json["manager_version"]) == ("boot", "1.2.3")
    assert renewed.json["replicas"] == joined.json["replicas"]
    assert (left.query, left.body) == ({"lease_id": LEASE}, b"")


async def test_last_words_of_an_engine_are_cut_to_what_the_contract_takes(server: ScriptedServer) -> None:
    """A heartbeat that is refused for its length would cost the node its lease."""
    server.on("POST", HEARTBEAT, body(ORDERS))
    async with connected(server.url) as client:
        await renew(client)
    assert server.requests[0].json["replicas"][0]["error"]["message"] == "x" * 4096


@every_call
@pytest.mark.parametrize(
    ("status", "code"), [(403, "FORBIDDEN"), (404, "NOT_FOUND"), (409, "CONFLICT"), (422, "INVALID_PARAMS")]
)
async def test_refusal_is_an_error_with_its_code(
    server: ScriptedServer, *, call: Call, method: str, path: str, status: int, code: str
) -> None:
    server.on(method, path, problem(status, code))
    async with connected(server.url) as client:
        with pytest.raises(ApiError) as told:
            await call(client)
    assert (told.value.status, told.value.code) == (status, code)


@every_call
@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (problem(503, "POOL_UNAVAILABLE", retriable=True, Retry_After="1"), ApiError),
        (SILENCE, Unreachable),
        (Reply(200, (b"{",), {"Content-Type": "text/event-stream"}, is_dropped=True), Unreachable),
    ],
)
async def test_nothing_is_sent_twice(
    server: ScriptedServer, *, call: Call, method: str, path: str, reply: Reply, error: type[Exception]
) -> None:
    """Whoever holds a lease knows when the next try is due, and has newer reports by then."""
    server.on(method, path, reply)
    async with connected(server.url) as client:
        with pytest.raises(error):
            await call(client)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [body({"lease_id": LEASE}), body({**ORDERS, "restarts": [{"replica_id": "p/0"}]}), Reply(200, (b"<html>",))],
)
async def test_orders_that_break_the_contract_are_a_fault(server: ScriptedServer, reply: Reply) -> None:
    server.on("POST", HEARTBEAT, reply)
    async with connected(server.url) as client:
        with pytest.raises(ProtocolFault):
            await renew(client)


def slow(**how: Any) -> Reply:
    return Reply(200, (b"{",) * 500, {"Content-Type": "text/event-stream"}, **how)


@pytest.mark.parametrize("reply", [slow(is_held=True), slow(pause_s=0.02)])
async def test_answer_that_does_not_end_is_given_up(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, reply: Reply
) -> None:
    """Also one that comes in drops: the lease goes on running."""
    monkeypatch.setattr(room, "TIMEOUTS", Timeouts(connect_s=0.2, answer_s=0.2))
    server.on("POST", HEARTBEAT, reply)
    async with connected(server.url) as client:
        with pytest.raises(Unreachable, match="in time"):
            await renew(client)


async def test_server_that_is_not_there_is_unreachable() -> None:
    async with connected("http://127.0.0.1:9") as client:
        with pytest.raises(Unreachable) as told:
            await renew(client)
    assert not told.value.dropped


async def test_server_is_held_against_the_given_certificates() -> None:
    """ORCH-3304."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    with ScriptedServer(tls=context) as server:
        server.on("POST", HEARTBEAT, body(ORDERS))
        async with connected(server.url, ca_file=str(CERTIFICATE)) as client:
            await renew(client)
        async with connected(server.url) as stranger:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await renew(stranger)
        assert len(server.requests) == 1, "the token went to a server that nobody vouches for"


def test_file_without_certificates_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(InvalidRequest, match="certificates"):
        NodeClient("https://h", TOKEN, ca_file=str(file))
    file.write_text("no certificate")
    with pytest.raises(InvalidRequest, match="certificates"):
        NodeClient("https://h", TOKEN, ca_file=str(file))
