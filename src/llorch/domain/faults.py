"""The reasons for which the scheduler refuses, retries and ends tasks, as far as they are always the same."""

from llorch.domain.task import Fault
from llorch.errors import (
    BudgetExhausted,
    Canceled,
    DeadlineUnmet,
    DecodeTimeout,
    PoolUnavailable,
    PoolUnready,
    WorkerReset,
)

REPLICA_FAULTS = (WorkerReset, PoolUnready, DecodeTimeout)
"""Ends of an attempt that speak against the replica: it gets no more tasks until a probe found it Ready."""

RETRIED_FAULTS = (WorkerReset, PoolUnready)
"""Of these, the ones after which the task is tried elsewhere, as long as no token was seen."""

CANCELED = Fault(Canceled, "canceled by its owner")
SESSION_DELETED = Fault(Canceled, "its session was deleted", policy_label="session")
UNREAD = Fault(Canceled, "its last reader left and did not come back", policy_label="reader-gone")
STRANDED = Fault(PoolUnready, "no replica of the route can take it, and none is coming up")
LATE = Fault(DeadlineUnmet, "the deadline passed before the task could end")
HOPELESS = Fault(
    DeadlineUnmet, "its turn came when it could not have ended before its deadline any more", policy_label="deadline"
)
TIME_SPENT = Fault(BudgetExhausted, "the running time of its session is used up", policy_label="session-time")
PREEMPTED = Fault(Canceled, "made room for more urgent work; it goes on later", policy_label="preempted")
MOVED = Fault(Canceled, "its replica must be empty; it goes on elsewhere", policy_label="moved")
DRAINED = Fault(
    PoolUnavailable, "its replica is drained, and no other one can go on with it; try again", policy_label="drain"
)
SHUTDOWN = Fault(
    PoolUnavailable, "the service is shutting down; try another or try again later", policy_label="shutdown"
)
