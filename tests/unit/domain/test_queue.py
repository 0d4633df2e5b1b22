"""The waiting tasks by themselves."""

import pytest

from llorch.domain.queue import TaskQueue
from llorch.domain.task import ANYWHERE, EXACT, Cohort, Need, Priority, Task
from tests.unit.domain.desk import BATCH, INTERACTIVE, spec

PINNED = Need(exact=True, cohort=Cohort("v1", None, exact=True))


def queued(order: int, priority: Priority = INTERACTIVE, need: Need = ANYWHERE) -> Task:
    return Task(spec(f"t{order}", priority), order, accepted_at=0.0, need=need)


def queue_of(*tasks: Task, capacity: int = 10) -> TaskQueue:
    queue = TaskQueue(dict.fromkeys(Priority, capacity))
    for task in tasks:
        queue.push(task)
    return queue


def test_tasks_stand_by_priority_then_order_whatever_they_need() -> None:
    tasks = [queued(4), queued(2, BATCH), queued(3, need=EXACT), queued(1, BATCH, EXACT), queued(5, need=PINNED)]
    queue = queue_of(*tasks)
    assert [task.order for task in queue] == [3, 4, 5, 1, 2]
    assert [queue.position(task) for task in queue] == [0, 1, 2, 3, 4]
    assert len(queue) == 5


def test_depth_and_bound_are_per_priority() -> None:
    queue = queue_of(queued(1), queued(2, need=EXACT), queued(3, BATCH), capacity=2)
    assert (queue.depth(INTERACTIVE), queue.depth(BATCH)) == (2, 1)
    assert (queue.is_full(INTERACTIVE), queue.is_full(BATCH)) == (True, False)


def test_head_is_the_earliest_of_the_lanes_that_can_start() -> None:
    strict, loose, batch = queued(1, need=EXACT), queued(2), queued(3, BATCH)
    queue = queue_of(strict, loose, batch)
    assert queue.head(lambda _: True) is strict
    assert queue.head(lambda need: need == ANYWHERE) is loose
    queue.remove(loose)
    assert queue.head(lambda need: need == ANYWHERE) is batch
    assert queue.head(lambda _: False) is None


def test_removed_task_is_gone_and_cannot_be_removed_again() -> None:
    task = queued(1)
    queue = queue_of(task)
    queue.remove(task)
    assert list(queue) == []
    with pytest.raises(KeyError):
        queue.remove(task)


def test_peer_bug_15_lanes_that_are_empty_leave_nothing_behind() -> None:
    queue = queue_of()
    for number in range(100):
        task = queued(number, need=Need(exact=True, cohort=Cohort(f"v{number}", None, exact=True)))
        queue.push(task)
        queue.remove(task)
    seen: list[Need] = []

    def watch(need: Need) -> bool:
        seen.append(need)
        return False

    assert queue.head(watch) is None
    assert seen == []


def test_requeued_task_stands_at_its_old_place() -> None:
    first, second = queued(1), queued(2)
    queue = queue_of(first, second)
    queue.remove(first)
    queue.push(queued(3))
    queue.push(first)
    assert [task.order for task in queue] == [1, 2, 3]
