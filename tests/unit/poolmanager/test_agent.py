"""The agent of a node against the server's own registry: joining, renewing, obeying, the fence, the farewell.

Time is virtual; the relays listen on loopback. Processes do what the test says.
"""

import asyncio
import ssl
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from llorch.client.errors import ApiError, ClientError, Unreachable
from llorch.errors import Conflict, Internal, LaunchError, PoolUnready, Unauthenticated
from llorch.poolmanager.agent import DEBOUNCE_S, FIRST_RETRY_S, LAST_RETRY_S, LEAVE_S, SAFETY
from llorch.service.launching import Cause, Phase
from llorch.service.nodes import NodeState, Orders, Registration
from tests.unit.poolmanager.registered_node import (
    CERTIFICATE,
    HANG_S,
    HEARTBEAT_S,
    HOST,
    IDENTITY,
    LEASE_S,
    PEER,
    Node,
    Server,
    connect,
    echo,
    is_reset,
    joined,
    order,
    refusal,
)

# Joining


async def test_node_joins_and_runs_what_is_wanted_there_behind_its_relays() -> None:
    """ORCH-2105."""
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        up = server.last()
        assert (up.phase, up.incarnation, up.api_key) == (Phase.UP, 1, "k")
        assert node.engines.orders == {"small/0": order()}
        assert urlsplit(str(up.url)).hostname == PEER
        assert "test" not in str(up.url), "the engine itself is not told"
        assert server.registrations == [Registration("gpu-2", "boot-1", "0.4.1", PEER, HOST)]
        assert server.view().host == HOST


async def test_server_that_is_not_there_is_tried_again_at_growing_waits() -> None:
    server = Server()
    server.fault = Unreachable("cannot connect")
    node = Node(server)
    await asyncio.sleep(10.0)
    assert server.waits() == [FIRST_RETRY_S, 0.5, 1.0, LAST_RETRY_S, LAST_RETRY_S, LAST_RETRY_S, LAST_RETRY_S]
    server.fault = None
    await asyncio.sleep(LAST_RETRY_S)
    assert server.view().state is NodeState.JOINED
    await node.end()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_node_that_may_not_join_at_all_gives_up_with_the_reason(status: int) -> None:
    """ORCH-2109."""
    server = Server()
    told = refusal(Unauthenticated("the token is none of the configured ones"))
    server.fault = ApiError(status, told.problem)
    node = Node(server)
    with pytest.raises(LaunchError, match="UNAUTHENTICATED: the token is none of the configured ones"):
        await node.task
    assert server.steps() == ["register"]
    assert not node.engines.is_open


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "0.5.0"}, r"is llorch 0\.5\.0, this server is llorch 0\.4\.1"),
        ({"node_id": "gpu-9"}, "no node gpu-9"),
        ({"address": "10.1.2.3"}, r"may not be at 10\.1\.2\.3"),
    ],
)
async def test_registry_refuses_for_good_what_cannot_become_right(change: dict[str, str], says: str) -> None:
    """ORCH-2109."""
    with pytest.raises(LaunchError, match=says):
        await Node(Server(), identity=replace(IDENTITY, **change)).task


@pytest.mark.parametrize("status", [409, 429, 500, 502, 503])
async def test_statuses_that_pass_are_waited_out(status: int) -> None:
    server = Server()
    server.fault = ApiError(status, None)
    node = Node(server)
    await asyncio.sleep(10.0)
    server.fault = None
    await asyncio.sleep(LAST_RETRY_S)
    assert server.view().state is NodeState.JOINED
    await node.end()


async def test_node_that_another_manager_holds_is_taken_over_when_its_lease_is_over() -> None:
    """ORCH-2109."""
    server = Server()
    server.nodes.register(Registration("gpu-2", "boot-0", "0.4.1", PEER, HOST), PEER)
    node = Node(server)
    await asyncio.sleep(LEASE_S - 0.1)
    assert server.view().boot_id == "boot-0"
    assert node.engines.orders == {}
    await asyncio.sleep(LAST_RETRY_S + 0.1)
    assert server.view().boot_id == "boot-1"
    await node.end()


# Renewing


async def test_lease_is_renewed_as_often_as_the_server_says() -> None:
    server = Server()
    async with joined(server):
        await asyncio.sleep(30.0)
        assert server.steps() == ["register", *["renew"] * 15]
        assert set(server.waits()) == {HEARTBEAT_S}


async def test_news_of_processes_is_told_before_the_next_heartbeat_and_all_at_once() -> None:
    server = Server()
    server.manager.want(order("small/0"))
    server.manager.want(order("small/1"))
    async with joined(server) as node:
        await asyncio.sleep(HEARTBEAT_S / 2)
        server.calls.clear()
        began = server.clock.monotonic()
        node.engines.fail("small/0", Cause.EXIT)
        node.engines.up("small/0")
        await asyncio.sleep(DEBOUNCE_S / 2)
        node.engines.fail("small/1", Cause.SIGNAL)
        await asyncio.sleep(HEARTBEAT_S / 2)
        assert len(server.calls) == 1
        assert server.calls[0].at - began == pytest.approx(DEBOUNCE_S)
        told = {report.replica_id: report for report in server.calls[0].reports}
        assert (told["small/0"].phase, told["small/0"].incarnation) == (Phase.UP, 2)
        assert (told["small/1"].phase, told["small/1"].cause) == (Phase.WAITING, Cause.SIGNAL)


@pytest.mark.parametrize("fault", [Unreachable("no answer"), ApiError(503, None), refusal(PoolUnready("not now"))])
async def test_heartbeat_that_fails_is_sent_again_soon_and_the_lease_goes_on(fault: ClientError) -> None:
    """A lost heartbeat costs a retry, not the time until the next one is due."""
    server = Server()
    async with joined(server):
        await asyncio.sleep(HEARTBEAT_S)
        server.calls.clear()
        server.fault = fault
        await asyncio.sleep(HEARTBEAT_S + FIRST_RETRY_S + 0.6)
        assert server.waits() == [FIRST_RETRY_S, 2 * FIRST_RETRY_S]
        server.fault = None
        await asyncio.sleep(4 * FIRST_RETRY_S + 2 * HEARTBEAT_S)
        assert set(server.steps()) == {"renew"}
        assert server.waits()[2:4] == [4 * FIRST_RETRY_S, HEARTBEAT_S]
        assert server.view().state is NodeState.JOINED


async def test_node_whose_lease_is_over_comes_back_as_the_same_one_with_its_processes() -> None:
    """ORCH-2107."""
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        up = server.last()
        server.fault = Unreachable("cut")
        await asyncio.sleep(LEASE_S + HEARTBEAT_S)
        server.nodes.expire(server.clock.monotonic())
        assert server.last().phase is Phase.LOST
        server.fault = None
        await asyncio.sleep(LAST_RETRY_S)
        assert server.last() == up
        assert [each.boot_id for each in server.registrations] == ["boot-1", "boot-1"]
        assert server.registrations[-1].reports == (up,)
        assert node.engines.released == []
        assert node.engines.restarts == []


async def test_node_that_was_dismissed_meanwhile_gives_up() -> None:
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        server.nodes.reconfigure([])
        with pytest.raises(LaunchError, match="no node gpu-2"):
            await node.task
        assert not node.engines.is_open


# Obeying


async def test_orders_that_come_and_go_are_obeyed_with_the_next_heartbeat() -> None:
    server = Server()
    server.manager.want(order("small/0"))
    async with joined(server) as node:
        url = server.last().url
        server.manager.want(order("small/1"))
        server.manager.release("small/0")
        await asyncio.sleep(HEARTBEAT_S + 2 * DEBOUNCE_S)
        assert (node.engines.orders, node.engines.released) == ({"small/1": order("small/1")}, ["small/0"])
        assert server.view().replicas == (("small/1", Phase.UP, 1),)
        assert await is_reset(url)
        server.calls.clear()
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert [report.replica_id for report in server.calls[-1].reports] == ["small/1"], "what is gone is forgotten"


async def test_released_replica_is_told_of_until_its_process_is_gone() -> None:
    """The server takes silence about a replica for the end of its process."""
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        node.engines.lingers = True
        server.manager.release("small/0")
        await asyncio.sleep(3 * HEARTBEAT_S)
        assert server.last().phase is Phase.STOPPING
        node.engines.lingers = False
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert server.last().phase is Phase.STOPPED
        assert server.view().replicas == ()


async def test_address_of_an_engine_without_a_relay_is_not_told() -> None:
    """What ended may still say something; the address would be refused, and the node with it."""
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        server.manager.release("small/0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        node.engines.up("small/0")
        await asyncio.sleep(HEARTBEAT_S)
        assert [report.url for report in server.calls[-1].reports] == [None]
        assert server.view().state is NodeState.JOINED


async def test_order_of_another_generation_keeps_the_relay() -> None:
    server = Server()
    server.manager.want(order())
    async with joined(server):
        url = server.last().url
        server.manager.want(order(generation=1))
        await asyncio.sleep(HEARTBEAT_S + 2 * DEBOUNCE_S)
        assert (server.last().phase, server.last().generation, server.last().incarnation) == (Phase.UP, 1, 2)
        assert server.last().url == url


async def test_replica_that_is_wanted_again_after_its_release_has_a_relay_again() -> None:
    server = Server()
    server.manager.want(order())
    async with joined(server):
        server.manager.release("small/0")
        await asyncio.sleep(2 * HEARTBEAT_S)
        server.manager.want(order())
        await asyncio.sleep(HEARTBEAT_S + 2 * DEBOUNCE_S)
        assert server.last().phase is Phase.UP
        assert server.last().url is not None


async def test_restarts_are_handed_on_as_the_node_counts() -> None:
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        server.manager.restart("small/0", 1, Cause.SELF_TEST)
        await asyncio.sleep(HEARTBEAT_S)
        assert node.engines.restarts == [("small/0", 1, Cause.SELF_TEST)]


async def test_engine_is_reached_through_its_relay_wherever_it_is_and_not_while_there_is_none() -> None:
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url) as node:
        url = server.last().url
        assert url != engine_url
        assert not await is_reset(url)
        node.engines.fail("small/0", Cause.EXIT)
        assert await is_reset(url)
        await asyncio.sleep(HEARTBEAT_S)
        assert server.last().url is None
        node.engines.up("small/0")
        assert not await is_reset(url)


async def test_address_of_ipv6_is_told_in_brackets() -> None:
    server = Server()
    server.manager.want(order())
    async with joined(server, identity=replace(IDENTITY, address="::1", listen="::1")):
        url = str(server.last().url)
        assert url.startswith("http://[::1]:")
        assert not url.endswith(":1")


async def test_relays_with_a_certificate_are_told_as_https() -> None:
    """ORCH-3304."""
    server = Server()
    server.manager.want(order())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    async with joined(server, tls=context):
        assert str(server.last().url).startswith("https://127.0.0.1:")


async def test_listening_at_an_address_of_another_host_ends_the_node_with_one_clear_message() -> None:
    server = Server()
    server.manager.want(order())
    node = Node(server, identity=replace(IDENTITY, listen="192.0.2.1"))
    with pytest.raises(LaunchError, match=r"cannot be offered at 192\.0\.2\.1: .+"):
        await node.task
    assert not node.engines.is_open
    assert server.view().state is NodeState.ABSENT


# The fence


async def test_connections_are_cut_before_the_lease_is_over_and_pass_again_once_the_server_is_heard() -> None:
    """ORCH-2107."""
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url) as node:
        url = server.last().url
        renewed_at = server.calls[-1].at
        reader, writer = await connect(url)
        writer.write(b"still there?")
        assert await reader.readexactly(12) == b"still there?"
        server.fault = Unreachable("cut")
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(HANG_S):
                await reader.read(1)
        assert server.clock.monotonic() - renewed_at == pytest.approx(SAFETY * LEASE_S)
        assert server.view().state is NodeState.JOINED, "the server has not given it up yet"
        assert await is_reset(url)
        server.fault = None
        await asyncio.sleep(LAST_RETRY_S)
        assert not await is_reset(url)
        assert server.last().url == url
        assert [name for name in node.logged() if name.startswith("fence")] == ["fenced", "fence_lifted"]
        writer.close()


async def test_fence_counts_from_when_the_heartbeat_was_sent() -> None:
    """The server may have counted from any moment between."""
    server = Server()
    server.manager.want(order())
    async with joined(server) as node:
        renewed_at = server.calls[-1].at
        server.is_hanging = True
        await asyncio.sleep(renewed_at + SAFETY * LEASE_S - server.clock.monotonic() - 0.01)
        assert "fenced" not in node.logged()
        await asyncio.sleep(0.02)
        assert "fenced" in node.logged()


async def test_answer_that_comes_too_late_lifts_no_fence() -> None:
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url):
        url = server.last().url
        renew = server.renew

        async def late(*words: Any, **more: Any) -> Orders:
            orders = await renew(*words, **more)
            await asyncio.sleep(SAFETY * LEASE_S + 0.5)
            return orders

        server.renew = late  # type: ignore[method-assign]
        await asyncio.sleep(HEARTBEAT_S + SAFETY * LEASE_S + 1.0)
        assert await is_reset(url)
        server.renew = renew  # type: ignore[method-assign]
        await asyncio.sleep(LEASE_S)
        assert not await is_reset(url)


async def test_fence_holds_for_relays_of_a_node_that_does_not_get_its_lease_back() -> None:
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url):
        url = server.last().url
        server.fault = refusal(Conflict("the lease is over; register again"))
        await asyncio.sleep(3 * LEASE_S)
        assert await is_reset(url)
        server.fault = None
        await asyncio.sleep(LAST_RETRY_S)
        assert not await is_reset(url)


# The farewell


async def test_node_that_ends_says_so_and_leaves_nothing_behind() -> None:
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url) as node:
        url = server.last().url
        await node.end()
        assert server.steps()[-1] == "leave"
        assert server.view().state is NodeState.ABSENT
        assert not node.engines.is_open
        assert await is_reset(url)


async def test_farewell_that_nobody_answers_is_given_up() -> None:
    server = Server()
    async with joined(server) as node:
        server.is_hanging = True
        began = server.clock.monotonic()
        await node.end()
        assert server.clock.monotonic() - began == pytest.approx(LEAVE_S)
        assert not node.engines.is_open


async def test_farewell_that_is_refused_or_fails_is_no_error() -> None:
    for fault in (Unreachable("cut"), refusal(Conflict("it is over")), refusal(Internal())):
        server = Server()
        async with joined(server) as node:
            server.fault = fault
            await node.end()
            assert node.task.cancelled()


async def test_node_that_is_told_twice_to_end_closes_its_relays_all_the_same() -> None:
    server = Server()
    server.manager.want(order())
    async with echo() as engine_url, joined(server, engine_url=engine_url) as node:
        url = server.last().url
        server.is_hanging = True
        node.task.cancel()
        await asyncio.sleep(LEAVE_S / 2)
        await node.end()
        assert await is_reset(url)
        assert not node.engines.is_open


async def test_node_that_never_joined_says_no_farewell() -> None:
    server = Server()
    server.fault = Unreachable("cannot connect")
    node = Node(server)
    await asyncio.sleep(5.0)
    await node.end()
    assert set(server.steps()) == {"register"}
