"""Every operation reaches its use case and answers in the contract's form."""

from typing import Any

import pytest
from pydantic import BaseModel

from llorch.domain.pool import ReplicaState
from llorch.domain.task import Budgets, TaskState
from llorch.errors import Conflict, Forbidden, InvalidParams, LlorchError, NotFound, PoolUnavailable
from llorch_contract import models
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import LEASE, NODE, SESSION, TASK, pool, replica

READS: list[tuple[str, type[BaseModel]]] = [
    ("/v1/tasks", models.TaskList),
    (f"/v1/tasks/{TASK}", models.Task),
    (f"/v1/sessions/{SESSION}", models.Session),
    ("/v1/pools", models.PoolList),
    ("/v1/pools/small/health", models.PoolHealth),
    ("/v1/replica-sets", models.ReplicaSetList),
    ("/v1/config", models.ConfigStatus),
    ("/v1/nodes", models.NodeList),
    ("/v1/capabilities", models.Capabilities),
    ("/healthz", models.Liveness),
    ("/readyz", models.Readiness),
]


async def test_every_read_answers_in_the_contracts_form(client: Client) -> None:
    for path, model in READS:
        response = await client.get(path)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), path
        model.model_validate_json(response.content)


async def test_submit_answers_with_the_ids_that_were_made(client: Client) -> None:
    response = await client.post("/v1/tasks", json={"model_ref": "smol", "prompt": "x"})
    accepted = models.TaskAccepted.model_validate_json(response.content)
    submission = client.edge.tasks.submissions[0]
    assert response.status_code == 202
    assert (accepted.task_id, accepted.session_id) == (submission.task_id, submission.session_id)
    assert (submission.tenant, accepted.queue_position, accepted.backoff_ms) == ("tenant-admin", 3, None)


async def test_submit_answers_with_the_budgets_that_are_left_and_their_headers(client: Client) -> None:
    """ORCH-3099."""
    body = {"model_ref": "smol", "prompt": "x"}
    assert not [name for name in (await client.post("/v1/tasks", json=body)).headers if name.startswith("x-budget")]
    client.edge.tasks.budgets = Budgets(18211, 41.2, None)
    response = await client.post("/v1/tasks", json=body)
    accepted = models.TaskAccepted.model_validate_json(response.content)
    assert accepted.budgets == models.BudgetsRemaining(tokens=18211, time_ms=41200, cost=None)
    told = {name: value for name, value in response.headers.items() if name.startswith("x-budget")}
    assert told == {"x-budget-tokens-remaining": "18211", "x-budget-time-remaining-ms": "41200"}


async def test_list_is_narrowed_as_asked(client: Client) -> None:
    await client.get("/v1/tasks", params={"state": "failed", "session_id": SESSION.upper(), "limit": 7, "cursor": "AA"})
    await client.get("/v1/tasks")
    narrowed, plain = client.edge.tasks.listed
    assert (narrowed["state"], narrowed["session_id"], narrowed["limit"]) == (TaskState.FAILED, SESSION, 7)
    assert (narrowed["tenant"], narrowed["cursor"]) == ("tenant-admin", "AA")
    assert (plain["state"], plain["session_id"], plain["limit"], plain["cursor"]) == (None, None, 50, None)


async def test_cancel_and_delete_answer_204_for_any_spelling_of_the_id(client: Client) -> None:
    canceled = await client.post(f"/v1/tasks/{TASK.upper()}/cancel")
    deleted = await client.delete(f"/v1/sessions/{SESSION.upper()}")
    assert (canceled.status_code, canceled.content) == (204, b"")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert client.edge.tasks.canceled == [("tenant-admin", TASK)]
    assert client.edge.sessions.deleted == [("tenant-admin", SESSION)]


async def test_unknown_pool_is_not_found(client: Client) -> None:
    assert (await client.get("/v1/pools/other/health")).status_code == 404


async def test_ready_only_while_a_replica_is_ready_and_nobody_shuts_down(client: Client) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready", "replicas_ready": 1}
    client.edge.is_shutting_down = True
    draining = await client.get("/readyz")
    assert (draining.status_code, draining.json()["code"]) == (503, "POOL_UNAVAILABLE")
    assert (draining.json()["policy_label"], draining.json()["retriable"]) == ("shutdown", True)
    client.edge.is_shutting_down = False
    client.edge.pools.pools = [pool(replica(state=ReplicaState.LOADING))]
    unready = await client.get("/readyz")
    assert (unready.status_code, unready.json()["code"]) == (503, "POOL_UNREADY")
    assert (await client.get("/healthz")).status_code == 200


async def test_metrics_are_prometheus_text(client: Client) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.content == b"tasks_enqueued_total 1.0\n"


# Changes of pools

ANY_BODY: list[tuple[dict[str, Any], float | None]] = [
    ({}, None),
    ({"json": {}}, None),
    ({"json": {"deadline_ms": 0}}, 0.0),
    ({"json": {"deadline_ms": 1500}}, 1.5),
    ({"headers": {"Content-Length": "0"}}, None),
    ({"headers": {"Content-Type": "application/json"}}, None),
]


@pytest.mark.parametrize("kind", ["drain", "reload"])
async def test_change_of_a_pool_is_begun_with_and_without_a_body(client: Client, kind: str) -> None:
    """ORCH-2101, ORCH-2102: without a deadline it is the pool's own."""
    for request, _ in ANY_BODY:
        response = await client.post(f"/v1/pools/small/{kind}", **request)
        change = models.PoolChange.model_validate_json(response.content)
        assert (response.status_code, change.kind, change.state) == (202, kind, "running"), request
        assert change.started_at == "2025-11-23T04:25:00.000Z"
    assert client.edge.changes.begun == [(kind, "small", deadline_s) for _, deadline_s in ANY_BODY]


@pytest.mark.parametrize("kind", ["drain", "reload"])
async def test_body_of_a_change_that_is_no_such_request_begins_nothing(client: Client, kind: str) -> None:
    """ORCH-2045: a body that may be left out is checked when it is there."""
    json_type = {"Content-Type": "application/json"}
    for content, headers, status in (
        (b"null", json_type, 400),
        (b"[]", json_type, 400),
        (b" ", json_type, 400),
        (b'{"deadline_ms": -1}', json_type, 400),
        (b'{"deadline_ms": 86400001}', json_type, 400),
        (b'{"deadline_ms": null}', json_type, 400),
        (b'{"deadline": 1}', json_type, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {}, 415),
    ):
        response = await client.post(f"/v1/pools/small/{kind}", content=content, headers=headers)
        assert response.status_code == status, (content, headers)
    assert client.edge.changes.begun == []


async def test_why_a_change_is_refused_is_told(client: Client) -> None:
    """ORCH-2101, ORCH-2102."""
    refusals: list[tuple[LlorchError, int]] = [
        (NotFound("no such pool"), 404),
        (Conflict("another change is under way", pool_id="small"), 409),
        (PoolUnavailable("shutting down", policy_label="shutdown"), 503),
    ]
    for failure, status in refusals:
        client.edge.changes.failure = failure
        for kind in ("drain", "reload"):
            response = await client.post(f"/v1/pools/small/{kind}")
            problem = models.Problem.model_validate_json(response.content)
            assert (response.status_code, problem.code, problem.pool_id) == (status, failure.code, failure.pool_id)


# The configuration


async def test_change_of_the_configuration_is_begun_and_seen(client: Client) -> None:
    """ORCH-3031."""
    assert (await client.get("/v1/config")).json()["change"] is None
    for kind in ("reload", "revert"):
        response = await client.post(f"/v1/config/{kind}")
        status = models.ConfigStatus.model_validate_json(response.content)
        assert status.change is not None
        assert (response.status_code, status.revision, status.change.state) == (202, 1, "running")
        assert status.change.changed == ["pools.small.slots"]
    assert client.edge.configurations.begun == ["reload", "revert"]
    assert (await client.get("/v1/config")).json()["change"]["state"] == "running"


async def test_configuration_that_cannot_be_used_is_refused_with_what_is_wrong(client: Client) -> None:
    """ORCH-3031."""
    client.edge.configurations.failure = InvalidParams("needs a restart", details={"choices": ["server.listen"]})
    refused = await client.post("/v1/config/reload")
    assert (refused.status_code, refused.json()["details"]) == (422, {"choices": ["server.listen"]})
    client.edge.configurations.failure = Conflict("a change is under way")
    assert (await client.post("/v1/config/revert")).status_code == 409


# Nodes

HOST = {"gpus": [], "ram_total_bytes": 8, "ram_available_bytes": 4, "driver_resets": 0}


async def test_node_joins_renews_and_leaves(client: Client) -> None:
    """ORCH-2105: from the address that its connection has."""
    headers, path = client.edge.bearer(NODE), f"/v1/nodes/{NODE}"
    joining = {"boot_id": "b1", "manager_version": "1.0.0", "address": "10.0.0.7", "host": HOST, "replicas": []}
    joined = await client.put(path, json=joining, headers=headers)
    orders = models.NodeOrders.model_validate_json(joined.content)
    assert (orders.lease_id, orders.lease_ms, orders.heartbeat_ms) == (LEASE, 10_000, 2_000)
    assert [order.replica_id for order in orders.wanted] == ["small/0"]
    renewed = await client.post(
        f"{path}/heartbeat", json={"lease_id": LEASE, "host": HOST, "replicas": []}, headers=headers
    )
    assert renewed.json() == joined.json()
    assert (await client.delete(path, params={"lease_id": LEASE}, headers=headers)).status_code == 204
    nodes = client.edge.nodes
    [(registration, peer)] = nodes.registrations
    [(node_id, lease_id, host, reports, renewing_peer)] = nodes.renewals
    assert (registration.node_id, registration.boot_id, registration.address) == (NODE, "b1", "10.0.0.7")
    assert (peer, renewing_peer) == ("127.0.0.1", "127.0.0.1")
    assert (node_id, lease_id, host.ram_total_bytes, host.ram_available_bytes, reports) == (NODE, LEASE, 8, 4, ())
    assert nodes.left == [(NODE, LEASE)]


async def test_node_that_cannot_be_let_in_is_told_why(client: Client) -> None:
    """ORCH-2105, ORCH-2109."""
    headers, path = client.edge.bearer(NODE), f"/v1/nodes/{NODE}/heartbeat"
    body = {"lease_id": LEASE, "host": HOST, "replicas": []}
    for failure, status in (
        (NotFound("no such node"), 404),
        (Forbidden("not from there"), 403),
        (Conflict("the lease is over"), 409),
        (InvalidParams("another version"), 422),
    ):
        client.edge.nodes.failure = failure
        assert (await client.post(path, json=body, headers=headers)).status_code == status
        left = await client.delete(f"/v1/nodes/{NODE}", params={"lease_id": LEASE}, headers=headers)
        assert left.json()["code"] == failure.code


async def test_node_that_leaves_has_to_say_which_lease(client: Client) -> None:
    """ORCH-2105."""
    refused = await client.delete(f"/v1/nodes/{NODE}", headers=client.edge.bearer(NODE))
    assert (refused.status_code, refused.json()["details"]["path"]) == (400, "/lease_id")


async def test_nodes_are_listed_whether_they_came_or_not(client: Client) -> None:
    """ORCH-2105."""
    joined, never = models.NodeList.model_validate_json((await client.get("/v1/nodes")).content).nodes
    assert (joined.node_id, joined.state, joined.lease_remaining_ms) == (NODE, "joined", 7500)
    assert [(p.replica_id, p.phase, p.incarnation) for p in joined.replicas] == [("small/0", "up", 3)]
    assert (never.state, never.since, never.host, never.replicas) == ("absent", None, None, [])
