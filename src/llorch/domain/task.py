"""What a task is to the scheduler: its wishes, its states, and the attempts made at it.

Owns the state machine as data. Knows nothing of prompts, tokens' texts, HTTP or engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from math import inf
from typing import NamedTuple

from llorch.errors import LlorchError

TaskKey = tuple[str, str]
"""(tenant, task_id): the same task_id under two tenants is two tasks."""

SessionKey = tuple[str, str]
"""(tenant, session_id)."""


class Priority(StrEnum):
    """Levels of a route's queue, most urgent first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"

    __hash__ = str.__hash__  # that of Enum is a Python function, and asked for several times per task


class WaitReason(StrEnum):
    """Why a task waits."""

    TASKS_AHEAD = "tasks_ahead"
    SLOTS_BUSY = "slots_busy"
    NO_READY_REPLICA = "no_ready_replica"
    NO_EXACT_REPLICA = "no_exact_replica"
    QUOTA = "quota"


class Affinity(StrEnum):
    """Whether a task met the replica that its session was served by last.

    MISS: that one was busy or too loaded. REPIN: it can serve the session no more.
    """

    HIT = "hit"
    MISS = "miss"
    REPIN = "repin"


class TaskState(Enum):
    """Where a task stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    __hash__ = object.__hash__  # as above

    @property
    def is_final(self) -> bool:
        """Nothing changes any more."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset({TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELED}),
    TaskState.RUNNING: frozenset({TaskState.QUEUED, TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED}),
    TaskState.SUCCEEDED: frozenset(),
    TaskState.FAILED: frozenset(),
    TaskState.CANCELED: frozenset(),
}


class InvalidTransition(LlorchError):
    """A task was asked to take a step that its state does not allow; the message tells how it got there."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why something was refused or went wrong, as a value that can be compared and turned into an error."""

    kind: type[LlorchError]
    message: str = ""
    policy_label: str | None = None
    retry_after_ms: int | None = None
    details: Mapping[str, int | str] | None = None

    def error(self, *, engine: str | None = None, pool_id: str | None = None) -> LlorchError:
        """The error to raise or to show for it."""
        return self.kind(
            self.message or None,
            engine=engine,
            pool_id=pool_id,
            retry_after_ms=self.retry_after_ms,
            policy_label=self.policy_label,
            details=self.details,
        )


@dataclass(frozen=True, slots=True)
class Cohort:
    """What replicas of one replica set agree in, beyond their route. None is unverified and equals only None."""

    engine_version: str | None
    model_digest: str | None
    exact: bool


@dataclass(frozen=True, slots=True)
class Need:
    """What a replica must be for a task to start there: anything, exact, or exactly of one cohort."""

    exact: bool = False
    cohort: Cohort | None = None


ANYWHERE = Need()
EXACT = Need(exact=True)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a session may use in its life: prompt and generated tokens, seconds of running, cost. None is unlimited."""

    tokens: int | None = None
    time_s: float | None = None
    cost: float | None = None


class Estimate(NamedTuple):
    """A time to come, in seconds: its mean and its variance (s squared)."""

    mean_s: float
    var_s2: float


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """The wishes of a submitted task as far as they touch order, placement and time.

    `prompt_tokens` is counted or estimated. `deadline_s` counts from acceptance to the terminal frame. `abort_late`
    ends a running task at its deadline. `cancel_unread` cancels the task some time after its last reader left.
    `can_continue`: broken off, it may go on from its text so far. `wants_warm`: its session's KV cache is of use to it.
    """

    key: TaskKey
    session: SessionKey
    priority: Priority
    max_tokens: int
    expected_tokens: int
    prompt_tokens: int = 0
    strict: bool = False
    deadline_s: float | None = None
    abort_late: bool = False
    cancel_unread: bool = False
    can_continue: bool = True
    wants_warm: bool = True
    budgets: Budgets | None = None


@dataclass(slots=True)
class Attempt:
    """One run of a task on a replica. It outlives its task while the engine is still letting go.

    `work_s` is how long it was predicted to run, `cost` what it was expected to do in weighted tokens,
    `tokens_before` what earlier attempts had produced, `wall_s` the longest that it may run by the policy of its start.
    One that is `broken_off`, for this reason, was told to stop; its task waits again when the engine let go.
    """

    attempt_id: int
    task: TaskKey
    replica_id: str
    slot: int
    started_at: float
    has_token: bool = False
    first_token_at: float | None = None
    wall_s: float = inf
    work_s: float = 0.0
    tokens_before: int = 0
    cost: float = 0.0
    broken_off: Fault | None = None
    affinity: Affinity | None = None
    kv_warmth: bool | None = None


@dataclass(slots=True)
class Task:
    """A task that the scheduler admitted and has not finished. Times are seconds of the caller's monotonic clock.

    `order` grows with admission and is kept for life: a requeued task takes its old place again. `started_at` is when
    the first attempt started. `prompt_tokens` is the estimate, until the end makes it what the engine counted. `due`
    sorts a flow by deadline. `cost` is what waiting for it means in weighted tokens,
    `charged_tokens` and `has_paid_prompt` what its flow was charged for it. `predicted_wait`,
    `on_time_probability` and `position_told` were told at acceptance; `ahead_told` and `starts_told` say what of the
    latter came true.
    """

    spec: TaskSpec
    order: int
    accepted_at: float
    need: Need
    state: TaskState = TaskState.QUEUED
    attempt: Attempt | None = None
    attempts: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    tokens_out: int = 0
    prompt_tokens: int = 0
    counted_prompt: int | None = None
    due: float = 0.0
    cost: float = 0.0
    charged_tokens: int = 0
    has_paid_prompt: bool = False
    position_told: int = 0
    ahead_told: float | None = None
    starts_told: int = 0
    predicted_wait: Estimate | None = None
    on_time_probability: float | None = None
    preemptions: int = 0
    moves: int = 0
    run_s: float = 0.0
    readers: int = 0
    is_late: bool = False
    fault: Fault | None = None
    history: list[TaskState] = field(default_factory=lambda: [TaskState.QUEUED])

    @property
    def key(self) -> TaskKey:
        """(tenant, task_id)."""
        return self.spec.key

    @property
    def priority(self) -> Priority:
        """The level it queues in."""
        return self.spec.priority

    @property
    def kv_tokens(self) -> int:
        """The context that a run of it may fill."""
        return self.prompt_tokens + self.spec.max_tokens

    @property
    def can_move(self) -> bool:
        """Another replica can go on with it: nothing came of it yet, or what came can be replayed or continued."""
        return self.first_token_at is None or self.spec.strict or self.spec.can_continue

    def move(self, state: TaskState) -> None:
        """Take the step to `state`; raises InvalidTransition when the table has no such step."""
        if state not in TRANSITIONS[self.state]:
            story = " → ".join(step.value for step in (*self.history, state))
            raise InvalidTransition(f"task {self.key}: {story}")
        self.state = state
        self.history.append(state)
