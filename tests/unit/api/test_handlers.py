"""Every operation reaches its use case and answers in the contract's form."""

from pydantic import BaseModel

from llorch.domain.pool import ReplicaState
from llorch.domain.task import Budgets, TaskState
from llorch_contract import models
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import SESSION, TASK, pool, replica

READS: list[tuple[str, type[BaseModel]]] = [
    ("/v1/tasks", models.TaskList),
    (f"/v1/tasks/{TASK}", models.Task),
    (f"/v1/sessions/{SESSION}", models.Session),
    ("/v1/pools", models.PoolList),
    ("/v1/pools/small/health", models.PoolHealth),
    ("/v1/replica-sets", models.ReplicaSetList),
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
