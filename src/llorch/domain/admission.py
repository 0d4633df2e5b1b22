"""Whether a submission is let in: the checks in their order, and what a refusal tells of when to come back.

A refused submission changes nothing and evicts nobody (ORCH-3112).
"""

from dataclasses import dataclass, replace

from llorch.domain.fair_queue import FairQueue
from llorch.domain.faults import STRANDED
from llorch.domain.forecast import Forecast
from llorch.domain.ledger import Claim, Ledger
from llorch.domain.policy import RoutePolicy
from llorch.domain.pool import Fleet
from llorch.domain.prediction import NO_TIME
from llorch.domain.task import ANYWHERE, EXACT, Fault, Task, TaskSpec
from llorch.errors import DeadlineUnmet

HOPELESS_CHANCE = 0.05
"""A smaller chance than this to meet a deadline is none."""


@dataclass(slots=True)
class Victim:
    """A waiting task that loses its place to a newer one, and what it ends with."""

    task: Task
    fault: Fault


class Admission:
    """Decides on the submissions to one route."""

    __slots__ = ("_fleet", "_forecast", "_ledger", "_policy", "_queue")

    def __init__(self, policy: RoutePolicy, queue: FairQueue, fleet: Fleet, ledger: Ledger, forecast: Forecast) -> None:
        self._policy = policy
        self._queue = queue
        self._fleet = fleet
        self._ledger = ledger
        self._forecast = forecast

    def reconfigure(self, policy: RoutePolicy) -> None:
        """Another policy holds for what is submitted from now on."""
        self._policy = policy

    def admit(self, spec: TaskSpec, order: int, now: float) -> Fault | tuple[Task, Victim | None]:
        """Let the task wait and take its reservations, or say why not.

        1. Nowhere to run. 2. Quotas and budgets. 3. No place. 4. No chance to end in time.
        """
        need = EXACT if spec.strict else ANYWHERE
        if not self._fleet.can_serve(need):
            return STRANDED
        claim = self._claim(spec)
        if (fault := self._ledger.refusal(spec, claim, now)) is not None:
            return fault
        task = Task(spec, order, accepted_at=now, need=need)
        task.prompt_tokens = spec.prompt_tokens
        room = self._queue.room_for(spec)
        if room.refusal is not None:
            return self._until_place(room.refusal, task)
        self._queue.push(task)
        self._forecast.tell(task, now)
        if self._is_infeasible(task.on_time_probability):
            self._queue.remove(task)
            return self._infeasible(task)
        self._ledger.reserve(spec, claim, now)
        if room.victim is None or room.fault is None:
            return task, None
        return task, Victim(room.victim, self._until_place(room.fault, room.victim))

    def backoff_s(self, task: Task) -> float | None:
        """After how many seconds the flow's next submission takes no more than its fair share of places."""
        priority, tenant = task.spec.priority, task.spec.key[0]
        excess = self._queue.waiting(priority, tenant) + 1 - self._queue.share_of(priority, tenant)
        if excess <= 0.0:
            return 0.0 if self._forecast.is_known else None
        place_s = self._forecast.place_s(task)
        return None if place_s is None else excess * place_s

    def is_hopeless(self, task: Task, now: float) -> bool:
        """Started now, the task would not end before its deadline, as far as can be told."""
        if task.spec.deadline_s is None or task.attempts:
            return False
        return self._is_infeasible(self._forecast.on_time(task, NO_TIME, now))

    def _is_infeasible(self, chance: float | None) -> bool:
        """To run in vain harms others that wait; where nobody else does, only what is all but impossible is refused.

        The task itself waits, too, when this is asked.
        """
        if chance is None:
            return False
        least = self._policy.feasible_probability
        return chance < (least if len(self._queue) > 1 else min(least, HOPELESS_CHANCE))

    def _claim(self, spec: TaskSpec) -> Claim:
        prices = self._policy.prices
        cost = prices.prompt * spec.prompt_tokens + prices.output * spec.max_tokens
        return Claim(spec.prompt_tokens, spec.expected_tokens, spec.max_tokens, self._policy.wall_s, cost)

    def _until_place(self, fault: Fault, task: Task) -> Fault:
        place_s = self._forecast.place_s(task)
        return fault if place_s is None else replace(fault, retry_after_ms=max(1, round(place_s * 1000)))

    def _infeasible(self, task: Task) -> Fault:
        """The time to come back is when what is ahead has shrunk so far that the deadline could be met."""
        wait, run, deadline_s = task.predicted_wait, self._forecast.run(task), task.spec.deadline_s
        assert wait is not None
        assert run is not None
        assert deadline_s is not None
        wait_ms, run_ms = round(wait.mean_s * 1000), round(run.mean_s * 1000)
        late_ms = wait_ms + run_ms - round(deadline_s * 1000)
        return Fault(
            DeadlineUnmet,
            f"it would start in {wait_ms} ms and run for {run_ms} ms, as far as can be told: too late for its deadline",
            policy_label="deadline",
            retry_after_ms=min(wait_ms, late_ms) if late_ms > 0 < wait_ms else None,
            details={"predicted_start_ms": wait_ms, "predicted_run_ms": run_ms},
        )
