"""A fair queue that is checked after every step, for tests of turns, charges and places."""

from collections.abc import Mapping
from itertools import count

from llorch.domain.fair_queue import FairQueue
from llorch.domain.policy import Fairness, FullPolicy, Order, QueuePolicy
from llorch.domain.task import ANYWHERE, Need, Priority, Task, TaskSpec
from tests.unit.domain.desk import INTERACTIVE

_orders = count(1)


def spec(tenant: str, priority: Priority = INTERACTIVE, *, prompt: int = 10, expected: int = 10) -> TaskSpec:
    return TaskSpec(
        (tenant, "t"), (tenant, "s"), priority, max_tokens=64, expected_tokens=expected, prompt_tokens=prompt
    )


def task_of(wishes: TaskSpec, need: Need = ANYWHERE, at: float = 0.0) -> Task:
    return Task(wishes, next(_orders), accepted_at=at, need=need)


class Line:
    """A queue that is checked after every step."""

    def __init__(
        self,
        capacity: int | Mapping[Priority, int] = 1000,
        full: FullPolicy = FullPolicy.REJECT,
        *,
        fairness: Fairness = Fairness.WFQ,
        order: Order = Order.FIFO,
        weights: Mapping[str, float] | None = None,
        levels: tuple[float, float] = (8.0, 1.0),
    ) -> None:
        places = dict.fromkeys(Priority, capacity) if isinstance(capacity, int) else capacity
        self.queue = FairQueue(
            QueuePolicy(
                capacity=places,
                full_policy=dict.fromkeys(Priority, full),
                fairness=fairness,
                order=order,
                level_weights=dict(zip(Priority, levels, strict=True)),
                weights=weights or {},
            )
        )

    def push(self, tenant: str, priority: Priority = INTERACTIVE, need: Need = ANYWHERE, **tokens: int) -> Task:
        task = task_of(spec(tenant, priority, **tokens), need)
        self.queue.push(task)
        self.check()
        return task

    def start(self) -> Task | None:
        task = self.queue.next(lambda _: True, lambda _: True)
        if task is not None:
            self.queue.start(task)
            task.attempts += 1
        self.check()
        return task

    def produce(self, task: Task, tokens: int) -> None:
        task.tokens_out += tokens
        self.queue.charge(task)
        self.check()

    def settle(self, task: Task, prompt_tokens: int | None = None, *, refund_prompt: bool = False) -> None:
        self.queue.settle(task, prompt_tokens, refund_prompt=refund_prompt)
        self.check()

    def counter(self, tenant: str, priority: Priority = INTERACTIVE) -> float:
        return self.queue.counter(priority, tenant)

    def check(self) -> None:
        assert list(self.queue.check()) == []


def drained(line: Line) -> list[Task]:
    tasks = []
    while (task := line.start()) is not None:
        tasks.append(task)
    return tasks
