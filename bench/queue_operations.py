"""What the operations of the fair queue cost, with few and with many tasks waiting in 1,000 flows.

For pytest-benchmark: `python -m pytest bench/queue_operations.py`.
"""

import random

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llorch.domain.fair_queue import FairQueue
from llorch.domain.policy import Order, QueuePolicy
from llorch.domain.task import ANYWHERE, Need, Priority, Task, TaskSpec

TENANTS = 500
SIZES = [1_000, 100_000]


def can_start(_need: Need) -> bool:
    return True


def may_run(_task: Task) -> bool:
    return True


class Queue:
    """A queue under `order: edf` with so many tasks in 2 x TENANTS flows."""

    def __init__(self, waiting: int, spare: int) -> None:
        self._random = random.Random(waiting)
        self._made = 0
        policy = QueuePolicy(
            capacity=dict.fromkeys(Priority, waiting // 2 + spare),
            order=Order.EDF,
            weights={f"tenant-{each}": 1.0 + each % 4 for each in range(TENANTS)},
        )
        self.queue = FairQueue(policy)
        for _ in range(waiting):
            self.push()

    def make(self) -> Task:
        number, draw = self._made, self._random
        self._made += 1
        tenant = f"tenant-{number % TENANTS}"
        spec = TaskSpec(
            key=(tenant, str(number)),
            session=(tenant, str(number)),
            priority=Priority.BATCH if number // TENANTS % 2 else Priority.INTERACTIVE,
            max_tokens=128,
            expected_tokens=draw.randint(1, 128),
            prompt_tokens=draw.randint(1, 1000),
            deadline_s=draw.uniform(1.0, 1000.0),
        )
        return Task(spec, number, accepted_at=0.0, need=ANYWHERE)

    def push(self) -> Task:
        task = self.make()
        self.queue.push(task)
        return task

    def turn(self) -> None:
        """One task leaves, is charged, settled, and another comes."""
        queue = self.queue
        task = queue.next(can_start, may_run)
        assert task is not None
        queue.start(task)
        task.tokens_out = task.spec.expected_tokens + 4
        queue.charge(task)
        queue.settle(task, task.spec.prompt_tokens + 1)
        self.push()

    def come_and_go(self) -> None:
        """A task comes and is canceled while it waits."""
        self.queue.remove(self.push())


@pytest.fixture(scope="module", params=SIZES, ids=[f"{size} waiting" for size in SIZES])
def full(request: pytest.FixtureRequest) -> Queue:
    """All places are taken."""
    return Queue(request.param, 0)


@pytest.fixture(scope="module", params=SIZES, ids=[f"{size} waiting" for size in SIZES])
def roomy(request: pytest.FixtureRequest) -> Queue:
    return Queue(request.param, 10_000)


@pytest.mark.benchmark(group="push and remove")
def test_push_and_remove(benchmark: BenchmarkFixture, roomy: Queue) -> None:
    benchmark(roomy.come_and_go)
    assert not list(roomy.queue.check())


@pytest.mark.benchmark(group="next, start, charge, settle and push")
def test_turn(benchmark: BenchmarkFixture, roomy: Queue) -> None:
    benchmark(roomy.turn)
    assert not list(roomy.queue.check())


@pytest.mark.benchmark(group="next")
def test_next(benchmark: BenchmarkFixture, roomy: Queue) -> None:
    assert benchmark(roomy.queue.next, can_start, may_run) is not None


@pytest.mark.benchmark(group="charge of what was expected")
def test_charge_within_expectation(benchmark: BenchmarkFixture, roomy: Queue) -> None:
    task = roomy.queue.next(can_start, may_run)
    assert task is not None
    roomy.queue.start(task)
    benchmark(roomy.queue.charge, task)
    roomy.queue.settle(task)
    roomy.push()


@pytest.mark.benchmark(group="ahead of a waiting task")
def test_ahead(benchmark: BenchmarkFixture, roomy: Queue) -> None:
    task = roomy.push()
    assert benchmark(roomy.queue.ahead, task).tasks > 0


@pytest.mark.benchmark(group="place in a full queue")
def test_room_for(benchmark: BenchmarkFixture, full: Queue) -> None:
    room = benchmark(full.queue.room_for, full.make().spec)
    assert room.refusal is not None or room.victim is not None
