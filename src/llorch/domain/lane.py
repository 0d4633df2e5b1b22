"""The waiting tasks of one flow that need the same of a replica, in the order in which they are to start.

Knows order and cost of its tasks, nothing of other lanes, of counters or of what a need means.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import attrgetter

from llorch.domain.task import Task

_BUCKET = 256
"""Tasks in a bucket at most: moving half of it costs as much as walking the buckets of 100,000 tasks."""

_Place = tuple[float, float]
_place = attrgetter("due", "order")


def _first_place(bucket: list[Task]) -> _Place:
    task = bucket[0]
    return task.due, task.order


class Lane:
    """Tasks sorted by (due, order), in buckets that know their cost.

    A push at the end and a removal of the head cost O(1), all else O(bucket + buckets). Neither `due`, `order` nor
    `cost` of a task may change while it waits here. The buckets hold the tasks themselves: no object is made for one.
    """

    __slots__ = ("_buckets", "_costs", "_length", "cost")

    def __init__(self) -> None:
        self.cost = 0.0
        self._length = 0
        self._buckets: list[list[Task]] = []
        self._costs: list[float] = []

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        for bucket in self._buckets:
            yield from bucket

    def __reversed__(self) -> Iterator[Task]:
        for bucket in reversed(self._buckets):
            yield from reversed(bucket)

    def head(self) -> Task:
        """The one that is to start first; the lane is not empty."""
        return self._buckets[0][0]

    def push(self, task: Task) -> None:
        """Let the task wait at the place that (due, order) give it."""
        cost = task.cost
        self._length += 1
        self.cost += cost
        if not self._buckets:
            self._buckets.append([task])
            self._costs.append(cost)
            return
        bucket = self._buckets[-1]
        last = bucket[-1]
        if task.due < last.due or (task.due == last.due and task.order < last.order):
            self._insert(task)
        elif len(bucket) < _BUCKET:
            bucket.append(task)
            self._costs[-1] += cost
        else:
            self._buckets.append([task])
            self._costs.append(cost)

    def remove(self, task: Task) -> None:
        """The task waits no more; raises KeyError when it did not."""
        number, index = self._find(task)
        bucket = self._buckets[number]
        del bucket[index]
        self._length -= 1
        if bucket:
            self.cost -= task.cost
            self._costs[number] -= task.cost
            return
        del self._buckets[number], self._costs[number]
        self.cost = self.cost - task.cost if self._length else 0.0  # no rounding error outlives the tasks

    def before(self, due: float, order: float) -> tuple[int, float]:
        """How many tasks come before this place, and what they cost."""
        if not self._buckets:
            return 0, 0.0
        place = due, order
        last = self._buckets[-1][-1]
        if place > (last.due, last.order):
            return self._length, self.cost
        if last.due == due and last.order == order:
            return self._length - 1, max(0.0, self.cost - last.cost)
        number = self._bucket_of(place)
        bucket = self._buckets[number]
        index = bisect_left(bucket, place, key=_place)
        count = sum(map(len, self._buckets[:number])) + index
        return count, sum(self._costs[:number]) + self._cost_before(number, index)

    def reaching(self, cost: float, *, is_inclusive: bool = False) -> tuple[int, float]:
        """The tasks before which less than this cost stands (no more than this when inclusive), and what they cost."""
        if self.cost <= cost:
            return self._length, self.cost
        count, total = 0, 0.0
        for number, bucket in enumerate(self._buckets):
            if total + self._costs[number] <= cost:
                total += self._costs[number]
                count += len(bucket)
                continue
            for task in bucket:
                if total > cost or (total == cost and not is_inclusive):
                    return count, total
                total += task.cost
                count += 1
        return count, total

    def _insert(self, task: Task) -> None:
        place = task.due, task.order
        number = self._bucket_of(place)
        bucket = self._buckets[number]
        bucket.insert(bisect_left(bucket, place, key=_place), task)
        self._costs[number] += task.cost
        if len(bucket) > _BUCKET:
            half = bucket[_BUCKET // 2 :]
            del bucket[_BUCKET // 2 :]
            self._buckets.insert(number + 1, half)
            self._costs[number : number + 1] = [sum([t.cost for t in bucket]), sum([t.cost for t in half])]

    def _find(self, task: Task) -> tuple[int, int]:
        """Bucket and index of a task that waits here."""
        buckets = self._buckets
        if buckets:
            if buckets[0][0] is task:
                return 0, 0
            place = task.due, task.order
            number = self._bucket_of(place)
            bucket = buckets[number]
            index = bisect_left(bucket, place, key=_place)
            if index < len(bucket) and bucket[index] is task:
                return number, index
        raise KeyError(task.key)

    def _bucket_of(self, place: _Place) -> int:
        """The last bucket that begins at this place or before it; the first one when none does."""
        if len(self._buckets) == 1:
            return 0
        return max(0, bisect_right(self._buckets, place, key=_first_place) - 1)

    def _cost_before(self, number: int, index: int) -> float:
        """What the first tasks of a bucket cost: summed from the nearer end, as each is a miss of the cache."""
        bucket = self._buckets[number]
        if 2 * index <= len(bucket):
            return sum([task.cost for task in bucket[:index]])
        return max(0.0, self._costs[number] - sum([task.cost for task in bucket[index:]]))

    def broken(self) -> Iterator[str]:
        """Say what does not add up. Costs O(tasks)."""
        places = [(task.due, task.order) for task in self]
        if places != sorted(places) or len(places) != self._length or not all(self._buckets):
            yield f"lane of {self._length} tasks stands as {places}"
        sums = [sum([task.cost for task in bucket]) for bucket in self._buckets]
        pairs = zip([*sums, sum(sums)], [*self._costs, self.cost], strict=True)
        if any(abs(true - kept) > 1e-6 * max(1.0, true) for true, kept in pairs):
            yield f"costs {sums}, kept as {self._costs} and {self.cost}"
