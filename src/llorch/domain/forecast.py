"""What a route tells of the time to come: when a task starts, whether it ends in time, when room is free again.

Brings together the queue (what is ahead), the fleet (how many slots work), the measured rates, and what runs. Has no
clock; a time that cannot be known yet is None.
"""

from llorch.domain.events import AttemptEnded
from llorch.domain.fair_queue import FairQueue
from llorch.domain.pool import Fleet
from llorch.domain.prediction import NO_TIME, Service, probability_within
from llorch.domain.task import Attempt, Estimate, Task


class Forecast:
    """Estimates for the tasks of one route, each in O(log n)."""

    __slots__ = ("_cost", "_fleet", "_queue", "_run", "_running", "_service", "_started_at", "_starts")

    def __init__(self, queue: FairQueue, fleet: Fleet) -> None:
        self._queue = queue
        self._fleet = fleet
        self._service = Service()
        self._starts = 0
        self._running = 0
        self._cost = 0.0
        self._started_at = 0.0
        self._run: tuple[Task, int, Estimate | None] | None = None

    # What runs report

    def note_start(self, task: Task, attempt: Attempt) -> None:
        """The attempt begins; the task has not been taken out of the queue yet."""
        if task.ahead_told is not None and not task.attempts:
            self._service.note_start(task.priority, task.ahead_told, self._starts - task.starts_told)
        self._starts += 1
        attempt.cost = task.cost
        self._running += 1
        self._cost += task.cost
        self._started_at += attempt.started_at

    def note_first_token(self, task: Task, attempt: Attempt, now: float) -> None:
        """Its prompt is done."""
        if not attempt.tokens_before:
            self._service.note_first_token(task.spec.prompt_tokens, now - attempt.started_at)

    def note_end(self, task: Task, attempt: Attempt, event: AttemptEnded, now: float) -> None:
        """It is over; one that ran from a task's first token to its last is measured."""
        self._running -= 1
        self._cost -= attempt.cost
        self._started_at -= attempt.started_at
        if not self._running:
            self._cost = self._started_at = 0.0  # sums of floats drift
        if event.fault is not None or attempt.tokens_before or attempt.first_token_at is None:
            return
        self._service.note_end(
            expected_tokens=task.spec.expected_tokens,
            tokens_out=task.tokens_out,
            decode_s=now - attempt.first_token_at,
            run_s=now - attempt.started_at,
            cost=attempt.cost,
        )

    # What is to come

    def tell(self, task: Task, now: float) -> None:
        """Note on a task that just began to wait what it is told at its acceptance."""
        ahead = self._queue.ahead(task)
        task.position_told = round(ahead.tasks)
        if not self._fleet.can_start(task.need):
            task.ahead_told = ahead.tasks
            task.starts_told = self._starts
        task.predicted_wait = self._wait(task, ahead.tasks, ahead.cost, now)
        task.on_time_probability = self.on_time(task, task.predicted_wait, now)

    def wait(self, task: Task, now: float) -> Estimate | None:
        """Until the waiting task starts; None while rates are unknown or no replica is Ready."""
        ahead = self._queue.ahead(task)
        return self._wait(task, ahead.tasks, ahead.cost, now)

    def _wait(self, task: Task, tasks: float, cost: float, now: float) -> Estimate | None:
        if self._fleet.can_start(task.need):
            return NO_TIME
        running = self._running
        return self._service.wait(
            task.priority,
            ahead_tasks=tasks,
            ahead_cost=cost,
            running=running,
            busy_cost=self._cost,
            busy_elapsed_s=running * now - self._started_at,
            slots=self._fleet.ready_slots,
        )

    def run(self, task: Task) -> Estimate | None:
        """From start to end of the task's next attempt; None while rates are unknown."""
        known = self._run
        if known is not None and known[0] is task and known[1] == self._starts:
            return known[2]  # a task that starts is asked for it twice in the same turn
        spec = task.spec
        run = self._service.service(spec.prompt_tokens, max(1, spec.expected_tokens - task.tokens_out))
        self._run = task, self._starts, run
        return run

    def on_time(self, task: Task, wait: Estimate | None, now: float) -> float | None:
        """The chance that the task ends before its deadline; None without one or while rates are unknown."""
        deadline_s = task.spec.deadline_s
        if deadline_s is None or wait is None or (run := self.run(task)) is None:
            return None
        return probability_within(wait, task.accepted_at + deadline_s - now, run)

    @property
    def is_known(self) -> bool:
        """Rates have been measured, and somebody is there to keep them."""
        return self._service.drain_s(self._fleet.ready_slots) is not None

    def place_s(self, task: Task) -> float | None:
        """Seconds until one place of the task's flow in the queue is free again; None while rates are unknown."""
        drain_s = self._service.drain_s(self._fleet.ready_slots)
        return None if drain_s is None else drain_s / self._queue.share_of_service(task)
