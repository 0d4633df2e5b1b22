"""Steps about answers: what is refused, how, and to whom."""

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from behave import step, then, when
from behave.runner import Context

from tests.support.driver import FINAL

Request = dict[str, Any]
TASK = {"model_ref": "duo", "prompt": "a", "max_tokens": 1}
JSON = {"Content-Type": "application/json"}


@then("the answer is {status:d}")
def step_status(context: Context, status: int) -> None:
    assert context.world.answer.status_code == status, context.world.answer


@then("the answer is {status:d} {code:Code}")
def step_status_and_code(context: Context, status: int, code: str) -> None:
    answer = context.world.answer
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text


@then("the problem is retriable and names the policy {policy:Model}")
def step_retriable(context: Context, policy: str) -> None:
    problem = context.world.answer.json()
    assert (problem["retriable"], problem["policy_label"]) == (True, policy), problem


@then("the problem names the policy {policy:Model}")
def step_policy(context: Context, policy: str) -> None:
    problem = context.world.answer.json()
    assert problem["policy_label"] == policy, problem


@then("nothing says how long to wait")
def step_no_wait(context: Context) -> None:
    answer = context.world.answer
    assert "retry-after" not in answer.headers
    assert "x-backoff-ms" not in answer.headers
    assert answer.json()["retry_after_ms"] is None


@then('Retry-After is what remains of the session "{session:Name}", and up to half of it more')
def step_retry_after(context: Context, session: str) -> None:
    world, answer = context.world, context.world.answer
    left = _session(context, "Alice", session).json()["ttl_ms_remaining"]
    told = answer.json()["retry_after_ms"]
    assert left <= told <= 1.5 * (left + 5000), (left, told)
    assert answer.headers["x-backoff-ms"] == str(told)
    assert answer.headers["retry-after"] == str(-(-told // 1000))
    assert world.ids[session]


@then("these bodies are refused, and each refusal names the fault")
@then("these bodies are refused, and each refusal names the fault:")
def step_bodies(context: Context) -> None:
    http = context.world.deployment.caller("Alice").http
    for row in context.table:
        answer = http.post("/v1/tasks", content=row["body"].encode(), headers=JSON)
        problem = answer.json()
        found = (answer.status_code, problem.get("code"))
        assert found == (int(row["status"]), row["code"]), (row["body"], answer.text)
        assert problem["retriable"] is False, answer.text
        said = problem["message"] + json.dumps(problem["details"])
        assert row["names"].lower() in said.lower(), (row["body"], answer.text)


@then('{who:Who} has nothing but "{name:Name}" that is not final')
def step_nothing_lost(context: Context, who: str, name: str) -> None:
    tasks = context.world.deployment.caller(who).http.get("/v1/tasks", params={"limit": 200}).json()["tasks"]
    unfinished = [task["task_id"] for task in tasks if task["state"] not in FINAL]
    assert unfinished == [context.world.ids[name]], unfinished


@step("{who:Who} sends a request with {fault}")
def step_faulty_request(context: Context, who: str, fault: str) -> None:
    client = context.world.deployment.caller(who).http
    context.world.answers.append(client.request(**FAULTS[fault]()))


@step("{who:Anyone} sends {method:w} {path:S}")
def step_request(context: Context, who: str, method: str, path: str) -> None:
    service = context.world.deployment.service
    if who in ("nobody", "a stranger"):
        headers = {"Authorization": f"Bearer llk_{uuid.uuid4().hex * 2}"} if who == "a stranger" else {}
        with service.client() as client:
            context.world.answers.append(client.request(method, path, headers=headers))
    else:
        context.world.answers.append(context.world.deployment.caller(who).http.request(method, path))


@then("the answer allows: {methods}")
def step_allow(context: Context, methods: str) -> None:
    assert context.world.answer.headers["allow"] == methods


@when("{who:Who} submits a chunked body")
def step_chunked(context: Context, who: str) -> None:
    http = context.world.deployment.caller(who).http
    context.world.answers.append(http.post("/v1/tasks", content=_pieces(json.dumps(TASK).encode()), headers=JSON))
    context.world.ids["chunked"] = context.world.answer.json()["task_id"]
    context.world.owners["chunked"] = who


@when('{who:Who} submits "{name:Name}" to {model:Model} under an upper-case task_id')
def step_upper_case(context: Context, who: str, name: str, model: str) -> None:
    world = context.world
    world.submit(who, name, model, task_id=world.id_of(name).upper())


@then("the answer has the lower-case task_id")
def step_lower_case(context: Context) -> None:
    [task_id] = context.world.ids.values()
    assert context.world.answer.json()["task_id"] == task_id.lower()


@then("{who:Who} finds it under both spellings")
def step_both_spellings(context: Context, who: str) -> None:
    [task_id] = context.world.ids.values()
    http = context.world.deployment.caller(who).http
    one, other = (http.get(f"/v1/tasks/{spelt}").json() for spelt in (task_id.upper(), task_id.lower()))
    assert one["task_id"] == other["task_id"] == task_id.lower()


@then("the correlation id of the answer is {correlation_id}")
def step_correlation(context: Context, correlation_id: str) -> None:
    assert context.world.answer.headers["x-correlation-id"] == correlation_id


@then("no CORS header is sent")
def step_no_cors(context: Context) -> None:
    headers = context.world.answer.headers
    assert not [name for name in headers if name.startswith("access-control-")], headers


@then("for {who:Who} these are all 404 NOT_FOUND, as for an id that never was")
@then("for {who:Who} these are all 404 NOT_FOUND, as for an id that never was:")
def step_foreign(context: Context, who: str) -> None:
    world = context.world
    http = world.deployment.caller(who).http
    strangers = {name: str(uuid.uuid4()) for name in world.ids}
    for row in context.table:
        last = row["last_event_id"]
        headers = {"X-Correlation-Id": "same", **({"Last-Event-ID": last} if last else {})}
        answers = [
            http.request(row["method"], row["path"].format_map(ids), headers=headers) for ids in (world.ids, strangers)
        ]
        foreign, unknown = answers
        assert (foreign.status_code, foreign.json()["code"]) == (404, "NOT_FOUND"), (row, foreign.text)
        bodies = [_without(ids, answer.text) for ids, answer in zip((world.ids, strangers), answers, strict=True)]
        assert bodies[0] == bodies[1], (row, bodies)
        assert list(foreign.headers.items()) == list(unknown.headers.items()), row


@then('"{name:Name}" is not in {who:Who}\'s list')
def step_not_in_list(context: Context, name: str, who: str) -> None:
    tasks = context.world.deployment.caller(who).http.get("/v1/tasks", params={"limit": 200}).json()["tasks"]
    assert context.world.ids[name] not in [task["task_id"] for task in tasks]


@then('{who:Who} finds {turns:d} turn in the session "{session:Name}"')
@then('{who:Who} finds {turns:d} turns in the session "{session:Name}"')
def step_turns(context: Context, who: str, turns: int, session: str) -> None:
    answer = _session(context, who, session)
    assert answer.status_code == 200, answer.text
    assert answer.json()["turns"] == turns, answer.text


@then('{who:Who} does not find the session "{session:Name}"')
def step_no_session(context: Context, who: str, session: str) -> None:
    answer = _session(context, who, session)
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND"), answer.text


@then('what is unknown of the session "{session:Name}" is null')
def step_session_unknown(context: Context, session: str) -> None:
    found = _session(context, "Alice", session).json()
    assert [found[name] for name in ("kv_bytes", "budgets")] == [None] * 2, found
    assert found["kv_warmth"] in (None, True, False), found
    assert 0 < found["ttl_ms_remaining"] <= 600_000, found
    assert found["turns_max"] == 3, found


@when('{who:Who} deletes the session "{session:Name}"')
def step_delete_session(context: Context, who: str, session: str) -> None:
    world = context.world
    world.answers.append(world.deployment.caller(who).http.delete(f"/v1/sessions/{world.ids[session]}"))


def _without(ids: dict[str, str], text: str) -> str:
    """The text without the id that was asked for."""
    for task_or_session_id in ids.values():
        text = text.replace(task_or_session_id, "…")
    return text


def _session(context: Context, who: str, session: str) -> httpx.Response:
    return context.world.deployment.caller(who).http.get(f"/v1/sessions/{context.world.ids[session]}")


def _post(content: Any = None, headers: dict[str, str] | None = None, **task: Any) -> Request:
    body = json.dumps({**TASK, **task}).encode() if content is None else content
    return {"method": "POST", "url": "/v1/tasks", "content": body, "headers": JSON if headers is None else headers}


def _get(path: str, **headers: str) -> Request:
    return {"method": "GET", "url": path, "headers": headers}


def _pieces(content: bytes, size: int = 1000) -> Iterator[bytes]:
    yield from (content[start : start + size] for start in range(0, len(content), size))


def _form() -> Request:
    return {"method": "POST", "url": "/v1/tasks", "data": {"model_ref": "duo", "prompt": "a"}}


FAULTS: dict[str, Callable[[], Request]] = {
    "a body that is not UTF-8": lambda: _post(b'{"model_ref": "duo", "prompt": "\xff\xfe"}'),
    "a chunked body that is not JSON": lambda: _post(_pieces(b'{"model_ref"')),
    "no body": lambda: _post(b""),
    "the media type text/plain": lambda: _post(headers={"Content-Type": "text/plain"}),
    "a form": _form,
    "a body of 70000 bytes": lambda: _post(prompt="x" * 70_000),
    "a chunked body of 70000 bytes": lambda: _post(_pieces(json.dumps({**TASK, "prompt": "x" * 70_000}).encode())),
    "a prompt of 20001 characters": lambda: _post(prompt="x" * 20_001),
    "headers of 9000 bytes": lambda: _get("/v1/tasks", **{"X-Long": "x" * 9000}),
    "an unknown query parameter": lambda: _get("/v1/tasks?colour=red"),
    "a task_id that is no UUID": lambda: _get("/v1/tasks/seven"),
    "a limit of 0": lambda: _get("/v1/tasks?limit=0"),
    "a limit that is a word": lambda: _get("/v1/tasks?limit=ten"),
    "an unknown state": lambda: _get("/v1/tasks?state=asleep"),
    "a cursor that nobody gave": lambda: _get("/v1/tasks?cursor=abc"),
    "a path that is not there": lambda: _get("/v1/nothing"),
    "a task that never was": lambda: _get(f"/v1/tasks/{uuid.uuid4()}"),
    "a session that never was": lambda: _get(f"/v1/sessions/{uuid.uuid4()}"),
    "the method PUT on /v1/tasks": lambda: {"method": "PUT", "url": "/v1/tasks"},
    "the method DELETE on a task": lambda: {"method": "DELETE", "url": f"/v1/tasks/{uuid.uuid4()}"},
    "a correlation id with spaces": lambda: _get("/v1/tasks", **{"X-Correlation-Id": "not one word"}),
    "the Host evil.example": lambda: _get("/v1/tasks", Host="evil.example"),
    "the Origin of evil.example": lambda: _get("/v1/tasks", Origin="http://evil.example"),
}
