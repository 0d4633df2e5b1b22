"""What must happen at a certain time, at most one entry per kind and task."""

import heapq
from enum import IntEnum

from llorch.domain.task import TaskKey

_SLACK = 64


class Timer(IntEnum):
    """Why a task wants to be woken."""

    DEADLINE = 1
    WALL = 2
    UNREAD = 3
    SHUTDOWN = 4


_Entry = tuple[float, int, TaskKey]


class Timers:
    """A timetable: setting and clearing cost O(log n). Times are seconds of the caller's clock.

    Cleared entries stay in the heap until they come up, or until they outnumber by far what tasks can have set.
    """

    def __init__(self) -> None:
        self._at: dict[TaskKey, dict[int, float]] = {}
        self._heap: list[_Entry] = []

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def set(self, task: TaskKey, timer: Timer, at: float) -> None:
        """Wake for this at `at`, instead of any time set before."""
        times = self._at.get(task)
        if times is None:
            times = self._at[task] = {}
        times[timer] = at
        heapq.heappush(self._heap, (at, timer, task))

    def clear(self, task: TaskKey, timer: Timer) -> None:
        """Do not wake for this. Idempotent."""
        if self._is_set(task, timer):
            self._drop(task, timer)
            self._tidy()

    def clear_all(self, task: TaskKey) -> None:
        """Forget everything set for the task."""
        if self._at.pop(task, None) is not None:
            self._tidy()

    def pop_due(self, now: float) -> list[tuple[TaskKey, Timer]]:
        """Take out what is due, earliest first."""
        due: list[tuple[TaskKey, Timer]] = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                _, timer, task = entry
                self._drop(task, timer)
                due.append((task, Timer(timer)))
        return due

    def next_at(self) -> float | None:
        """When the next entry is due."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _is_live(self, entry: _Entry) -> bool:
        at, timer, task = entry
        times = self._at.get(task)
        return times is not None and times.get(timer) == at

    def _is_set(self, task: TaskKey, timer: int) -> bool:
        times = self._at.get(task)
        return times is not None and timer in times

    def _drop(self, task: TaskKey, timer: int) -> None:
        times = self._at[task]
        del times[timer]
        if not times:
            del self._at[task]

    def _tidy(self) -> None:
        most = len(Timer) * len(self._at)  # entries that can be live; to count them would take a walk
        if len(self._heap) > 2 * most + _SLACK:
            self._heap = [(at, timer, task) for task, times in self._at.items() for timer, at in times.items()]
            heapq.heapify(self._heap)
