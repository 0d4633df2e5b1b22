"""The waiting tasks of one route: bounded per priority, first in first out, the urgent level first.

Within a priority tasks stand in lanes by what they need of a replica, so that one that waits for a special replica
keeps its place without blocking those behind it from slots that it could not use anyway.
"""

from collections.abc import Callable, Iterator, Mapping

from sortedcontainers import SortedDict

from llorch.domain.task import Need, Priority, Task

Lane = SortedDict[int, Task]
"""The tasks with one need, by their order."""


class TaskQueue:
    """Admitted tasks that wait for a slot. Operations cost O(log n) in the number that waits."""

    def __init__(self, capacity: Mapping[Priority, int]) -> None:
        self.capacity = dict(capacity)
        self._lanes: dict[Priority, dict[Need, Lane]] = {priority: {} for priority in Priority}
        self._depth = dict.fromkeys(Priority, 0)

    def __len__(self) -> int:
        return sum(self._depth.values())

    def __iter__(self) -> Iterator[Task]:
        """Tasks in the order in which they would start on replicas that suit all."""
        for lanes in self._lanes.values():
            yield from sorted((task for lane in lanes.values() for task in lane.values()), key=lambda t: t.order)

    def depth(self, priority: Priority) -> int:
        """How many wait in this priority."""
        return self._depth[priority]

    def is_full(self, priority: Priority) -> bool:
        """No further task is admitted to this priority."""
        return self.depth(priority) >= self.capacity[priority]

    def push(self, task: Task) -> None:
        """Let the task wait at the place that its order gives it. Requeued tasks may exceed the capacity."""
        lanes = self._lanes[task.priority]
        if task.need not in lanes:
            lanes[task.need] = SortedDict()
        lanes[task.need][task.order] = task
        self._depth[task.priority] += 1

    def remove(self, task: Task) -> None:
        """The task waits no more; raises KeyError when it did not."""
        lanes = self._lanes[task.priority]
        del lanes[task.need][task.order]
        self._depth[task.priority] -= 1
        if task.need.cohort is not None and not lanes[task.need]:
            del lanes[task.need]

    def position(self, task: Task) -> int:
        """How many tasks are ahead: those of more urgent levels, and the earlier ones of its own."""
        ahead = 0
        for priority in Priority:
            if priority is task.priority:
                break
            ahead += self.depth(priority)
        return ahead + sum(lane.bisect_left(task.order) for lane in self._lanes[task.priority].values())

    def head(self, can_start: Callable[[Need], bool]) -> Task | None:
        """The task whose turn it is among those for which there is a slot that they may use."""
        for lanes in self._lanes.values():
            heads = [lane.peekitem(0)[1] for need, lane in lanes.items() if lane and can_start(need)]
            if heads:
                return min(heads, key=lambda task: task.order)
        return None
