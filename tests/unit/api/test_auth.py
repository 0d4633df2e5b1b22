"""Keys, scopes and priorities (ORCH-3035, ORCH-3200, ORCH-3203)."""

import hashlib

import pytest

from llorch.api.auth import LOCAL, KeyRecord, Keys, check_priority, check_scope, new_key
from llorch.domain.task import Priority
from llorch.errors import Forbidden, Unauthenticated
from llorch_contract import models
from llorch_contract.routes import ROUTES, Route
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import TASK

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


def path_of(route: Route) -> str:
    return route.path.format(task_id=TASK, session_id=TASK, pool_id="small")


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
