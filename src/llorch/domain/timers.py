"""What must happen at a certain time, at most one entry per kind and task."""

from enum import IntEnum

from sortedcontainers import SortedSet

from llorch.domain.task import TaskKey


class Timer(IntEnum):
    """Why a task wants to be woken."""

    DEADLINE = 1
    WALL = 2
    UNREAD = 3
    SHUTDOWN = 4


class Timers:
    """A timetable in O(log n). Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._at: dict[tuple[TaskKey, Timer], float] = {}
        self._table: SortedSet[tuple[float, Timer, TaskKey]] = SortedSet()

    def __len__(self) -> int:
        return len(self._at)

    def set(self, task: TaskKey, timer: Timer, at: float) -> None:
        """Wake for this at `at`, instead of any time set before."""
        self.clear(task, timer)
        self._at[task, timer] = at
        self._table.add((at, timer, task))

    def clear(self, task: TaskKey, timer: Timer) -> None:
        """Do not wake for this. Idempotent."""
        at = self._at.pop((task, timer), None)
        if at is not None:
            self._table.remove((at, timer, task))

    def clear_all(self, task: TaskKey) -> None:
        """Forget everything set for the task."""
        for timer in Timer:
            self.clear(task, timer)

    def pop_due(self, now: float) -> list[tuple[TaskKey, Timer]]:
        """Take out what is due, earliest first."""
        due: list[tuple[TaskKey, Timer]] = []
        while self._table and self._table[0][0] <= now:
            _, timer, task = self._table.pop(0)
            del self._at[task, timer]
            due.append((task, timer))
        return due

    def next_at(self) -> float | None:
        """When the next entry is due."""
        return self._table[0][0] if self._table else None
