"""ORCH-2001 … 2014: what `llorch.client` sends and what it can do with the answers, as a pact with the service.

The committed file in `pacts/` is what the live service is verified against. When an interaction changes on purpose,
write it anew with `WRITE_PACTS=1 python -m pytest tests/contract/test_client_pact.py`.
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["PACT_DO_NOT_TRACK"] = "true"

from pact import Pact

from llorch.client import AsyncClient, End, Event, Started, TaskState, Token
from tests.contract.interactions import (
    ANYTHING,
    DATA_KEY,
    EXACT,
    INTEGER,
    INTEGER_OR_NULL,
    MODEL,
    POOL,
    TEXT_OR_NULL,
    TIME,
    TIME_OR_NULL,
    UNKNOWN_KEY,
    UUID,
    Interaction,
    Reply,
    State,
    any_of,
    problem,
    refused,
    regex,
    returned,
)
from tests.contract.operator_interactions import OPERATOR_INTERACTIONS
from tests.contract.policy_interactions import POLICY_INTERACTIONS

PACTS = Path(__file__).parent / "pacts"

NEW_TASK = "00000000-0000-4000-8000-000000000001"
FULL_TASK = "00000000-0000-4000-8000-000000000002"
SUCCEEDED_TASK = "00000000-0000-4000-8000-000000000003"
EVICTED_TASK = "00000000-0000-4000-8000-000000000004"
WAITING_TASK = "00000000-0000-4000-8000-000000000005"
UNKNOWN_TASK = "00000000-0000-4000-8000-000000000006"
ANSWERED_TASK = "00000000-0000-4000-8000-000000000007"
SESSION = "00000000-0000-4000-8000-0000000000a1"
NEW_SESSION = "00000000-0000-4000-8000-0000000000a2"
EVICTED_SESSION = "00000000-0000-4000-8000-0000000000a3"
UNKNOWN_SESSION = "00000000-0000-4000-8000-0000000000a4"
SPENT_SESSION = "00000000-0000-4000-8000-0000000000a5"
SPENT_TASK = "00000000-0000-4000-8000-000000000008"
TOKEN_FRAMES = 2
LAST_ID = TOKEN_FRAMES + 2

SERVES: State = ("the server serves a model", {"model_ref": MODEL, "pool_id": POOL})
SUCCEEDED: State = (
    "a task that succeeded",
    {"model_ref": MODEL, "task_id": SUCCEEDED_TASK, "session_id": SESSION, "token_frames": TOKEN_FRAMES},
)
EVICTABLE: State = (
    "a task that succeeded",
    {"model_ref": MODEL, "task_id": EVICTED_TASK, "session_id": EVICTED_SESSION, "token_frames": TOKEN_FRAMES},
)
WAITS: State = ("a task that waits in the queue", {"model_ref": MODEL, "task_id": WAITING_TASK})
FULL: State = ("a route whose queue is full", {"model_ref": MODEL})
SPENT: State = ("a session that has had all its turns", {"model_ref": MODEL, "session_id": SPENT_SESSION})


ACCEPTED = Reply(
    202,
    {
        "task_id": NEW_TASK, "session_id": NEW_SESSION, "state": "queued", "queue_position": 0,
        "predicted_start_ms": None, "backoff_ms": None, "budgets": None,
    },
    {
        "$.budgets": EXACT, "$.task_id": EXACT, "$.session_id": UUID, "$.state": regex("^(queued|running|succeeded)$"),
        "$.queue_position": INTEGER, "$.predicted_start_ms": INTEGER_OR_NULL, "$.backoff_ms": INTEGER_OR_NULL,
    },
)  # fmt: skip

PROMPT = {"task_id": NEW_TASK, "model_ref": MODEL, "prompt": "The capital of France is", "max_tokens": 2}
MESSAGES = {
    "task_id": ANSWERED_TASK, "session_id": NEW_SESSION, "workload": "completion", "model_ref": MODEL,
    "engine": "llamacpp", "priority": "batch",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 2, "deadline_ms": 60000, "on_deadline": "abort", "seed": 42, "determinism": "best_effort",
    "sampler_profile_version": "v1", "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "stop": ["\n\n"]},
    "expected_tokens": 2, "kv_hint": "cold", "on_disconnect": "continue", "labels": {"app": "pact"},
}  # fmt: skip
TASK = {
    "task_id": SUCCEEDED_TASK, "session_id": SESSION, "state": "succeeded", "workload": "completion",
    "priority": "interactive", "model_ref": MODEL, "engine": "llamacpp", "determinism": "best_effort", "seed": 7,
    "labels": {}, "queue_position": None, "predicted_start_ms": None,
    "timeline": {
        "accepted_at": "2025-11-23T04:25:00.123Z", "started_at": "2025-11-23T04:25:00.124Z",
        "first_token_at": "2025-11-23T04:25:00.125Z", "ended_at": "2025-11-23T04:25:00.126Z", "waited_ms": 1,
        "wait_reasons": [], "attempts": 1, "preemptions": 0,
    },
    "placement": {"pool_id": POOL, "replica_id": f"{POOL}/0", "attempt": 1}, "output": {"text": " Paris."},
    "finish_reason": "length", "usage": {"prompt_tokens": 6, "completion_tokens": 2, "cached_tokens": None},
    "error": None,
}  # fmt: skip
TASK_RULES = {
    "$.task_id": EXACT, "$.session_id": EXACT, "$.state": EXACT, "$.model_ref": EXACT, "$.queue_position": EXACT,
    "$.error": EXACT, "$.finish_reason": regex("^(stop|length|stop_sequence)$"), "$.seed": INTEGER,
    "$.predicted_start_ms": INTEGER_OR_NULL, "$.timeline.accepted_at": TIME, "$.timeline.started_at": TIME,
    "$.timeline.first_token_at": TIME_OR_NULL, "$.timeline.ended_at": TIME, "$.timeline.preemptions": EXACT,
    "$.usage.prompt_tokens": INTEGER_OR_NULL,
    "$.usage.completion_tokens": INTEGER_OR_NULL, "$.usage.cached_tokens": INTEGER_OR_NULL,
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "task_id": SUCCEEDED_TASK, "session_id": SESSION, "state": "succeeded", "workload": "completion",
    "priority": "interactive", "model_ref": MODEL, "engine": "llamacpp", "accepted_at": "2025-11-23T04:25:00.123Z",
    "ended_at": "2025-11-23T04:25:00.126Z", "finish_reason": "length", "error_code": None, "labels": {},
}  # fmt: skip
SESSION_BODY = {
    "session_id": SESSION, "ttl_ms_remaining": 534210, "turns": 1, "turns_max": 8, "kv_bytes": None, "kv_warmth": None,
    "budgets": None,
}  # fmt: skip
POOL_BODY = {
    "id": POOL,
    "route": {"engine": "llamacpp", "model": MODEL, "quant": "default", "ctx": 2048, "sampler_profile_version": "v1"},
    "allow_cpu": True, "notice": None,
    "queues": [
        {"priority": "interactive", "capacity": 4, "full_policy": "reject", "depth": 0},
        {"priority": "batch", "capacity": 4, "full_policy": "drop-lru", "depth": 0},
    ],
    "replicas": {
        "total": 1, "starting": 0, "loading": 0, "ready": 1, "self_test": 0, "unready": 0, "draining": 0, "stopped": 0,
        "failed": 0,
    },
}  # fmt: skip
HEALTH = {
    "pool_id": POOL, "live": True, "ready": True, "draining": False, "change": None, "last_error": None,
    "notice": None,
    "replicas": [{
        "replica_id": f"{POOL}/0", "state": "ready", "slots": 1, "slots_busy": 0, "engine_version": None,
        "engine_version_source": "unverified", "model_digest": None, "model_digest_source": "unverified",
        "determinism": "exact", "allow_cpu": True, "devices": [], "kv_cache_usage_ratio": None, "node": None,
        "process": None, "last_error": None,
    }],
}  # fmt: skip
REPLICA_SET = {
    "engine": "llamacpp", "model": MODEL, "quant": "default", "ctx": 2048, "sampler_profile_version": "v1",
    "engine_version": None, "model_digest": None, "determinism": "exact", "replica_ids": [f"{POOL}/0"],
    "load": {"slots": 1, "slots_busy": 0, "queued": 0},
    "slo": [{
        "priority": "interactive", "tasks": 1, "first_token_p95_ms": 2, "total_p95_ms": 5, "error_ratio": 0.5,
        "window_ms": 300000,
    }],
}  # fmt: skip
CAPABILITIES = {
    "api_version": "1.0",
    "routes": [{
        "engine": "llamacpp", "model": MODEL, "quant": "default", "ctx_max": 2048, "sampler_profile_version": "v1",
        "workloads": ["completion"], "priorities": ["interactive", "batch"], "determinism": ["exact"],
        "features": ["prompt"], "allow_cpu": True,
    }],
    "limits": {
        "body_bytes": 1048576, "header_bytes": 32768, "prompt_chars": 524288, "max_tokens": 8192, "open_streams": 4096,
        "session_ttl_ms": 600000, "session_turns": 8, "disconnect_grace_ms": 10000, "transcript_retention_ms": 60000,
    },
    "notices": [],
}  # fmt: skip

STARTED_FRAME = (
    'id: 1\nevent: started\ndata: {"queue_position":0,"predicted_start_ms":null,"waited_ms":1,"pool_id":"pact",'
    '"replica_id":"pact/0","kv_warmth":null,"affinity":null}\n\n'
)
LATER_FRAMES = (
    'id: 2\nevent: token\ndata: {"t":" Paris","i":0}\n\n'
    'id: 3\nevent: token\ndata: {"t":".","i":1}\n\n'
    'id: 4\nevent: end\ndata: {"tokens_out":2,"decode_ms":5,"first_token_ms":2,"waited_ms":1,"finish_reason":"length",'
    '"usage":{"prompt_tokens":6,"completion_tokens":2,"cached_tokens":null}}\n\n'
)
# Oniguruma, where \A and \z are the ends of the text and a dot is no newline.
ADVICE_PATTERN = r"(: hb\n\n|event: (queued|metrics)\ndata: \{.*\}\n\n)*"
STARTED_PATTERN = r'id: 1\nevent: started\ndata: \{.*"replica_id":".*\}\n\n'
LATER_PATTERN = (
    r'id: 2\nevent: token\ndata: \{"t":".*","i":0\}\n\n'
    r'id: 3\nevent: token\ndata: \{"t":".*","i":1\}\n\n'
    r'id: 4\nevent: end\ndata: \{.*"finish_reason":"(stop|length|stop_sequence)".*\}\n\n'
)


def stream(text: str, pattern: str) -> Reply:
    return Reply(200, text, {"$": regex(rf"\A{ADVICE_PATTERN}{pattern}\z")})


def followed(after: int, *kinds: type[Event]) -> Callable[[AsyncClient], Awaitable[None]]:
    async def check(client: AsyncClient) -> None:
        assert [type(event) async for event in client.stream(SUCCEEDED_TASK, after)] == list(kinds)

    return check


INTERACTIONS = [
    Interaction(
        "a task with a prompt", "POST", "/v1/tasks", ACCEPTED, states=(SERVES,), body=PROMPT,
        act=returned(lambda client: client.submit(**PROMPT), task_id=NEW_TASK, session_id=NEW_SESSION),
    ),
    Interaction(
        "a task with messages and every parameter", "POST", "/v1/tasks",
        Reply(202, {**ACCEPTED.body, "task_id": ANSWERED_TASK}, {**ACCEPTED.rules, "$.session_id": EXACT}),
        states=(SERVES,), body=MESSAGES,
        act=returned(lambda client: client.submit(**MESSAGES), task_id=ANSWERED_TASK, session_id=NEW_SESSION),
    ),
    Interaction(
        "a task with a key that nobody knows", "POST", "/v1/tasks",
        problem(401, "UNAUTHENTICATED", headers={"WWW-Authenticate": ('Bearer realm="llorch"', regex("^Bearer.*$"))}),
        key=UNKNOWN_KEY, body=PROMPT, act=refused("UNAUTHENTICATED", 401, lambda client: client.submit(**PROMPT)),
    ),
    Interaction(
        "a task for a model that nothing serves", "POST", "/v1/tasks", problem(404, "NOT_FOUND"), states=(SERVES,),
        body={**PROMPT, "model_ref": "no-such-model"},
        act=refused("NOT_FOUND", 404, lambda client: client.submit(**{**PROMPT, "model_ref": "no-such-model"})),
    ),
    Interaction(
        "another task under a task_id that is in use", "POST", "/v1/tasks", problem(409, "CONFLICT"),
        states=(SUCCEEDED,), body={**PROMPT, "task_id": SUCCEEDED_TASK, "prompt": "Another prompt than before"},
        act=refused("CONFLICT", 409, lambda client: client.submit(
            **{**PROMPT, "task_id": SUCCEEDED_TASK, "prompt": "Another prompt than before"}
        )),
    ),
    Interaction(
        "a task with more tokens than a transcript holds", "POST", "/v1/tasks", problem(422, "INVALID_PARAMS"),
        states=(SERVES,), body={**PROMPT, "task_id": UNKNOWN_TASK, "max_tokens": 1048576},
        act=refused("INVALID_PARAMS", 422, lambda client: client.submit(
            **{**PROMPT, "task_id": UNKNOWN_TASK, "max_tokens": 1048576}
        )),
    ),
    Interaction(
        "a task for a full queue", "POST", "/v1/tasks",
        problem(429, "ADMISSION_REJECT", retriable=True, policy="reject"),
        states=(FULL,), body={**PROMPT, "task_id": FULL_TASK},
        act=refused("ADMISSION_REJECT", 429, lambda client: client.submit(
            **{**PROMPT, "task_id": FULL_TASK}
        ), policy="reject"),
    ),
    Interaction(
        "a task for a session without turns", "POST", "/v1/tasks",
        problem(429, "BUDGET_EXHAUSTED", retriable=True, policy="session-turns", knows_wait=True),
        states=(SPENT,), body={**PROMPT, "task_id": SPENT_TASK, "session_id": SPENT_SESSION},
        act=refused("BUDGET_EXHAUSTED", 429, lambda client: client.submit(
            **{**PROMPT, "task_id": SPENT_TASK, "session_id": SPENT_SESSION}
        ), advised_wait_s=1.73, policy="session-turns"),
    ),
    Interaction(
        "a task that succeeded", "GET", f"/v1/tasks/{SUCCEEDED_TASK}", Reply(200, TASK, TASK_RULES),
        states=(SUCCEEDED,),
        act=returned(lambda client: client.get_task(SUCCEEDED_TASK), state=TaskState.succeeded, session_id=SESSION),
    ),
    Interaction(
        "a task that nobody submitted", "GET", f"/v1/tasks/{UNKNOWN_TASK}", problem(404, "NOT_FOUND"),
        act=refused("NOT_FOUND", 404, lambda client: client.get_task(UNKNOWN_TASK)),
    ),
    Interaction(
        "the tasks of a session", "GET", "/v1/tasks",
        Reply(200, {"tasks": [SUMMARY], "next_cursor": None}, {
            "$.tasks[0].task_id": EXACT, "$.tasks[0].state": EXACT, "$.tasks[0].accepted_at": TIME,
            "$.tasks[0].ended_at": TIME, "$.tasks[0].finish_reason": regex("^(stop|length|stop_sequence)$"),
            "$.next_cursor": TEXT_OR_NULL,
        }),
        states=(SUCCEEDED,), query={"state": "succeeded", "session_id": SESSION, "limit": "1"},
        act=returned(
            lambda client: client.list_tasks(state=TaskState.succeeded, session_id=SESSION, limit=1), next_cursor=None
        ),
    ),
    Interaction(
        "tasks after a cursor that the server did not give", "GET", "/v1/tasks", problem(422, "INVALID_PARAMS"),
        query={"cursor": "not-a-cursor-of-yours"},
        act=refused("INVALID_PARAMS", 422, lambda client: client.list_tasks(cursor="not-a-cursor-of-yours")),
    ),
    Interaction(
        "the stream of a task", "GET", f"/v1/tasks/{SUCCEEDED_TASK}/stream",
        stream(STARTED_FRAME + LATER_FRAMES, STARTED_PATTERN + LATER_PATTERN), states=(SUCCEEDED,),
        headers={"Accept": "text/event-stream"}, act=followed(0, Started, Token, Token, End),
    ),
    Interaction(
        "the rest of a stream", "GET", f"/v1/tasks/{SUCCEEDED_TASK}/stream", stream(LATER_FRAMES, LATER_PATTERN),
        states=(SUCCEEDED,), headers={"Last-Event-ID": "1"}, act=followed(1, Token, Token, End),
    ),
    Interaction(
        "the rest of a stream after its terminal frame", "GET", f"/v1/tasks/{SUCCEEDED_TASK}/stream", Reply(204),
        states=(SUCCEEDED,), headers={"Last-Event-ID": str(LAST_ID)}, act=followed(LAST_ID),
    ),
    Interaction(
        "the stream of a task that nobody submitted", "GET", f"/v1/tasks/{UNKNOWN_TASK}/stream",
        problem(404, "NOT_FOUND"), act=refused("NOT_FOUND", 404, lambda client: anext(client.stream(UNKNOWN_TASK))),
    ),
    Interaction(
        "the cancel of a waiting task", "POST", f"/v1/tasks/{WAITING_TASK}/cancel", Reply(204), states=(WAITS,),
        act=returned(lambda client: client.cancel(WAITING_TASK)),
    ),
    Interaction(
        "the cancel of a task that nobody submitted", "POST", f"/v1/tasks/{UNKNOWN_TASK}/cancel",
        problem(404, "NOT_FOUND"), act=refused("NOT_FOUND", 404, lambda client: client.cancel(UNKNOWN_TASK)),
    ),
    Interaction(
        "a session", "GET", f"/v1/sessions/{SESSION}",
        Reply(200, SESSION_BODY, {
            "$.session_id": EXACT, "$.ttl_ms_remaining": INTEGER, "$.turns": INTEGER, "$.turns_max": INTEGER,
            "$.kv_bytes": INTEGER_OR_NULL, "$.kv_warmth": any_of({"match": "null"}, {"match": "boolean"}),
            "$.budgets": EXACT,
        }),
        states=(SUCCEEDED,), act=returned(lambda client: client.get_session(SESSION), session_id=SESSION, turns=1),
    ),
    Interaction(
        "the eviction of a session", "DELETE", f"/v1/sessions/{EVICTED_SESSION}", Reply(204), states=(EVICTABLE,),
        act=returned(lambda client: client.delete_session(EVICTED_SESSION)),
    ),
    Interaction(
        "the eviction of a session that is not there", "DELETE", f"/v1/sessions/{UNKNOWN_SESSION}",
        problem(404, "NOT_FOUND"), act=refused("NOT_FOUND", 404, lambda client: client.delete_session(UNKNOWN_SESSION)),
    ),
    Interaction(
        "the pools", "GET", "/v1/pools",
        Reply(200, {"pools": [POOL_BODY]}, {
            "$.pools[0].queues[0].priority": EXACT, "$.pools[0].queues[0].full_policy": EXACT,
            "$.pools[0].queues[1].priority": EXACT, "$.pools[0].queues[1].full_policy": EXACT,
            "$.pools[0].id": EXACT, "$.pools[0].route.model": EXACT, "$.pools[0].route.quant": TEXT_OR_NULL,
            "$.pools[*].notice": TEXT_OR_NULL,
        }),
        states=(SERVES,), act=returned(lambda client: client.list_pools()),
    ),
    Interaction(
        "the pools, with a key for tasks only", "GET", "/v1/pools", problem(403, "FORBIDDEN"), key=DATA_KEY,
        act=refused("FORBIDDEN", 403, lambda client: client.list_pools()),
    ),
    Interaction(
        "the health of a pool", "GET", f"/v1/pools/{POOL}/health",
        Reply(200, HEALTH, {
            "$.pool_id": EXACT, "$.ready": EXACT, "$.notice": TEXT_OR_NULL,
            "$.last_error": ANYTHING, "$.change": EXACT, "$.replicas[0].replica_id": EXACT,
            "$.replicas[0].kv_cache_usage_ratio": any_of({"match": "null"}, {"match": "number"}),
            "$.replicas[0].node": EXACT, "$.replicas[0].process": EXACT,
            "$.replicas[0].state": EXACT, "$.replicas[0].engine_version": TEXT_OR_NULL,
            "$.replicas[0].model_digest": TEXT_OR_NULL,
            "$.replicas[0].engine_version_source": regex("^(stated|measured|unverified)$"),
            "$.replicas[0].model_digest_source": regex("^(stated|measured|unverified)$"),
            "$.replicas[0].determinism": regex("^(exact|best_effort)$"),
            "$.replicas[0].last_error": ANYTHING,
        }),
        states=(SERVES,), act=returned(lambda client: client.get_pool_health(POOL), pool_id=POOL, ready=True),
    ),
    Interaction(
        "the health of a pool that is not configured", "GET", "/v1/pools/no-such-pool/health",
        problem(404, "NOT_FOUND"), act=refused("NOT_FOUND", 404, lambda client: client.get_pool_health("no-such-pool")),
    ),
    Interaction(
        "the replica sets", "GET", "/v1/replica-sets",
        Reply(200, {"replica_sets": [REPLICA_SET]}, {
            "$.replica_sets[0].model": EXACT, "$.replica_sets[0].quant": TEXT_OR_NULL,
            "$.replica_sets[0].engine_version": TEXT_OR_NULL, "$.replica_sets[0].model_digest": TEXT_OR_NULL,
            "$.replica_sets[0].determinism": regex("^(exact|best_effort)$"),
            "$.replica_sets[*].slo[*].first_token_p95_ms": INTEGER_OR_NULL,
            "$.replica_sets[*].slo[*].total_p95_ms": INTEGER_OR_NULL,
            "$.replica_sets[*].slo[*].error_ratio": any_of({"match": "number"}),
        }),
        states=(SUCCEEDED,), act=returned(lambda client: client.list_replica_sets()),
    ),
    Interaction(
        "the capabilities", "GET", "/v1/capabilities",
        Reply(200, CAPABILITIES, {
            "$.api_version": regex(r"^1\.\d+$"), "$.routes[0].model": EXACT, "$.routes[0].quant": TEXT_OR_NULL,
        }),
        states=(SERVES,), act=returned(lambda client: client.get_capabilities(), api_version="1.0"),
    ),
    *OPERATOR_INTERACTIONS,
    *POLICY_INTERACTIONS,
]  # fmt: skip


def _pact() -> Pact:
    return Pact("llorch-client", "llorch").with_specification("V4")


@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda interaction: interaction.name)
async def test_the_client_keeps_its_side_of(interaction: Interaction) -> None:
    pact = _pact()
    interaction.arrange(pact)
    with pact.serve() as mock:
        async with interaction.connect(str(mock.url), interaction.key) as client:
            await interaction.act(client)


def test_the_committed_pact_is_what_the_client_expects(tmp_path: Path) -> None:
    pact = _pact()
    for interaction in INTERACTIONS:
        interaction.arrange(pact)
    pact.write_file(tmp_path, overwrite=True)
    (written,) = tmp_path.iterdir()
    committed = PACTS / written.name
    if os.environ.get("WRITE_PACTS"):
        PACTS.mkdir(exist_ok=True)
        committed.write_bytes(written.read_bytes())
    assert committed.read_bytes() == written.read_bytes(), f"{committed} is not what the client expects any more"
    assert sorted(path.name for path in PACTS.iterdir()) == [written.name]
