"""The waiting tasks of one route: bounded per priority, first in first out, the urgent level first.

Within a priority tasks stand in lanes by what they need of a replica, so that one that waits for a special replica
keeps its place without blocking those behind it from slots that it could not use anyway.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping

from llorch.domain.task import Need, Priority, Task


class Lane:
    """The tasks with one need, by their order: a sorted list, as nearly all come at its end and leave at its head.

    A task through an empty lane costs 1 us, where a tree-like container takes 7; taking the head of 10,000 moves 80 kB.
    """

    __slots__ = ("_orders", "_tasks")

    def __init__(self) -> None:
        self._orders: list[int] = []
        self._tasks: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def push(self, task: Task) -> None:
        """Let the task wait here."""
        insort(self._orders, task.order)
        self._tasks[task.order] = task

    def remove(self, task: Task) -> None:
        """The task waits no more; raises KeyError when it did not."""
        del self._tasks[task.order]
        del self._orders[bisect_left(self._orders, task.order)]

    def ahead_of(self, order: int) -> int:
        """How many were admitted earlier."""
        return bisect_left(self._orders, order)

    def head(self) -> Task:
        """The one admitted first; the lane is not empty."""
        return self._tasks[self._orders[0]]


class TaskQueue:
    """Admitted tasks that wait for a slot. Operations cost O(log n) comparisons in the number that waits."""

    def __init__(self, capacity: Mapping[Priority, int]) -> None:
        self.capacity = dict(capacity)
        self._lanes: dict[Priority, dict[Need, Lane]] = {priority: {} for priority in Priority}
        self._depth = dict.fromkeys(Priority, 0)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        """Tasks in the order in which they would start on replicas that suit all."""
        for lanes in self._lanes.values():
            yield from sorted((task for lane in lanes.values() for task in lane), key=lambda t: t.order)

    def depth(self, priority: Priority) -> int:
        """How many wait in this priority."""
        return self._depth[priority]

    def is_full(self, priority: Priority) -> bool:
        """No further task is admitted to this priority."""
        return self.depth(priority) >= self.capacity[priority]

    def push(self, task: Task) -> None:
        """Let the task wait at the place that its order gives it. Requeued tasks may exceed the capacity."""
        lanes = self._lanes[task.priority]
        lane = lanes.get(task.need)
        if lane is None:
            lane = lanes[task.need] = Lane()
        lane.push(task)
        self._depth[task.priority] += 1
        self._length += 1

    def remove(self, task: Task) -> None:
        """The task waits no more; raises KeyError when it did not."""
        lanes = self._lanes[task.priority]
        lane = lanes[task.need]
        lane.remove(task)
        self._depth[task.priority] -= 1
        self._length -= 1
        if task.need.cohort is not None and not lane:
            del lanes[task.need]

    def position(self, task: Task) -> int:
        """How many tasks are ahead: those of more urgent levels, and the earlier ones of its own."""
        ahead = 0
        for priority in Priority:
            if priority is task.priority:
                break
            ahead += self.depth(priority)
        return ahead + sum([lane.ahead_of(task.order) for lane in self._lanes[task.priority].values()])

    def head(self, can_start: Callable[[Need], bool]) -> Task | None:
        """The task whose turn it is among those for which there is a slot that they may use."""
        for lanes in self._lanes.values():
            heads = [lane.head() for need, lane in lanes.items() if lane and can_start(need)]
            if heads:
                return heads[0] if len(heads) == 1 else min(heads, key=lambda task: task.order)
        return None
