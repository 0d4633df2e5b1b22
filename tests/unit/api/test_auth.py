"""Keys, scopes, priorities and the tokens of nodes (ORCH-3035, ORCH-3200, ORCH-3203, ORCH-2105)."""

import hashlib

import pytest

from llorch.api.auth import (
    LOCAL,
    NODE_PREFIX,
    SCOPES,
    KeyRecord,
    Keys,
    check_node,
    check_priority,
    check_scope,
    new_key,
)
from llorch.domain.task import Priority
from llorch.errors import Forbidden, Unauthenticated
from llorch.service.nodes import NodeConfig
from llorch_contract import models
from llorch_contract.routes import ROUTES, Route
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import LEASE, NODE, OTHER_NODE, TASK

BODY = {"model_ref": "smol", "prompt": "x"}


def record(sha256: str, scopes: set[str]) -> KeyRecord:
    return KeyRecord("k", sha256, "team", frozenset(scopes), frozenset({Priority.BATCH}))


def test_new_key_has_256_bits_and_its_digest_is_what_is_configured() -> None:
    key, sha256 = new_key()
    assert key.startswith("llk_")
    assert len(key) == 4 + 43
    assert sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert new_key()[0] != key


def test_key_stands_for_its_tenant_in_any_case_of_the_scheme() -> None:
    key, sha256 = new_key()
    keys = Keys([record(sha256, {"data"})])
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert keys.identify(f"{scheme} {key}".encode()).tenant == "team"


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Bearer llk_x", b"Basic abc", b"\xff\xfe"])
def test_anything_but_a_known_key_is_unauthenticated(header: bytes | None) -> None:
    keys = Keys([record(new_key()[1], {"data"})])
    with pytest.raises(Unauthenticated):
        keys.identify(header)


def test_the_digest_itself_is_no_key() -> None:
    sha256 = new_key()[1]
    with pytest.raises(Unauthenticated):
        Keys([record(sha256, {"data"})]).identify(b"Bearer " + sha256.encode())


def test_without_keys_everybody_is_local_whatever_header_comes() -> None:
    for header in (None, b"Bearer llk_other", b"junk"):
        assert Keys().identify(header) is LOCAL
    assert LOCAL.tenant == "local"


def test_clashing_keys_and_unknown_scopes_are_refused() -> None:
    sha256 = new_key()[1]
    with pytest.raises(ValueError, match="same sha256"):
        Keys([record(sha256, {"data"}), record(sha256, {"control"})])
    with pytest.raises(ValueError, match="root"):
        Keys([record(sha256, {"root"})])


def test_admin_implies_every_scope_and_the_others_only_themselves() -> None:
    key, sha256 = new_key()
    admin = Keys([record(sha256, {"admin"})]).identify(b"Bearer " + key.encode())
    data = Keys([record(sha256, {"data"})]).identify(b"Bearer " + key.encode())
    for scope in ("data", "control", "admin", "any"):
        check_scope(admin, scope)
    check_scope(data, "data")
    check_scope(data, "any")
    for scope in ("control", "admin"):
        with pytest.raises(Forbidden):
            check_scope(data, scope)


def test_forbidden_priority_names_the_allowed_ones() -> None:
    key, sha256 = new_key()
    identity = Keys([record(sha256, {"data"})]).identify(b"Bearer " + key.encode())
    check_priority(identity, Priority.BATCH)
    with pytest.raises(Forbidden) as caught:
        check_priority(identity, Priority.INTERACTIVE)
    assert caught.value.details == {"choices": ["batch"]}


# Nodes


def bearer(key: str) -> bytes:
    return b"Bearer " + key.encode()


def node(node_id: str = NODE) -> tuple[str, NodeConfig]:
    token, sha256 = new_key(NODE_PREFIX)
    return token, NodeConfig(node_id, sha256, frozenset({"small"}), ())


def test_token_stands_for_its_node_and_opens_nothing_else() -> None:
    """ORCH-2105."""
    token, record_of_node = node()
    identity = Keys([record(new_key()[1], {"data"})], [record_of_node]).identify(bearer(token))
    assert (token[:4], identity.node_id, identity.tenant) == ("lln_", NODE, "")
    check_scope(identity, "node")
    check_node(identity, NODE)
    for scope in (*SCOPES, "any"):
        with pytest.raises(Forbidden):
            check_scope(identity, scope)
    for priority in Priority:
        with pytest.raises(Forbidden):
            check_priority(identity, priority)


def test_token_of_a_node_is_not_that_of_another() -> None:
    """ORCH-2105."""
    token, record_of_node = node()
    with pytest.raises(Forbidden):
        check_node(Keys((), [record_of_node]).identify(bearer(token)), OTHER_NODE)


def test_no_key_opens_the_operations_of_nodes() -> None:
    """ORCH-2105: not even one that implies every scope."""
    key, sha256 = new_key()
    admin = Keys([record(sha256, {"admin"})]).identify(bearer(key))
    for identity in (admin, LOCAL):
        with pytest.raises(Forbidden):
            check_scope(identity, "node")
        with pytest.raises(Forbidden):
            check_node(identity, NODE)


def test_without_keys_a_token_is_known_and_everybody_else_is_local() -> None:
    """ORCH-2105."""
    token, record_of_node = node()
    keys = Keys((), [record_of_node])
    assert keys.is_keyless
    assert keys.identify(bearer(token)).node_id == NODE
    for header in (None, b"", b"Bearer lln_other", b"Basic abc", b"\xff\xfe"):
        assert keys.identify(header) is LOCAL


def test_replaced_keys_count_at_once_and_those_before_no_more() -> None:
    """ORCH-3031."""
    old, old_sha256 = new_key()
    new, new_sha256 = new_key()
    token, record_of_node = node()
    keys = Keys([record(old_sha256, {"data"})])
    keys.replace([record(new_sha256, {"control"})], [record_of_node])
    assert keys.identify(bearer(new)).scopes == {"control"}
    assert keys.identify(bearer(token)).node_id == NODE
    with pytest.raises(Unauthenticated):
        keys.identify(bearer(old))


def test_keys_that_clash_change_nothing() -> None:
    """ORCH-3031: neither two of one kind, nor a key and a token."""
    old, old_sha256 = new_key()
    keys = Keys([record(old_sha256, {"data"})])
    twice = new_key()[1]
    for records, nodes in (
        ([record(twice, {"data"}), record(twice, {"data"})], []),
        ([record(twice, {"data"})], [NodeConfig(NODE, twice, frozenset(), ())]),
        ([], [NodeConfig(NODE, twice, frozenset(), ()), NodeConfig(OTHER_NODE, twice, frozenset(), ())]),
        ([record(twice, {"root"})], []),
    ):
        with pytest.raises(ValueError, match=r"same sha256|no such scope"):
            keys.replace(records, nodes)
        assert keys.identify(bearer(old)).tenant == "team"
        assert not keys.is_keyless


# The edge


def path_of(route: Route) -> str:
    return route.path.format(task_id=TASK, session_id=TASK, pool_id="small", node_id=NODE)


async def test_every_operation_but_the_two_probes_needs_a_key(client: Client) -> None:
    del client.headers["Authorization"]
    for route in ROUTES:
        response = await client.request(route.method, path_of(route))
        if route.scope is None:
            assert response.status_code == 200
        else:
            assert response.status_code == 401, route.operation_id
            assert response.headers["www-authenticate"].startswith("Bearer")
    assert {route.operation_id for route in ROUTES if route.scope is None} == {"get_liveness", "get_readiness"}


async def test_key_without_the_scope_is_forbidden(client: Client) -> None:
    for route in ROUTES:
        for name, other in (("data", "control"), ("control", "data")):
            if route.scope == other:
                response = await client.request(route.method, path_of(route), headers=client.edge.bearer(name))
                assert response.status_code == 403, (route.operation_id, name)
                assert response.json()["code"] == models.ErrorCode.FORBIDDEN


async def test_either_scope_may_ask_for_capabilities(client: Client) -> None:
    for name in ("data", "control", "admin"):
        assert (await client.get("/v1/capabilities", headers=client.edge.bearer(name))).status_code == 200


async def test_key_that_may_not_use_the_priority_gets_no_task(client: Client) -> None:
    headers = client.edge.bearer("batch")
    refused = await client.post("/v1/tasks", json=BODY, headers=headers)
    assert (refused.status_code, refused.json()["details"]) == (403, {"choices": ["batch"]})
    assert client.edge.tasks.submissions == []
    assert (await client.post("/v1/tasks", json=BODY | {"priority": "batch"}, headers=headers)).status_code == 202


async def test_tenant_comes_from_the_key_and_from_nothing_else(client: Client) -> None:
    headers = client.edge.bearer("data") | {"X-Tenant": "tenant-admin", "X-Forwarded-User": "admin"}
    await client.post("/v1/tasks", json=BODY, headers=headers)
    assert client.edge.tasks.submissions[0].tenant == "tenant-data"


async def test_unauthenticated_body_is_not_even_read(client: Client) -> None:
    response = await client.post("/v1/tasks", content=b"not json", headers={"Authorization": "Bearer llk_no"})
    assert response.status_code == 401


async def test_key_is_never_in_an_answer(client: Client) -> None:
    key = client.edge.keys["admin"]
    for path in ("/v1/nope", "/v1/tasks?limit=x", "/v1/tasks"):
        assert key not in (await client.get(path)).text


HOST = {"gpus": [], "ram_total_bytes": 1, "ram_available_bytes": 1, "driver_resets": 0}
REGISTRATION = {
    "boot_id": LEASE,
    "manager_version": "1.0.0",
    "address": "http://10.0.0.7",
    "host": HOST,
    "replicas": [],
}
HEARTBEAT = {"lease_id": LEASE, "host": HOST, "replicas": []}


async def call_as_node(client: Client, node_id: str, headers: dict[str, str]) -> list[int]:
    """The statuses of the three operations of a node."""
    path = f"/v1/nodes/{node_id}"
    return [
        (await client.put(path, json=REGISTRATION, headers=headers)).status_code,
        (await client.post(f"{path}/heartbeat", json=HEARTBEAT, headers=headers)).status_code,
        (await client.delete(path, params={"lease_id": LEASE}, headers=headers)).status_code,
    ]


async def test_token_opens_the_operations_of_its_own_node_only(client: Client) -> None:
    """ORCH-2105."""
    token = client.edge.bearer(NODE)
    assert await call_as_node(client, NODE, token) == [200, 200, 204]
    assert await call_as_node(client, OTHER_NODE, token) == [403] * 3
    assert await call_as_node(client, "nowhere", token) == [403] * 3
    assert [registration.node_id for registration, _ in client.edge.nodes.registrations] == [NODE]
    assert [renewal[0] for renewal in client.edge.nodes.renewals] == [NODE]
    assert client.edge.nodes.left == [(NODE, LEASE)]


async def test_token_opens_no_other_operation(client: Client) -> None:
    """ORCH-2105: not even those that every key may use."""
    for route in ROUTES:
        if route.scope not in (None, "node"):
            response = await client.request(route.method, path_of(route), headers=client.edge.bearer(NODE))
            assert (response.status_code, response.json()["code"]) == (403, "FORBIDDEN"), route.operation_id


async def test_no_key_speaks_for_a_node(client: Client) -> None:
    """ORCH-2105."""
    for name in ("admin", "data", "control"):
        assert await call_as_node(client, NODE, client.edge.bearer(name)) == [403] * 3
    assert await call_as_node(client, NODE, {"Authorization": "Bearer lln_unknown"}) == [401] * 3
    assert client.edge.nodes.registrations == []


async def test_without_keys_only_a_token_speaks_for_a_node_and_everybody_does_the_rest(keyless: Client) -> None:
    """ORCH-2105."""
    token = keyless.edge.bearer(NODE)
    assert await call_as_node(keyless, NODE, token) == [200, 200, 204]
    assert await call_as_node(keyless, OTHER_NODE, token) == [403] * 3
    for headers in ({}, {"Authorization": "Bearer lln_unknown"}):
        assert await call_as_node(keyless, NODE, headers) == [403] * 3
    for method, path in (("GET", "/v1/nodes"), ("GET", "/v1/config"), ("POST", "/v1/pools/small/drain")):
        assert (await keyless.request(method, path)).is_success, path


async def test_changes_need_the_scope_admin_and_reading_does_not(client: Client) -> None:
    """ORCH-2101, ORCH-2102, ORCH-3031."""
    control = client.edge.bearer("control")
    changes = ("/v1/pools/small/drain", "/v1/pools/small/reload", "/v1/config/reload", "/v1/config/revert")
    for path in changes:
        assert (await client.post(path, headers=control)).status_code == 403, path
    assert (client.edge.changes.begun, client.edge.configurations.begun) == ([], [])
    for path in ("/v1/config", "/v1/nodes"):
        assert (await client.get(path, headers=control)).status_code == 200, path
    for path in changes:
        assert (await client.post(path)).status_code == 202, path


async def test_keys_of_a_new_configuration_count_for_the_next_request(client: Client) -> None:
    """ORCH-3031."""
    key, sha256 = new_key()
    client.edge.configured.replace([record(sha256, {"control"})])
    assert (await client.get("/v1/pools")).status_code == 401
    assert (await client.get("/v1/pools", headers={"Authorization": f"Bearer {key}"})).status_code == 200
    assert await call_as_node(client, NODE, client.edge.bearer(NODE)) == [401] * 3
