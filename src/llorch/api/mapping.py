"""Tasks and sessions between the wire and the use cases: bodies become submissions, views become bodies.

What is unknown stays null; nothing is invented here but the ids that a client left out.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from pydantic import MISSING, BaseModel

from llorch.domain.task import Budgets, Fault, Priority, TaskState
from llorch.errors import InvalidParams
from llorch.service.frames import budgets, problem
from llorch.service.ports import NO_SAMPLING, Message, Sampling, Usage
from llorch.service.submission import Acceptance, Placement, SessionView, Submission, TaskView, Timeline
from llorch_contract import models

_MAX_LABEL_KEY = 64

_BUDGET_HEADERS = {
    "tokens": "X-Budget-Tokens-Remaining",
    "time_ms": "X-Budget-Time-Remaining-Ms",
    "cost": "X-Budget-Cost-Remaining",
}

# The wire's words and ours, each with a dictionary: an enum's `value` and call take 0.4 and 1 us, these 0.05.
_PRIORITIES: dict[str, Priority] = {priority.value: priority for priority in Priority}
_STATES = {state: models.TaskState(state.value) for state in TaskState}
_WORDS: dict[str | None, str] = {
    word: word.value
    for words in (models.Workload, models.Engine, models.KvHint, models.OnDisconnect, models.MessageRole)
    for word in words
}


def to_submission(body: models.TaskRequest, tenant: str) -> Submission:
    """The task that a validated body asks for. Raises InvalidParams for labels that no schema word can forbid."""
    given = _given(body)
    _lower_ids(given)
    labels = given.get("labels", {})
    _check_labels(labels)
    value = given.get
    return Submission(
        tenant=tenant,
        task_id=value("task_id") or _new_id(),
        session_id=value("session_id") or _new_id(),
        model_ref=body.model_ref,
        max_tokens=body.max_tokens,
        digest=_digest(given),
        workload=_WORDS[body.workload],
        engine=_WORDS.get(value("engine")),
        ctx=value("ctx"),
        priority=_PRIORITIES[body.priority],
        prompt=value("prompt"),
        messages=_messages(value("messages", ())),
        deadline_ms=value("deadline_ms"),
        abort_late=body.on_deadline is models.OnDeadline.abort,
        seed=value("seed"),
        strict=body.determinism is models.Determinism.strict,
        sampler_profile_version=value("sampler_profile_version"),
        sampling=_sampling(value("sampling")),
        expected_tokens=value("expected_tokens"),
        kv_hint=_WORDS[body.kv_hint],
        on_disconnect=_WORDS.get(value("on_disconnect")),
        budgets=_budgets_asked(value("session_budgets")),
        labels=labels,
    )


def to_accepted(acceptance: Acceptance) -> models.TaskAccepted:
    """The answer to a submit."""
    return models.TaskAccepted(
        task_id=acceptance.task_id,
        session_id=acceptance.session_id,
        state=_STATES[acceptance.state],
        queue_position=acceptance.queue_position,
        predicted_start_ms=acceptance.predicted_start_ms,
        backoff_ms=acceptance.backoff_ms,
        budgets=_budgets_left(acceptance.budgets),
    )


def budget_headers(left: Budgets | None) -> dict[str, str]:
    """The headers of a 202 that tell what is left; one for each budget that is set."""
    if left is None:
        return {}
    told = budgets(left)
    return {name: str(told[key]) for key, name in _BUDGET_HEADERS.items() if told[key] is not None}


def to_task(view: TaskView) -> models.Task:
    """A task in full."""
    return models.Task(
        task_id=view.task_id,
        session_id=view.session_id,
        state=models.TaskState(view.state.value),
        workload=models.Workload(view.workload),
        priority=models.Priority(view.priority.value),
        model_ref=view.model_ref,
        engine=models.Engine(view.engine),
        determinism=models.Determinism.strict if view.strict else models.Determinism.best_effort,
        seed=view.seed,
        labels=dict(view.labels),
        queue_position=view.queue_position,
        predicted_start_ms=view.predicted_start_ms,
        timeline=_timeline(view.timeline),
        placement=_placement(view.placement, view.timeline.attempts),
        output=models.TaskOutput(text=view.output) if view.output and view.state.is_final else None,
        finish_reason=None if view.finish_reason is None else models.FinishReason(view.finish_reason),
        usage=_usage(view.usage),
        error=_error(view, view.fault),
    )


def to_summary(view: TaskView) -> models.TaskSummary:
    """A task in a list."""
    return models.TaskSummary(
        task_id=view.task_id,
        session_id=view.session_id,
        state=models.TaskState(view.state.value),
        workload=models.Workload(view.workload),
        priority=models.Priority(view.priority.value),
        model_ref=view.model_ref,
        engine=models.Engine(view.engine),
        accepted_at=timestamp(view.timeline.accepted_at),
        ended_at=optional_timestamp(view.timeline.ended_at),
        finish_reason=None if view.finish_reason is None else models.FinishReason(view.finish_reason),
        error_code=None if view.fault is None else models.ErrorCode(view.fault.kind.code),
        labels=dict(view.labels),
    )


def to_session(view: SessionView) -> models.Session:
    """A session."""
    return models.Session(
        session_id=view.session_id,
        ttl_ms_remaining=max(0, view.ttl_ms_remaining),
        turns=view.turns,
        turns_max=view.turns_max,
        kv_bytes=view.kv_bytes,
        kv_warmth=view.kv_warmth,
        budgets=_budgets_left(view.budgets),
    )


def to_state(state: Literal["queued", "running", "succeeded", "failed", "canceled"] | None) -> TaskState | None:
    """The state that a list is narrowed to."""
    return None if state is None else TaskState(state)


def timestamp(seconds: float) -> str:
    """Seconds since the Unix epoch as RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def optional_timestamp(seconds: float | None) -> str | None:
    """The same where it may not have happened yet."""
    return None if seconds is None else timestamp(seconds)


def _given(body: BaseModel) -> dict[str, Any]:
    """The fields that were given or have a default; `model_dump` of a whole body takes twice as long."""
    return {name: value for name, value in body.__dict__.items() if value is not MISSING}


_encode_sorted = msgspec.json.Encoder(order="deterministic", enc_hook=_given).encode


def _lower_ids(given: dict[str, Any]) -> None:
    for name in ("task_id", "session_id"):
        if name in given:
            given[name] = given[name].lower()


def _digest(given: dict[str, Any]) -> bytes:
    """sha256 of the canonical body: what means the same gives the same, however it was spelled.

    Keys are sorted, UUIDs lower-case, and what was left out has its default, but for the ids that the server makes.
    """
    canonical = given.copy()
    canonical.setdefault("expected_tokens", given["max_tokens"])
    canonical.setdefault("labels", {})
    canonical.setdefault("sampling", {})
    is_interactive = given["priority"] is models.Priority.interactive
    canonical.setdefault("on_disconnect", "cancel" if is_interactive else "continue")
    return hashlib.sha256(_encode_sorted(canonical)).digest()


def _new_id() -> str:
    """A random UUID of version 4; `str(uuid4())` takes four times as long."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def _check_labels(labels: Mapping[str, str]) -> None:
    for key in labels:
        if not 1 <= len(key) <= _MAX_LABEL_KEY:
            reason = f"must have keys of 1 to {_MAX_LABEL_KEY} characters"
            raise InvalidParams(f"labels {reason}", details={"path": "/labels", "reason": reason})


def _messages(messages: Iterable[models.Message]) -> tuple[Message, ...]:
    return tuple([Message(role=_WORDS[message.role], content=message.content) for message in messages])


def _sampling(asked: models.Sampling | None) -> Sampling:
    if asked is None:
        return NO_SAMPLING
    value = _given(asked).get
    return Sampling(
        temperature=value("temperature"),
        top_p=value("top_p"),
        top_k=value("top_k"),
        stop=tuple(value("stop", ())),
        grammar=value("grammar"),
        json_schema=value("json_schema"),
    )


def _budgets_asked(asked: models.SessionBudgets | None) -> Budgets | None:
    if asked is None:
        return None
    value = _given(asked).get
    time_ms = value("time_ms")
    return Budgets(value("tokens"), None if time_ms is None else time_ms / 1000, value("cost"))


def _budgets_left(left: Budgets | None) -> models.BudgetsRemaining | None:
    return None if left is None else models.BudgetsRemaining(**budgets(left))


def _timeline(timeline: Timeline) -> models.TaskTimeline:
    return models.TaskTimeline(
        accepted_at=timestamp(timeline.accepted_at),
        started_at=optional_timestamp(timeline.started_at),
        first_token_at=optional_timestamp(timeline.first_token_at),
        ended_at=optional_timestamp(timeline.ended_at),
        waited_ms=max(0, timeline.waited_ms),
        wait_reasons=[models.WaitReason(reason.value) for reason in timeline.wait_reasons],
        attempts=timeline.attempts,
        preemptions=timeline.preemptions,
    )


def _placement(placement: Placement | None, attempts: int) -> models.Placement | None:
    if placement is None:
        return None
    return models.Placement(pool_id=placement.pool_id, replica_id=placement.replica_id, attempt=attempts)


def _usage(usage: Usage | None) -> models.Usage | None:
    if usage is None:
        return None
    return models.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _error(view: TaskView, fault: Fault | None) -> models.Problem | None:
    """The same envelope as the task's `error` frame."""
    if fault is None:
        return None
    placed = view.placement
    error = fault.error(engine=view.engine, pool_id=None if placed is None else placed.pool_id)
    envelope = problem(error, view.correlation_id)
    envelope["code"] = models.ErrorCode(error.code)
    envelope["engine"] = models.Engine(view.engine)
    return models.Problem(**envelope)
