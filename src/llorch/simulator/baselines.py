"""Simple queues to compare with: first come first served, strict priority, earliest deadline first, round robin.

They share the replicas, the bounds per priority, the expiry of deadlines and the retries with the scheduler, and none
of its code: a full queue refuses the newcomer, a free slot goes to the head. They know no quota, no weight, no
prediction and no wall timeout.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from llorch.simulator.outcome import Fate, Outcome
from llorch.simulator.replicas import Floor, Run
from llorch.simulator.spec import Spec
from llorch.simulator.workload import LEVELS, Workload

_ATTEMPTS = 3


class Line(Protocol):
    """An order among waiting tasks. It may hold tasks that wait no more; whoever pops them knows."""

    def push(self, index: int) -> None:
        """The task waits."""

    def pop(self) -> int | None:
        """Take out the next; None when there is none."""


class SortedLine:
    """By a key and then by arrival: FCFS, priority and EDF are this with different keys."""

    def __init__(self, key: Callable[[int], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int]] = []

    def push(self, index: int) -> None:
        heapq.heappush(self._heap, (self._key(index), index))

    def pop(self) -> int | None:
        return heapq.heappop(self._heap)[1] if self._heap else None


class RoundRobin:
    """One task of each tenant that has some, in turn; within a tenant by arrival."""

    def __init__(self, workload: Workload, has_left: Callable[[int], bool]) -> None:
        self._tenant = workload.tenant
        self._has_left = has_left
        self._lines: dict[int, list[int]] = {}
        self._turns: deque[int] = deque()

    def push(self, index: int) -> None:
        tenant = self._tenant[index]
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = []
            self._turns.append(tenant)
        heapq.heappush(line, index)

    def pop(self) -> int | None:
        while self._turns:
            tenant = self._turns.popleft()
            line = self._lines[tenant]
            while line and self._has_left(line[0]):
                heapq.heappop(line)
            if not line:
                del self._lines[tenant]
                continue
            self._turns.append(tenant)
            return heapq.heappop(line)
        return None


class QueueDesk:
    """One line before all replicas; the least busy one of them takes the next task."""

    def __init__(self, spec: Spec, workload: Workload, floor: Floor, outcome: Outcome, *, order: str) -> None:
        self.wakeup: float | None = None
        self._workload = workload
        self._floor = floor
        self._outcome = outcome
        is_bounded = order != "fcfs-unbounded"
        bounds = spec.queue.bounds()
        self._room = [bounds[level] if is_bounded else len(workload) for level in LEVELS]
        self._expires = is_bounded
        self._aborts_late = is_bounded and spec.on_deadline == "abort"
        self._line = _line(order, workload, outcome, spec.queue.edf_default_ms / 1000)
        self._due: list[tuple[float, int]] = []
        self._attempt_of: dict[int, int] = {}
        self._attempts: dict[int, int] = {}
        self._last_attempt = 0
        self._busy = [0] * len(floor.engines)
        self._is_down = bytearray(len(floor.engines))
        self._free = [(0.0, replica) for replica in range(len(floor.engines))]

    def arrive(self, index: int, now: float) -> None:
        level = self._workload.level[index]
        if self._room[level] <= 0:
            self._outcome.end(index, Fate.REJECTED, now, "queue full")
            return
        deadline = self._workload.deadline_s[index]
        if self._expires and not math.isnan(deadline):
            heapq.heappush(self._due, (now + deadline, index))
        self._wait(index, now)
        self._serve(now)

    def first_token(self, run: Run, now: float) -> None:
        pass

    def tokens(self, run: Run, count: int, now: float) -> None:
        pass

    def ended(self, run: Run, now: float) -> None:
        index = run.index
        self._busy[run.replica] -= 1
        self._offer(run.replica)
        if self._attempt_of.get(index) == run.attempt:
            del self._attempt_of[index]
            self._settle(run, now)
        self._serve(now)

    def change_replica(self, replica: int, now: float, *, is_ready: bool) -> None:
        self._is_down[replica] = not is_ready
        self._offer(replica)
        self._serve(now)

    def tick(self, now: float) -> None:
        due = self._due
        while due and due[0][0] <= now:
            self._expire(heapq.heappop(due)[1], now)
        self._serve(now)

    def _settle(self, run: Run, now: float) -> None:
        """The run was the task's last one, or it waits again when it had no token yet."""
        index = run.index
        tries = self._attempts.pop(index, 0) + 1
        if not run.is_lost:
            self._outcome.end(index, Fate.FINISHED, now)
        elif run.has_first or tries >= _ATTEMPTS:
            self._outcome.end(index, Fate.FAILED, now, "replica lost")
        elif self._is_late(index, now):
            self._outcome.end(index, Fate.ABORTED, now, "deadline")
        else:
            self._attempts[index] = tries
            self._outcome.retries += 1
            self._wait(index, now)

    def _is_late(self, index: int, now: float) -> bool:
        work = self._workload
        return self._expires and now - work.arrival_s[index] >= work.deadline_s[index]

    def _expire(self, index: int, now: float) -> None:
        if self._outcome.is_waiting(index):
            self._unwait(index)
            self._outcome.unwait(index, now)
            self._outcome.end(index, Fate.EXPIRED, now, "deadline")
        elif self._aborts_late and index in self._attempt_of:
            self._floor.abort(self._attempt_of.pop(index), now)
            self._outcome.end(index, Fate.ABORTED, now, "deadline")

    def _wait(self, index: int, now: float) -> None:
        self._room[self._workload.level[index]] -= 1
        self._outcome.wait(index, now)
        self._line.push(index)

    def _unwait(self, index: int) -> None:
        self._room[self._workload.level[index]] += 1

    def _serve(self, now: float) -> None:
        """Free slots and waiting tasks meet; then the next deadline is the wake-up."""
        outcome = self._outcome
        while outcome.waiting and (replica := self._least_busy()) is not None:
            index = self._line.pop()
            if index is None:
                break
            if outcome.is_waiting(index):
                self._start(index, replica, now)
        due = self._due
        while due and outcome.has_ended(due[0][1]):
            heapq.heappop(due)
        self.wakeup = due[0][0] if due else None

    def _start(self, index: int, replica: int, now: float) -> None:
        work = self._workload
        self._unwait(index)
        self._outcome.start(index, now)
        self._last_attempt += 1
        self._attempt_of[index] = self._last_attempt
        self._busy[replica] += 1
        self._offer(replica)
        self._floor.start(
            index,
            self._last_attempt,
            replica,
            now,
            context=work.prompt_tokens[index],
            goal=work.output_tokens[index],
        )

    def _offer(self, replica: int) -> None:
        """Note how busy the replica is now; older notes become wrong and are dropped when they come up."""
        slots = self._floor.engines[replica].slots
        if self._busy[replica] < slots and not self._is_down[replica]:
            heapq.heappush(self._free, (self._busy[replica] / slots, replica))
            if len(self._free) > 4 * len(self._busy) + 64:
                self._free = [note for note in set(self._free) if self._is_true(*note)]
                heapq.heapify(self._free)

    def _is_true(self, share: float, replica: int) -> bool:
        return share == self._busy[replica] / self._floor.engines[replica].slots and not self._is_down[replica]

    def _least_busy(self) -> int | None:
        free = self._free
        while free:
            if self._is_true(*free[0]):
                return free[0][1]
            heapq.heappop(free)
        return None


def _line(order: str, workload: Workload, outcome: Outcome, edf_default_s: float) -> Line:
    match order:
        case "fcfs" | "fcfs-unbounded":
            return SortedLine(lambda _index: 0.0)
        case "priority":
            return SortedLine(lambda index: workload.level[index])
        case "edf":
            return SortedLine(lambda index: _due(workload, index, edf_default_s))
        case "rr":
            return RoundRobin(workload, lambda index: not outcome.is_waiting(index))
        case _:
            raise ValueError(order)


def _due(workload: Workload, index: int, edf_default_s: float) -> float:
    deadline = workload.deadline_s[index]
    return workload.arrival_s[index] + (edf_default_s if math.isnan(deadline) else deadline)
