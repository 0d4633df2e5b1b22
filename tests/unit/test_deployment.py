"""ORCH-3031, ORCH-3244: a configuration as one value that can be compared."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch import config
from llorch.deployment import deployment_of
from llorch.service.configurations import Deployment
from llorch.service.inventory import Fact
from llorch.service.probes import UNVERIFIED


class Read:
    """Reads what a file with these sections makes of the service."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, *pools: dict[str, Any], **sections: Any) -> Deployment:
        self._file.write_text(yaml.safe_dump({"pools": list(pools), **sections}), encoding="utf-8")
        return deployment_of(config.load(self._file, {}))


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path / "llorch.yaml")


def pool(pool_id: str = "a", *replicas: dict[str, Any], model: str = "m", **more: Any) -> dict[str, Any]:
    given = list(replicas) or [{"url": "http://h:1", "api_key": "k", "slots": 3}]
    return {"id": pool_id, "engine": "llamacpp", "model": model, "replicas": given, **more}


def managed(node: str | None = None) -> dict[str, Any]:
    return {"managed": {"launcher": "command", "command": ["e"], **({} if node is None else {"node": node})}}


def test_engine_that_somebody_else_runs_has_its_address_and_no_order(read: Read) -> None:
    """ORCH-3244."""
    [replica] = read(pool(engine_version="b1", timeouts={"connect_s": 1, "first_byte_s": 2, "idle_s": 3})).replicas
    assert (replica.replica_id, replica.url, replica.api_key, replica.slots) == ("a/0", "http://h:1", "k", 3)
    assert (replica.order, replica.node, replica.must_test) == (None, None, False)
    assert (replica.engine_version, replica.model_digest) == (Fact("b1", "stated"), UNVERIFIED)
    assert replica.timeouts is not None
    assert (replica.timeouts.connect_s, replica.timeouts.first_byte_s, replica.timeouts.idle_s) == (1, 2, 3)


def test_managed_replica_has_an_order_a_node_and_a_test(read: Read) -> None:
    """ORCH-3049, ORCH-2105."""
    here, there = read(
        pool("a", managed(), managed("n"), ctx=1024, allow_cpu=True), nodes=[{"id": "n", "sha256": "0" * 64}]
    ).replicas
    assert here.order is not None
    assert there.order is not None
    assert (here.order.replica_id, here.node, here.url) == ("a/0", None, None)
    assert (there.order.replica_id, there.node, there.must_test) == ("a/1", "n", True)


@pytest.mark.parametrize("wanted", [True, False])
def test_self_test_is_as_the_pool_says(read: Read, wanted: bool) -> None:
    """ORCH-3049: of an engine that somebody else runs, too."""
    other = pool("b", managed(), model="n", ctx=1024, allow_cpu=True, self_test=wanted)
    deployment = read(pool("a", self_test=wanted), other)
    assert [replica.must_test for replica in deployment.replicas] == [wanted, wanted]


def test_replicas_are_ranked_as_the_file_has_them_and_routes_are_shared(read: Read) -> None:
    """ORCH-3244."""
    one, two, three, four = ({"url": f"http://h:{port}"} for port in range(1, 5))
    deployment = read(pool("a", one, two), pool("b", three), pool("c", four, model="n"))
    assert [(replica.replica_id, replica.rank) for replica in deployment.replicas] == [
        ("a/0", 0),
        ("a/1", 1),
        ("b/0", 2),
        ("c/0", 3),
    ]
    assert set(deployment.pools) == {"a", "b", "c"}
    assert set(deployment.policies) == set(deployment.routes) == {"llamacpp/m", "llamacpp/n"}


def test_same_file_makes_the_same_and_another_setting_another(read: Read) -> None:
    """ORCH-3031."""
    before, same, other = read(pool()), read(pool()), read(pool(queue={"capacity": 3}))
    assert (before.replicas, before.pools, before.policies) == (same.replicas, same.pools, same.policies)
    assert before.policies != other.policies
