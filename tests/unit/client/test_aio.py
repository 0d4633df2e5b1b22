"""ORCH-2006, ORCH-2007, ORCH-2009: single calls, their errors, and when they are sent again."""

import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llorch.client import (
    ApiError,
    AsyncClient,
    ClientError,
    InvalidRequest,
    ProtocolFault,
    TaskRequest,
    TaskState,
    Timeouts,
    Unreachable,
    known,
)
from llorch.client import patience as pacing
from tests.unit.client.scripted_server import (
    CANCEL,
    CANCELED,
    SESSION_ID,
    SILENCE,
    TASK_ID,
    Reply,
    ScriptedServer,
    accepted,
    body,
    problem,
)

TASKS = "/v1/tasks"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "FIRST_BACKOFF_S", 0.002)
    monkeypatch.setattr(pacing, "SHORTEST_WAIT_S", 0.01)


async def test_submit_sends_what_was_given_and_a_task_id(server: ScriptedServer) -> None:
    server.on("POST", TASKS, accepted(3))
    async with AsyncClient(server.url) as client:
        reply = await client.submit(model_ref="m", prompt="p", sampling={"temperature": 0})
    sent = server.requests[0].json
    assert reply.queue_position == 3
    assert uuid.UUID(sent.pop("task_id")).version == 4
    assert sent == {"model_ref": "m", "prompt": "p", "sampling": {"temperature": 0.0}}
    assert "authorization" not in server.requests[0].headers


async def test_submit_takes_a_task_request_as_it_is(server: ScriptedServer) -> None:
    server.on("POST", TASKS, accepted())
    async with AsyncClient(server.url) as client:
        await client.submit(TaskRequest(model_ref="m", prompt="p", task_id=TASK_ID, max_tokens=256))
    assert server.requests[0].json == {"model_ref": "m", "prompt": "p", "task_id": TASK_ID, "max_tokens": 256}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"model_ref": "m"}, "Exactly one of prompt"),
        ({"model_ref": "m", "prompt": "p", "max_tokens": 0}, "max_tokens"),
        ({"model_ref": "m", "prompt": "p", "colour": "red"}, "colour"),
    ],
)
async def test_a_request_that_cannot_fit_the_contract_is_not_sent(
    server: ScriptedServer, fields: dict[str, Any], place: str
) -> None:
    async with AsyncClient(server.url) as client:
        with pytest.raises(InvalidRequest, match=place):
            await client.submit(**fields)
    assert server.requests == []


async def test_a_submission_whose_answer_was_lost_is_repeated_under_the_same_task_id(server: ScriptedServer) -> None:
    server.on("POST", TASKS, SILENCE, accepted())
    async with AsyncClient(server.url) as client:
        await client.submit(model_ref="m", prompt="p")
    first, second = server.requests
    assert first.body == second.body


async def test_repeats_after_lost_answers_are_bounded(server: ScriptedServer) -> None:
    server.on("POST", TASKS, SILENCE)
    async with AsyncClient(server.url) as client:
        with pytest.raises(Unreachable):
            await client.submit(model_ref="m", prompt="p")
    assert len(server.requests) == 3


async def test_delete_session_is_never_repeated(server: ScriptedServer) -> None:
    server.on("DELETE", f"/v1/sessions/{SESSION_ID}", SILENCE, CANCELED)
    async with AsyncClient(server.url) as client:
        with pytest.raises(Unreachable):
            await client.delete_session(SESSION_ID)
    assert len(server.requests) == 1


async def test_a_refusal_is_waited_for_as_long_as_advised(server: ScriptedServer) -> None:
    full = problem(429, "ADMISSION_REJECT", retriable=True, Retry_After="1", X_Backoff_Ms="40")
    server.on("POST", TASKS, full, full, accepted())
    waits: list[tuple[float, ClientError]] = []
    async with AsyncClient(
        server.url, draw=lambda: 0.5, notify=lambda seconds, reason: waits.append((seconds, reason))
    ) as client:
        await client.submit(model_ref="m", prompt="p")
    assert [seconds for seconds, _ in waits] == [pytest.approx(0.05), pytest.approx(0.05)]
    assert isinstance(waits[0][1], ApiError)
    assert len({request.body for request in server.requests}) == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_beyond_patience_is_told_at_once(server: ScriptedServer, status: int) -> None:
    server.on("POST", TASKS, problem(status, "POOL_UNREADY", retriable=True, Retry_After="60"))
    async with AsyncClient(server.url, patience_s=5) as client:
        with pytest.raises(ApiError) as refused:
            await client.submit(model_ref="m", prompt="p")
    assert (refused.value.status, refused.value.advised_wait_s) == (status, 60)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        problem(429, "ADMISSION_REJECT", retriable=False, Retry_After="0"),
        problem(429, "BUDGET_EXHAUSTED", retriable=True),
        problem(422, "DEADLINE_UNMET", retriable=True, Retry_After="0"),
    ],
    ids=["not retriable", "nobody knows when", "the deadline counts from acceptance"],
)
async def test_a_refusal_that_waiting_does_not_mend_is_told_at_once(server: ScriptedServer, refusal: Reply) -> None:
    server.on("POST", TASKS, refusal)
    async with AsyncClient(server.url) as client:
        with pytest.raises(ApiError):
            await client.submit(model_ref="m", prompt="p")
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", ["BUDGET_EXHAUSTED", "QUOTA_EXCEEDED"])
async def test_a_limit_that_is_soon_lifted_is_waited_for(server: ScriptedServer, code: str) -> None:
    server.on("POST", TASKS, problem(429, code, retriable=True, X_Backoff_Ms="1"), accepted())
    async with AsyncClient(server.url) as client:
        await client.submit(model_ref="m", prompt="p")
    assert len(server.requests) == 2


async def test_an_acceptance_tells_what_is_left_of_the_budgets(server: ScriptedServer) -> None:
    told = {"tokens": 18211, "time_ms": None, "cost": 4.25}
    without = json.loads(accepted().pieces[0])
    server.on("POST", TASKS, body({**without, "budgets": told}, 202), body(without, 202))
    async with AsyncClient(server.url) as client:
        first, second = [await client.submit(model_ref="m", prompt="p") for _ in range(2)]
    budgets = known(first.budgets)
    assert budgets is not None
    assert (budgets.tokens, budgets.time_ms, budgets.cost) == (18211, None, 4.25)
    assert known(second.budgets) is None


async def test_a_refusal_by_a_proxy_without_an_envelope_is_waited_for_too(server: ScriptedServer) -> None:
    server.on("POST", CANCEL, Reply(503, (b"busy",), {"X-Backoff-Ms": "1"}), CANCELED)
    async with AsyncClient(server.url) as client:
        await client.cancel(TASK_ID)
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "code"), [(400, "INVALID_PARAMS"), (401, "UNAUTHENTICATED"), (409, "CONFLICT")])
async def test_an_error_carries_its_envelope(server: ScriptedServer, status: int, code: str) -> None:
    server.on("POST", TASKS, problem(status, code, "no"))
    async with AsyncClient(server.url) as client:
        with pytest.raises(ApiError, match=f"{code}: no") as told:
            await client.submit(model_ref="m", prompt="p")
    assert told.value.problem is not None
    assert (told.value.code, told.value.problem.correlation_id) == (code, "req-1")


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/v1/pools/small/drain", lambda client: client.drain_pool("small")),
        ("/v1/pools/small/reload", lambda client: client.reload_pool("small", 5)),
        ("/v1/config/reload", lambda client: client.reload_config()),
        ("/v1/config/revert", lambda client: client.revert_config()),
    ],
)
async def test_change_whose_answer_was_lost_is_not_begun_again(
    server: ScriptedServer, path: str, call: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    """ORCH-2101, ORCH-2102, ORCH-3031: it may have been done since, and would be done twice."""
    server.on("POST", path, SILENCE)
    async with AsyncClient(server.url) as client:
        with pytest.raises(Unreachable):
            await call(client)
    assert len(server.requests) == 1


async def test_an_answer_that_breaks_the_contract_is_a_fault(server: ScriptedServer) -> None:
    server.on("POST", TASKS, body({"task_id": 7}, 202))
    async with AsyncClient(server.url) as client:
        with pytest.raises(ProtocolFault, match="TaskAccepted"):
            await client.submit(model_ref="m", prompt="p")


async def test_a_server_that_says_nothing_is_unreachable(server: ScriptedServer) -> None:
    server.on(
        "GET", f"/v1/sessions/{SESSION_ID}", Reply(200, (b"{",), {"Content-Type": "text/event-stream"}, is_held=True)
    )
    async with AsyncClient(server.url, timeouts=Timeouts(answer_s=0.1)) as client:
        with pytest.raises(Unreachable, match="in time"):
            await client.get_session(SESSION_ID)


async def test_list_tasks_sends_only_the_filters_that_were_given(server: ScriptedServer) -> None:
    server.on("GET", TASKS, body({"tasks": [], "next_cursor": None}))
    async with AsyncClient(server.url) as client:
        await client.list_tasks()
        await client.list_tasks(state=TaskState.running, limit=3, cursor="AA")
    assert [request.query for request in server.requests] == [{}, {"state": "running", "limit": "3", "cursor": "AA"}]


async def test_ids_cannot_lead_to_another_path(server: ScriptedServer) -> None:
    async with AsyncClient(server.url) as client:
        with pytest.raises(ApiError):
            await client.get_task("../../healthz?x=")
    assert server.requests[0].path == "/v1/tasks/..%2F..%2Fhealthz%3Fx%3D"


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", "http://[::1"])
def test_an_address_of_no_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        AsyncClient(url)


async def test_a_password_in_the_address_is_in_no_message() -> None:
    async with AsyncClient("http://me:secret@127.0.0.1:9") as client:
        with pytest.raises(Unreachable) as told:
            await client.get_capabilities()
    assert "secret" not in str(told.value)


async def test_a_closed_client_says_so(server: ScriptedServer) -> None:
    client = AsyncClient(server.url)
    await client.aclose()
    with pytest.raises(Unreachable, match="closed"):
        await client.get_capabilities()
