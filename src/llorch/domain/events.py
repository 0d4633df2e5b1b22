"""The vocabulary of the scheduler: events are past facts that go in, commands are orders that come out.

All are plain values; a test compares them. An event about a task or an attempt that is no longer there is stale and
changes nothing.
"""

from dataclasses import dataclass

from llorch.domain.policy import RoutePolicy
from llorch.domain.replica import Replica
from llorch.domain.task import Attempt, Fault, SessionKey, Task, TaskKey, TaskSpec


@dataclass(frozen=True, slots=True)
class TaskSubmitted:
    """Somebody wants this done. Identity, form and context size are already checked."""

    spec: TaskSpec


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The owner wants the task to stop."""

    task: TaskKey


@dataclass(frozen=True, slots=True)
class FollowerJoined:
    """A reader opened the task's stream."""

    task: TaskKey


@dataclass(frozen=True, slots=True)
class FollowerLeft:
    """A reader of the task's stream is gone."""

    task: TaskKey


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The attempt produced its first token."""

    task: TaskKey
    attempt_id: int


@dataclass(frozen=True, slots=True)
class TokensProduced:
    """The attempt produced `count` more tokens since the last such event."""

    task: TaskKey
    attempt_id: int
    count: int


@dataclass(frozen=True, slots=True)
class AttemptStalled:
    """The engine fell silent and was told to stop; AttemptEnded follows when it has let go of the slot."""

    task: TaskKey
    attempt_id: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The attempt is over and the engine has let go of its slot. Without a fault it ran to its end.

    `prompt_tokens` as the engine counted them; None when it did not tell.
    """

    task: TaskKey
    attempt_id: int
    fault: Fault | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ReplicaChanged:
    """A replica is now as told here."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class ReplicaVacated:
    """Whatever still runs on the replica must leave it now: it goes on elsewhere, or ends."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class ReplicaRemoved:
    """The replica belongs to the route no more."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """The route is governed by this policy from now on."""

    policy: RoutePolicy


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine itself says that `foreign_slots` of its slots work for somebody else than this service."""

    replica_id: str
    foreign_slots: int


@dataclass(frozen=True, slots=True)
class LimitLifted:
    """Another route settled what kept the tenant's tasks from starting."""

    tenant: str


@dataclass(frozen=True, slots=True)
class SessionDeleted:
    """The owner has no more use for the session."""

    session: SessionKey


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    """The service is going away; what runs may go on for `grace_s` more seconds."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; posted when `next_wakeup()` is due."""


Deciding = (
    TaskSubmitted
    | CancelRequested
    | AttemptStalled
    | AttemptEnded
    | ReplicaChanged
    | ReplicaVacated
    | ReplicaRemoved
    | ConfigChanged
    | EngineLoad
    | LimitLifted
    | SessionDeleted
    | ShutdownRequested
    | Tick
)
"""Facts that orders may follow from."""

QUIET = (FollowerJoined, FirstToken, TokensProduced)
"""Facts that no order follows from and no time is set by: two thirds of what a task posts."""

Event = Deciding | FollowerJoined | FollowerLeft | FirstToken | TokensProduced


@dataclass(frozen=True, slots=True)
class Admit:
    """The task is in; `queue_position` tasks are ahead of it.

    `backoff_s`: seconds after which the flow's next submission is no burden to others; None while unknown.
    """

    task: Task
    queue_position: int
    backoff_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """The task stays out, and nothing has changed."""

    task: TaskKey
    fault: Fault


@dataclass(frozen=True, slots=True)
class Start:
    """Run this attempt now; the lease of its slot is held."""

    task: Task
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Abort:
    """Make the engine stop this attempt at once; AttemptEnded follows when it let go."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Requeue:
    """The attempt failed before its first token, or was broken off; the task waits at its old place again."""

    task: Task
    fault: Fault


@dataclass(frozen=True, slots=True)
class Evict:
    """Make the engine forget the KV cache in an idle slot, where it can."""

    replica_id: str
    slot: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The task has ended; its state and fault say how. Nothing but the terminal frame may follow."""

    task: Task


Command = Admit | Reject | Start | Abort | Requeue | Evict | Finish
