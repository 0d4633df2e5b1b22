"""Which running task makes room for a more urgent one, and how often that may happen (ORCH-3085 to 3087).

Decides and remembers; breaking the attempt off is the scheduler's.
"""

from collections import deque
from collections.abc import Iterable
from itertools import islice

from llorch.domain.faults import PREEMPTED
from llorch.domain.policy import PreemptionPolicy
from llorch.domain.pool import Fleet, ReplicaState
from llorch.domain.task import Attempt, Priority, Task

MINUTE_S = 60.0

LOOKS = 16
"""Candidates that are looked at, newest first: those that started earlier have more to lose."""

URGENCY = {priority: place for place, priority in enumerate(Priority)}


class Preemption:
    """The running attempts that may have to make room, and the allowance of the last minute."""

    __slots__ = ("_candidates", "_policy", "_times", "pending")

    def __init__(self, policy: PreemptionPolicy) -> None:
        self._policy = policy
        self._candidates: dict[int, tuple[Task, Attempt]] = {}
        self._times: deque[float] = deque()
        self.pending = 0
        """Attempts that were told to make room and have not ended."""

    def note_start(self, task: Task, attempt: Attempt) -> None:
        """The attempt may be asked to make room, if its task is of that kind."""
        policy = self._policy
        if not policy.hard or task.priority in policy.protected or task.preemptions >= policy.per_task:
            return
        if task.spec.strict or task.spec.can_continue:
            self._candidates[attempt.attempt_id] = task, attempt

    def note_end(self, attempt: Attempt) -> None:
        """The attempt is over."""
        self._candidates.pop(attempt.attempt_id, None)
        if attempt.broken_off is PREEMPTED:
            self.pending -= 1

    def withdraw(self, attempt: Attempt) -> None:
        """The attempt is told to stop, for whatever reason: it can make no room any more. Idempotent."""
        self._candidates.pop(attempt.attempt_id, None)

    def reconfigure(self, policy: PreemptionPolicy, runs: Iterable[tuple[Task, Attempt]]) -> None:
        """Other rules hold from now on, also for these attempts, which run, oldest first. What made room counts on."""
        self._policy = policy
        self._candidates.clear()
        for task, attempt in runs:
            self.note_start(task, attempt)

    def is_allowed(self, now: float) -> bool:
        """The minute up to now has room for one more."""
        while self._times and self._times[0] + MINUTE_S <= now:  # rounded as next_allowed_at() tells it
            self._times.popleft()
        return len(self._times) < self._policy.per_minute

    def next_allowed_at(self) -> float | None:
        """When a spent allowance has room again; None when it has."""
        return self._times[0] + MINUTE_S if len(self._times) >= self._policy.per_minute > 0 else None

    def choose(self, task: Task, fleet: Fleet) -> Attempt | None:
        """The attempt that has least to lose and whose slot the task could use; None when there is none.

        None is chosen past half of what its task expects, nor of a priority that is as urgent as the task's.
        """
        for other, attempt in islice(reversed(self._candidates.values()), LOOKS):
            if other.attempt is not attempt or URGENCY[other.priority] <= URGENCY[task.priority]:
                continue
            replica = fleet.get(attempt.replica_id)
            if replica is None or replica.state is not ReplicaState.READY or not replica.meets(task.need):
                continue  # the slot would be of no use
            if not replica.can_interrupt:
                continue
            if 2 * other.tokens_out <= other.spec.expected_tokens:
                return attempt
        return None

    def note_preempted(self, now: float) -> None:
        """An attempt is told to make room: that counts against the allowance, and it is awaited."""
        self._times.append(now)
        self.pending += 1
