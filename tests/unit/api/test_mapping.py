"""From the wire to submissions and back; the digest that idempotency stands on (ORCH-2001, ORCH-2009, ORCH-2010)."""

import dataclasses
import json
from typing import Any
from uuid import RFC_4122, UUID

import pytest

from llorch.api.mapping import budget_headers, timestamp, to_accepted, to_session, to_submission, to_summary, to_task
from llorch.domain.task import Budgets, Fault, Priority, TaskState
from llorch.errors import Canceled, InvalidParams
from llorch.service.ports import Message, Sampling, Usage
from llorch.service.submission import Acceptance, SessionView
from llorch_contract import models
from tests.unit.api.fakes import SESSION, TASK, task_view

FULL: dict[str, Any] = {
    "task_id": TASK,
    "session_id": SESSION,
    "workload": "completion",
    "model_ref": "smol",
    "engine": "llamacpp",
    "ctx": 2048,
    "priority": "batch",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "max_tokens": 64,
    "deadline_ms": 30000,
    "on_deadline": "abort",
    "seed": 42,
    "determinism": "strict",
    "sampler_profile_version": "v1",
    "sampling": {"temperature": 1, "top_p": 0.9, "top_k": 40, "stop": ["\n\n"], "grammar": 'root ::= "a"'},
    "expected_tokens": 40,
    "kv_hint": "cold",
    "on_disconnect": "continue",
    "labels": {"b": "2", "a": "1"},
}
LEAST: dict[str, Any] = {"model_ref": "smol", "prompt": "x"}


def request(body: dict[str, Any]) -> models.TaskRequest:
    return models.TaskRequest.model_validate_json(json.dumps(body))


def digest(body: dict[str, Any]) -> bytes:
    return to_submission(request(body), "team").digest


def test_full_body_becomes_a_submission_field_by_field() -> None:
    submission = to_submission(request(FULL), "team")
    assert (submission.tenant, submission.task_id, submission.session_id) == ("team", TASK, SESSION)
    assert (submission.model_ref, submission.engine, submission.ctx) == ("smol", "llamacpp", 2048)
    assert (submission.workload, submission.priority) == ("completion", Priority.BATCH)
    assert submission.prompt is None
    assert submission.messages == (Message("system", "Be brief."), Message("user", "Why?"))
    assert (submission.max_tokens, submission.expected_tokens, submission.seed) == (64, 40, 42)
    assert (submission.deadline_ms, submission.abort_late, submission.strict) == (30000, True, True)
    assert submission.sampling == Sampling(1.0, 0.9, 40, ("\n\n",), 'root ::= "a"', None)
    assert (submission.kv_hint, submission.on_disconnect) == ("cold", "continue")
    assert (submission.labels, submission.budgets) == ({"a": "1", "b": "2"}, None)


def test_what_the_client_left_out_is_unknown_and_ids_are_made() -> None:
    submission, other = to_submission(request(LEAST), "team"), to_submission(request(LEAST), "team")
    assert (submission.engine, submission.ctx, submission.seed, submission.deadline_ms) == (None, None, None, None)
    assert (submission.on_disconnect, submission.expected_tokens) == (None, None)
    assert (submission.messages, submission.labels, submission.sampling) == ((), {}, Sampling())
    assert (submission.priority, submission.strict, submission.abort_late) == (Priority.INTERACTIVE, False, False)
    made = {submission.task_id, submission.session_id, other.task_id, other.session_id}
    assert len(made) == 4
    assert all(str(UUID(each)) == each for each in made)
    assert {(UUID(each).version, UUID(each).variant) for each in made} == {(4, RFC_4122)}


@pytest.mark.parametrize(
    ("asked", "budgets"),
    [
        ({"tokens": 5}, Budgets(5, None, None)),
        ({"time_ms": 1500}, Budgets(None, 1.5, None)),
        ({"tokens": 5, "cost": 0.25}, Budgets(5, None, 0.25)),
    ],
)
def test_session_budgets_are_taken_over_and_what_is_left_out_is_unlimited(
    asked: dict[str, Any], budgets: Budgets
) -> None:
    """ORCH-3099."""
    assert to_submission(request(LEAST | {"session_budgets": asked}), "team").budgets == budgets


def test_budgets_that_are_left_are_in_the_answer_and_in_headers_those_that_are_set() -> None:
    """ORCH-3099."""
    acceptance = Acceptance(TASK, SESSION, TaskState.QUEUED, 3, 1840, 620, Budgets(18211, 41.2, None))
    told = to_accepted(acceptance)
    assert (told.predicted_start_ms, told.backoff_ms) == (1840, 620)
    assert told.budgets == models.BudgetsRemaining(tokens=18211, time_ms=41200, cost=None)
    assert budget_headers(acceptance.budgets) == {
        "X-Budget-Tokens-Remaining": "18211",
        "X-Budget-Time-Remaining-Ms": "41200",
    }
    assert budget_headers(Budgets(cost=0.5)) == {"X-Budget-Cost-Remaining": "0.5"}
    assert (budget_headers(None), to_accepted(Acceptance(TASK, SESSION, TaskState.QUEUED, 3)).budgets) == ({}, None)


def test_json_schema_is_handed_on_as_it_is() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    submission = to_submission(request(LEAST | {"sampling": {"json_schema": schema}}), "team")
    assert submission.sampling.json_schema == schema
    assert list(submission.sampling.json_schema["properties"]) == ["z", "a"]


@pytest.mark.parametrize("key", ["", "k" * 65])
def test_label_keys_have_1_to_64_characters(key: str) -> None:
    with pytest.raises(InvalidParams):
        to_submission(request(LEAST | {"labels": {key: "v"}}), "team")
    assert to_submission(request(LEAST | {"labels": {"k" * 64: "v"}}), "team").labels == {"k" * 64: "v"}


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(FULL.items())),
        FULL | {"task_id": TASK.upper(), "session_id": SESSION.upper()},
        FULL | {"labels": {"a": "1", "b": "2"}},
        FULL | {"sampling": dict(reversed(FULL["sampling"].items()))},
        FULL | {"sampling": FULL["sampling"] | {"temperature": 1.0}},
    ],
)
def test_digest_does_not_depend_on_spelling(same: dict[str, Any]) -> None:
    assert digest(same) == digest(FULL)


def test_digest_does_not_depend_on_whitespace_or_escapes() -> None:
    compact = models.TaskRequest.model_validate_json(b'{"model_ref":"smol","prompt":"\\u00e9"}')
    spaced = models.TaskRequest.model_validate_json('{ "prompt" : "é",\n "model_ref" : "smol" }'.encode())
    assert to_submission(compact, "team").digest == to_submission(spaced, "team").digest


def test_digest_of_a_default_given_is_that_of_a_default_left_out() -> None:
    defaults = {
        "workload": "completion",
        "priority": "interactive",
        "max_tokens": 256,
        "expected_tokens": 256,
        "on_deadline": "finish",
        "determinism": "best_effort",
        "kv_hint": "reuse",
        "on_disconnect": "cancel",
        "labels": {},
        "sampling": {},
    }
    for name, value in defaults.items():
        assert digest(LEAST | {name: value}) == digest(LEAST), name
    assert digest(LEAST | defaults) == digest(LEAST)
    batch = LEAST | {"priority": "batch"}
    assert digest(batch | {"on_disconnect": "continue"}) == digest(batch)


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": SESSION},
        {"session_id": TASK},
        {"model_ref": "other"},
        {"engine": "vllm"},
        {"ctx": 1024},
        {"priority": "interactive"},
        {"messages": list(reversed(FULL["messages"]))},
        {"max_tokens": 65},
        {"deadline_ms": 30001},
        {"on_deadline": "finish"},
        {"seed": 43},
        {"determinism": "best_effort"},
        {"sampler_profile_version": "v2"},
        {"sampling": FULL["sampling"] | {"temperature": 0.5}},
        {"expected_tokens": 41},
        {"kv_hint": "reuse"},
        {"on_disconnect": "cancel"},
        {"labels": {"a": "2", "b": "1"}},
    ],
)
def test_digest_depends_on_every_field(change: dict[str, Any]) -> None:
    assert digest(FULL | change) != digest(FULL)
    name = next(iter(change))
    if name not in ("model_ref", "messages"):
        assert digest({key: value for key, value in FULL.items() if key != name}) != digest(FULL) or name in (
            "priority",
            "on_disconnect",
        )


def test_digest_depends_on_what_is_nested() -> None:
    def schema(**properties: Any) -> dict[str, Any]:
        return LEAST | {"sampling": {"json_schema": {"type": "object", "properties": properties}}}

    assert digest(schema(a={}, b={"type": "null"})) == digest(schema(b={"type": "null"}, a={}))
    assert digest(schema(a={}, b={"type": "null"})) != digest(schema(a={}, b={"type": "string"}))
    first, last = FULL["messages"]
    assert digest(FULL | {"messages": [first, last | {"content": "How?"}]}) != digest(FULL)
    assert digest(FULL | {"messages": [first, last | {"role": "assistant"}]}) != digest(FULL)
    budgets = {digest(LEAST | {"session_budgets": {"tokens": tokens}}) for tokens in (5, 6)} | {digest(LEAST)}
    inputs = {digest({"model_ref": "smol", "inputs": texts}) for texts in (["x"], ["x", "y"], ["y", "x"])}
    assert (len(budgets), len(inputs)) == (3, 3)


def test_ids_that_the_server_makes_are_not_in_the_digest() -> None:
    first, second = to_submission(request(LEAST), "a"), to_submission(request(LEAST), "b")
    assert first.session_id != second.session_id
    assert first.digest == second.digest


def test_acceptance_tells_what_is_known() -> None:
    accepted = to_accepted(Acceptance(TASK, SESSION, TaskState.QUEUED, 3))
    assert json.loads(accepted.model_dump_json()) == {
        "task_id": TASK,
        "session_id": SESSION,
        "state": "queued",
        "queue_position": 3,
        "predicted_start_ms": None,
        "backoff_ms": None,
        "budgets": None,
    }


def test_running_task_shows_its_timeline_and_no_output_yet() -> None:
    task = to_task(task_view(TaskState.RUNNING, output="half"))
    assert task.timeline.accepted_at == "2025-11-23T04:25:00.123Z"
    assert (task.timeline.ended_at, task.timeline.waited_ms) == (None, 240)
    assert [reason.value for reason in task.timeline.wait_reasons] == ["slots_busy"]
    assert task.placement is not None
    assert (task.placement.replica_id, task.placement.attempt) == ("small/0", 2)
    assert (task.output, task.usage, task.error, task.finish_reason) == (None, None, None, None)


def test_waiting_task_shows_its_predicted_start_and_how_often_it_made_room() -> None:
    """ORCH-3029, ORCH-3086."""
    timeline = dataclasses.replace(task_view().timeline, preemptions=2)
    task = to_task(task_view(TaskState.QUEUED, predicted_start_ms=1600, timeline=timeline))
    assert (task.predicted_start_ms, task.timeline.preemptions) == (1600, 2)


def test_session_shows_its_budgets_and_its_cache() -> None:
    session = to_session(SessionView(SESSION, 1000, 1, 8, kv_warmth=True, budgets=Budgets(18211, 41.2, None)))
    assert session.kv_warmth is True
    assert session.budgets == models.BudgetsRemaining(tokens=18211, time_ms=41200, cost=None)


def test_succeeded_task_shows_output_usage_and_reason() -> None:
    view = task_view(TaskState.SUCCEEDED, output=" Paris.", finish_reason="stop", usage=Usage(6, 3, None), strict=True)
    task = to_task(view)
    assert task.output is not None
    assert task.output.text == " Paris."
    assert task.usage is not None
    assert (task.usage.prompt_tokens, task.usage.completion_tokens, task.usage.cached_tokens) == (6, 3, None)
    assert (task.finish_reason, task.determinism) == (models.FinishReason.stop, models.Determinism.strict)


def test_ended_task_that_sent_nothing_has_no_output() -> None:
    assert to_task(task_view(TaskState.CANCELED, output="")).output is None
    assert to_task(task_view(TaskState.SUCCEEDED, output=None)).output is None


def test_canceled_task_shows_the_envelope_of_its_error_frame() -> None:
    task = to_task(task_view(TaskState.CANCELED, fault=Fault(Canceled)))
    assert task.error is not None
    assert (task.error.code, task.error.correlation_id) == (models.ErrorCode.CANCELED, "req-1")
    assert (task.error.engine, task.error.pool_id) == (models.Engine.llamacpp, "small")


def test_summary_tells_how_a_task_ended() -> None:
    summary = to_summary(task_view(TaskState.CANCELED, fault=Fault(Canceled)))
    assert (summary.state, summary.error_code) == (models.TaskState.canceled, models.ErrorCode.CANCELED)
    assert summary.labels == {"app": "docs"}


def test_session_shows_null_for_what_is_unknown() -> None:
    session = to_session(SessionView(SESSION, ttl_ms_remaining=-3, turns=2, turns_max=8))
    assert (session.ttl_ms_remaining, session.turns, session.turns_max) == (0, 2, 8)
    assert (session.kv_bytes, session.kv_warmth, session.budgets) == (None, None, None)


def test_timestamps_are_utc_to_the_millisecond() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
