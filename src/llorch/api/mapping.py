"""Tasks and sessions between the wire and the use cases: bodies become submissions, views become bodies.

What is unknown stays null; nothing is invented here but the ids that a client left out.
"""

import hashlib
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

import msgspec
from pydantic import MISSING

from llorch.domain.task import Fault, Priority, TaskState
from llorch.errors import InvalidParams
from llorch.service.frames import problem
from llorch.service.ports import Message, Sampling, Usage
from llorch.service.submission import Acceptance, Placement, SessionView, Submission, TaskView, Timeline
from llorch_contract import models

_MAX_LABEL_KEY = 64

_encode_sorted = msgspec.json.Encoder(order="deterministic").encode


def to_submission(body: models.TaskRequest, tenant: str) -> Submission:
    """The task that a validated body asks for. Raises InvalidParams for labels that no schema word can forbid."""
    _check_labels(body)
    return Submission(
        tenant=tenant,
        task_id=_canonical_id(body.task_id) or str(uuid4()),
        session_id=_canonical_id(body.session_id) or str(uuid4()),
        model_ref=body.model_ref,
        max_tokens=body.max_tokens,
        digest=digest_of(body),
        workload=body.workload.value,
        engine=_value(body.engine),
        ctx=_given(body.ctx),
        priority=Priority(body.priority.value),
        prompt=_given(body.prompt),
        messages=_messages(body),
        deadline_ms=_given(body.deadline_ms),
        abort_late=body.on_deadline is models.OnDeadline.abort,
        seed=_given(body.seed),
        strict=body.determinism is models.Determinism.strict,
        sampler_profile_version=_given(body.sampler_profile_version),
        sampling=_sampling(body),
        expected_tokens=_given(body.expected_tokens),
        kv_hint=body.kv_hint.value,
        on_disconnect=_value(body.on_disconnect),
        has_budgets=body.session_budgets is not MISSING,
        labels=_given(body.labels) or {},
    )


def digest_of(body: models.TaskRequest) -> bytes:
    """sha256 of the canonical body: what means the same gives the same, however it was spelled.

    Keys are sorted, UUIDs lower-case, and what was left out has its default, but for the ids that the server makes.
    """
    canonical: dict[str, Any] = body.model_dump()
    for name in ("task_id", "session_id"):
        if name in canonical:
            canonical[name] = canonical[name].lower()
    canonical.setdefault("expected_tokens", body.max_tokens)
    canonical.setdefault("labels", {})
    canonical.setdefault("sampling", {})
    is_interactive = body.priority is models.Priority.interactive
    canonical.setdefault("on_disconnect", "cancel" if is_interactive else "continue")
    return hashlib.sha256(_encode_sorted(canonical)).digest()


def to_accepted(acceptance: Acceptance) -> models.TaskAccepted:
    """The answer to a submit."""
    return models.TaskAccepted(
        task_id=acceptance.task_id,
        session_id=acceptance.session_id,
        state=models.TaskState(acceptance.state.value),
        queue_position=acceptance.queue_position,
        predicted_start_ms=acceptance.predicted_start_ms,
        backoff_ms=acceptance.backoff_ms,
    )


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
        predicted_start_ms=None,
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
        budgets=None,
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


def _check_labels(body: models.TaskRequest) -> None:
    if body.labels is not MISSING and not all(1 <= len(key) <= _MAX_LABEL_KEY for key in body.labels):
        reason = f"must have keys of 1 to {_MAX_LABEL_KEY} characters"
        raise InvalidParams(f"labels {reason}", details={"path": "/labels", "reason": reason})


def _given(value: Any) -> Any:
    return None if value is MISSING else value


def _value(choice: Any) -> str | None:
    return None if choice is MISSING else choice.value


def _canonical_id(text: Any) -> str | None:
    return None if text is MISSING else text.lower()


def _messages(body: models.TaskRequest) -> tuple[Message, ...]:
    if body.messages is MISSING:
        return ()
    return tuple(Message(role=message.role.value, content=message.content) for message in body.messages)


def _sampling(body: models.TaskRequest) -> Sampling:
    asked = body.sampling
    if asked is MISSING:
        return Sampling()
    return Sampling(
        temperature=_given(asked.temperature),
        top_p=_given(asked.top_p),
        top_k=_given(asked.top_k),
        stop=tuple(_given(asked.stop) or ()),
        grammar=_given(asked.grammar),
        json_schema=_given(asked.json_schema),
    )


def _timeline(timeline: Timeline) -> models.TaskTimeline:
    return models.TaskTimeline(
        accepted_at=timestamp(timeline.accepted_at),
        started_at=optional_timestamp(timeline.started_at),
        first_token_at=optional_timestamp(timeline.first_token_at),
        ended_at=optional_timestamp(timeline.ended_at),
        waited_ms=max(0, timeline.waited_ms),
        wait_reasons=[models.WaitReason(reason.value) for reason in timeline.wait_reasons],
        attempts=timeline.attempts,
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
