"""What became of every task in one run of a simulation, as columns; and who was served how much while all waited.

It is told facts and keeps count. What the numbers mean is for `results`.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from llorch.simulator.workload import Workload


class Fate(IntEnum):
    """How a task ended. LEFT: it did not, as nothing would ever happen any more."""

    LEFT = 0
    FINISHED = 1
    REJECTED = 2
    EXPIRED = 3
    DROPPED = 4
    ABORTED = 5
    FAILED = 6


FATES: dict[Fate, str] = {
    Fate.LEFT: "left waiting",
    Fate.FINISHED: "finished",
    Fate.REJECTED: "refused at admission",
    Fate.EXPIRED: "deadline passed in the queue",
    Fate.DROPPED: "put out of the full queue",
    Fate.ABORTED: "aborted at the deadline",
    Fate.FAILED: "failed",
}


def _nans(count: int) -> "array[float]":
    return array("d", [math.nan]) * count


@dataclass(slots=True)
class Told:
    """What a task was told at its acceptance; NaN, and -1 tasks ahead, for what it was not told."""

    ahead: "array[int]"
    wait_s: "array[float]"
    on_time: "array[float]"


class Outcome:
    """The facts of one run, by index of the task. Times in seconds of virtual time.

    `cost` sums weighted tokens by tenant (prompt at the first token, output as it is reported), `contended` the same
    while every tenant of the workload had a task waiting, which was `contended_s` long. `tokens_in_span` and
    `output_in_span` count what was served until the last arrival, with and without prompts.
    """

    def __init__(self, workload: Workload, *, prompt_cost: float, output_cost: float) -> None:
        count, tenants = len(workload), len(workload.tenants)
        self.workload = workload
        self.fate = bytearray(count)
        self.started_at = _nans(count)
        self.ended_at = _nans(count)
        self.tokens = array("i", [0]) * count
        self.told = Told(array("i", [-1]) * count, _nans(count), _nans(count))
        self.reasons: Counter[str] = Counter()
        self.preemptions = 0
        self.retries = 0
        self.open = count
        self.busy_s = 0.0
        self.end_s = 0.0
        self.cost = [0.0] * tenants
        self.contended = [0.0] * tenants
        self.contended_s = 0.0
        self.tokens_in_span = 0
        self.output_in_span = 0
        self.waiting = 0
        self._span = workload.arrival_s[-1] if count else 0.0
        self._prompt_cost = prompt_cost
        self._output_cost = output_cost
        self._waits_of = [0] * tenants
        self._is_waiting = bytearray(count)
        self._idle_tenants = len(set(workload.tenant))
        self._contended_since = 0.0

    def wait(self, index: int, now: float) -> None:
        """The task waits from now on."""
        self._is_waiting[index] = True
        tenant = self.workload.tenant[index]
        self.waiting += 1
        self._waits_of[tenant] += 1
        if self._waits_of[tenant] == 1:
            self._idle_tenants -= 1
            if not self._idle_tenants:
                self._contended_since = now

    def unwait(self, index: int, now: float) -> None:
        """The task waits no more."""
        self._is_waiting[index] = False
        tenant = self.workload.tenant[index]
        self.waiting -= 1
        self._waits_of[tenant] -= 1
        if not self._waits_of[tenant]:
            if not self._idle_tenants:
                self.contended_s += now - self._contended_since
            self._idle_tenants += 1

    def is_waiting(self, index: int) -> bool:
        """It is in the queue."""
        return bool(self._is_waiting[index])

    def has_ended(self, index: int) -> bool:
        """Its fate is known."""
        return self.fate[index] != Fate.LEFT

    def start(self, index: int, now: float) -> None:
        """A run of the task, which waited, begins."""
        self.unwait(index, now)
        if math.isnan(self.started_at[index]):
            self.started_at[index] = now

    def first_token(self, index: int, context_tokens: int, now: float) -> None:
        """A run is through with its prompt."""
        self._charge(index, self._prompt_cost * context_tokens)
        if now <= self._span:
            self.tokens_in_span += context_tokens

    def produce(self, index: int, count: int, now: float) -> None:
        """The task has `count` more tokens."""
        self.tokens[index] += count
        self._charge(index, self._output_cost * count)
        if now <= self._span:
            self.tokens_in_span += count
            self.output_in_span += count

    def _charge(self, index: int, cost: float) -> None:
        tenant = self.workload.tenant[index]
        self.cost[tenant] += cost
        if not self._idle_tenants:
            self.contended[tenant] += cost

    def end(self, index: int, fate: Fate, now: float, reason: str = "") -> None:
        """The task, which neither waits nor is heard of any more, has ended. `reason` is counted."""
        self.fate[index] = fate
        self.ended_at[index] = now
        self.open -= 1
        self.end_s = now
        if reason:
            self.reasons[reason] += 1

    def is_in_time(self, index: int) -> bool:
        """It finished, before its deadline if it had one."""
        if self.fate[index] != Fate.FINISHED:
            return False
        deadline = self.workload.deadline_s[index]
        return not self.ended_at[index] - self.workload.arrival_s[index] > deadline
