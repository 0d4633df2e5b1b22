"""A task as it was asked for, and as it can be looked at: the values that go between the edge and the use cases."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from llorch.domain.task import Budgets, Fault, Priority, TaskState, WaitReason
from llorch.service.ports import NO_SAMPLING, Message, Sampling, Usage


class Submission(msgspec.Struct, frozen=True):
    """A well-formed request for a task, ids canonical.

    None means that the client left it out. `digest` is that of the canonical body, for idempotency.
    Exactly one of `prompt`, `messages` and `inputs` is given.
    """

    tenant: str
    task_id: str
    session_id: str
    model_ref: str
    max_tokens: int
    digest: bytes
    workload: str = "completion"
    engine: str | None = None
    ctx: int | None = None
    priority: Priority = Priority.INTERACTIVE
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    deadline_ms: int | None = None
    abort_late: bool = False
    seed: int | None = None
    strict: bool = False
    sampler_profile_version: str | None = None
    sampling: Sampling = NO_SAMPLING
    expected_tokens: int | None = None
    kv_hint: str | None = None
    on_disconnect: str | None = None
    budgets: Budgets | None = None
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)


class Acceptance(msgspec.Struct, frozen=True):
    """What an accepted task was told, and is told again when it is submitted again. None is unknown."""

    task_id: str
    session_id: str
    state: TaskState
    queue_position: int
    predicted_start_ms: int | None = None
    backoff_ms: int | None = None
    budgets: Budgets | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a task passed its stations, in seconds since the Unix epoch; None for what has not happened."""

    accepted_at: float
    started_at: float | None
    first_token_at: float | None
    ended_at: float | None
    waited_ms: int
    wait_reasons: tuple[WaitReason, ...]
    attempts: int
    preemptions: int = 0


class Placement(msgspec.Struct, frozen=True):
    """Where the newest attempt ran or runs."""

    pool_id: str
    replica_id: str
    attempt_id: int
    engine_version: str | None
    model_digest: str | None


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as its owner may see it. `output` is None once the transcript has expired."""

    task_id: str
    session_id: str
    state: TaskState
    workload: str
    priority: Priority
    model_ref: str
    engine: str
    strict: bool
    seed: int
    max_tokens: int
    deadline_ms: int | None
    labels: Mapping[str, str]
    correlation_id: str
    timeline: Timeline
    placement: Placement | None
    queue_position: int | None
    predicted_start_ms: int | None
    output: str | None
    finish_reason: str | None
    usage: Usage | None
    fault: Fault | None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as its owner may see it. What no engine tells is None."""

    session_id: str
    ttl_ms_remaining: int
    turns: int
    turns_max: int
    kv_bytes: int | None = None
    kv_warmth: bool | None = None
    budgets: Budgets | None = None
