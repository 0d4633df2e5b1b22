"""ORCH-2105, ORCH-2107: a pool manager's client joins a live server, renews its lease and gives the node back."""

from collections.abc import Iterator

import pytest

from llorch import __version__
from llorch.client import ApiError, AsyncClient, NodeClient, NodeState
from llorch.service.launching import Cause, HostFacts, LastError, LaunchReport, Phase
from llorch.service.nodes import Registration
from tests.conftest import Processes
from tests.contract.interactions import ADMIN_KEY, MODEL, NODE, NODE_TOKEN, REMOTE_POOL
from tests.contract.test_provider_pact import EXPECTED, REMOTE, digest, key_entry
from tests.support.service import LlorchProcess, make_config, make_pool

FACTS = HostFacts(ram_total_bytes=2**34, ram_available_bytes=2**33)
REPLICA = f"{REMOTE_POOL}/0"


@pytest.fixture
def service(processes: Processes) -> Iterator[LlorchProcess]:
    config = make_config([make_pool(processes.fake(MODEL)), REMOTE], keys=[])
    config["keys"] = [key_entry("admin", ADMIN_KEY, ["admin"])]
    config["nodes"] = [{"id": NODE, "sha256": digest(NODE_TOKEN)}]
    service = processes.serve(config, expected=EXPECTED)
    yield service
    service.stop()


async def test_node_joins_renews_and_leaves(service: LlorchProcess) -> None:
    """What it told is seen by an operator; a lease that was given back is over."""
    node, operator = NodeClient(service.url, NODE_TOKEN), AsyncClient(service.url, ADMIN_KEY)
    try:
        orders = await node.register(Registration(NODE, "boot", __version__, "127.0.0.1", FACTS))
        [order] = orders.wanted
        assert (order.replica_id, order.pool_id, order.command) == (REPLICA, REMOTE_POOL, ("engine",))
        error = LastError("WORKER_RESET", "there is no such program", 5.0)
        report = LaunchReport(REPLICA, order.generation, Phase.WAITING, cause=Cause.BINARY, error=error)
        renewed = await node.renew(NODE, orders.lease_id, host=FACTS, reports=(report,))
        assert renewed == orders
        [seen] = (await operator.list_nodes()).nodes
        assert (seen.state, seen.replicas[0].phase) == (NodeState.joined, "waiting")
        [replica] = (await operator.get_pool_health(REMOTE_POOL)).replicas
        assert (replica.node, replica.process and replica.process.cause) == (NODE, "binary")
        await node.leave(NODE, orders.lease_id)
        assert [each.state for each in (await operator.list_nodes()).nodes] == [NodeState.absent]
        with pytest.raises(ApiError) as told:
            await node.renew(NODE, orders.lease_id, host=FACTS, reports=())
        assert told.value.status == 409
    finally:
        await node.aclose()
        await operator.aclose()
