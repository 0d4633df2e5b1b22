"""The waiting tasks of a route: places, turns, charges, and what is ahead of whom."""

from collections.abc import Mapping
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.domain.fair_queue import Ahead, FairQueue, Room
from llorch.domain.policy import Fairness, FullPolicy, Order, QueuePolicy
from llorch.domain.task import ANYWHERE, EXACT, Need, Priority, Task, TaskSpec
from llorch.errors import AdmissionReject, QueueFullDropLru
from tests.unit.domain.desk import BATCH, INTERACTIVE

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


# Turns


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Priority)), st.integers(1, 99)), max_size=40))
def test_flow_is_first_in_first_out(pushed: list[tuple[str, Priority, int]]) -> None:
    line = Line()
    for tenant, priority, tokens in pushed:
        line.push(tenant, priority, expected=tokens)
    started = drained(line)
    assert len(started) == len(pushed)
    for flow in {(task.key[0], task.priority) for task in started}:
        orders = [task.order for task in started if (task.key[0], task.priority) == flow]
        assert orders == sorted(orders)


@given(st.lists(st.one_of(st.none(), st.integers(1, 100)), max_size=30))
def test_edf_flow_is_ordered_by_deadline(deadlines: list[int | None]) -> None:
    line = Line(order=Order.EDF)
    for number, deadline_s in enumerate(deadlines):
        wishes = TaskSpec(("a", "t"), ("a", "s"), INTERACTIVE, 8, 8, deadline_s=deadline_s)
        line.queue.push(task_of(wishes, at=float(number)))
    started = drained(line)
    ends = [t.accepted_at + (60.0 if t.spec.deadline_s is None else t.spec.deadline_s) for t in started]
    assert ends == sorted(ends) == [t.due for t in started]


def test_levels_share_by_weight() -> None:
    line = Line(levels=(3.0, 1.0))
    for _ in range(12):
        line.push("a")
        line.push("a", BATCH)
    started = [line.start() for _ in range(12)]
    assert sum(task is not None and task.priority is INTERACTIVE for task in started) == 9


def test_strict_serves_the_urgent_level_first() -> None:
    line = Line(fairness=Fairness.STRICT)
    for priority in (BATCH, INTERACTIVE, BATCH, INTERACTIVE):
        line.push("a", priority)
    assert [task.priority for task in drained(line)] == [INTERACTIVE, INTERACTIVE, BATCH, BATCH]


def test_level_that_cannot_start_leaves_its_turn_to_the_other_and_gains_no_credit() -> None:
    line = Line(levels=(1.0, 1.0))
    line.push("a", INTERACTIVE, EXACT)
    for _ in range(10):
        line.push("a", BATCH)
    for _ in range(9):
        task = line.queue.next(lambda need: need is ANYWHERE, lambda _: True)
        assert task is not None
        line.queue.start(task)
    assert line.queue.level(INTERACTIVE).counter == 8 * 30.0


def test_next_removes_nothing() -> None:
    line = Line()
    task = line.push("a")
    assert line.queue.next(lambda _: True, lambda _: True) is task
    assert line.queue.next(lambda _: True, lambda _: True) is task
    assert list(line.queue) == [task]


def test_requeued_task_stands_at_the_head_of_its_flow() -> None:
    line = Line()
    first, second = line.push("a"), line.push("a")
    assert line.start() is first
    line.settle(first, refund_prompt=True)
    line.queue.push(first)
    assert line.queue.position(second) == 1
    assert drained(line) == [first, second]


def test_flow_over_its_quota_is_parked_until_it_is_unparked() -> None:
    line = Line()
    parked, other = line.push("a"), line.push("b")
    asked: list[Task] = []

    def may_run(task: Task) -> bool:
        asked.append(task)
        return task is not parked

    assert line.queue.next(lambda _: True, may_run) is other
    assert line.queue.next(lambda _: True, may_run) is other
    assert asked == [parked, other, other]
    line.check()
    assert (line.queue.unpark("a"), line.queue.unpark("a"), line.queue.unpark("b")) == (True, False, False)
    assert {task.key[0] for task in drained(line)} == {"a", "b"}


def test_removed_task_waits_no_more() -> None:
    line = Line()
    task = line.push("a")
    line.queue.remove(task)
    line.check()
    assert (len(line.queue), line.queue.waiting(INTERACTIVE, "a"), line.start()) == (0, 0, None)
    with pytest.raises(KeyError):
        line.queue.remove(task)


# Charges


def test_flow_pays_for_prompt_and_output_as_expected_then_as_produced() -> None:
    line = Line()
    line.push("a", prompt=100, expected=10)
    task = line.start()
    assert task is not None
    assert (line.counter("a"), task.charged_tokens, task.has_paid_prompt) == (120.0, 10, True)
    line.produce(task, 10)
    assert line.counter("a") == 120.0
    line.produce(task, 5)
    assert line.counter("a") == 130.0
    line.settle(task, 80)
    assert (line.counter("a"), task.prompt_tokens) == (110.0, 80)
    line.settle(task, 10)
    assert line.counter("a") == 110.0


def test_what_was_not_produced_is_refunded_to_flow_and_level() -> None:
    line = Line()
    line.push("a", expected=50)
    task = line.start()
    assert task is not None
    line.produce(task, 3)
    line.settle(task)
    assert line.counter("a") == 10.0 + 2 * 3
    assert line.queue.level(INTERACTIVE).counter == 16.0 / 8


def test_retry_before_the_first_token_costs_nothing_and_is_charged_anew() -> None:
    line = Line()
    task = line.push("a")
    line.start()
    line.settle(task, refund_prompt=True)
    assert (line.counter("a"), task.has_paid_prompt) == (0.0, False)
    line.queue.push(task)
    assert task.cost == 30.0
    line.start()
    assert line.counter("a") == 30.0


def test_preempted_task_pays_its_prompt_once_and_only_the_rest_of_its_output() -> None:
    line = Line()
    task = line.push("a")
    line.start()
    line.produce(task, 4)
    line.settle(task)
    assert line.counter("a") == 18.0
    line.queue.push(task)
    assert task.cost == 12.0
    line.start()
    assert line.counter("a") == 30.0


@settings(deadline=None, max_examples=60)
@given(
    weights=st.tuples(st.sampled_from([1.0, 2.0, 5.0]), st.sampled_from([1.0, 3.0])),
    slots=st.integers(1, 4),
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
)
def test_backlogged_flows_are_served_within_the_bound_of_virtual_token_counters(
    weights: tuple[float, float], slots: int, sizes: list[tuple[int, int, int]]
) -> None:
    """With refunds and overshoot of the expected output: what was served in truth is compared.

    The bound of the source, and what is produced between two reports.
    """
    line = Line(weights=dict(zip("ab", weights, strict=True)))
    served = {"a": 0.0, "b": 0.0}
    draws = {tenant: (sizes[(number + shift) % len(sizes)] for number in count()) for shift, tenant in enumerate("ab")}
    running: list[tuple[Task, int]] = []
    step_most = 7
    bound = (2 * max(1.0 * 200, 2.0 * slots * 40) + 2.0 * slots * step_most) / min(weights)
    for _ in range(80):
        for tenant in "ab":
            while line.queue.waiting(INTERACTIVE, tenant) <= slots:  # always: the bound is for flows that never run dry
                prompt, expected, _ = next(draws[tenant])
                line.queue.push(task_of(spec(tenant, prompt=prompt, expected=expected)))
        while len(running) < slots:
            task = line.queue.next(lambda _: True, lambda _: True)
            assert task is not None
            line.queue.start(task)
            served[task.key[0]] += task.spec.prompt_tokens
            running.append((task, sizes[task.order % len(sizes)][2]))
        for entry in list(running):
            task, length = entry
            task.tokens_out += (step := min(step_most, length - task.tokens_out))
            served[task.key[0]] += 2.0 * step
            line.queue.charge(task)
            if task.tokens_out == length:
                line.settle(task)
                running.remove(entry)
        lead = abs(served["a"] / weights[0] - served["b"] / weights[1])
        assert lead <= bound
    line.check()


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60))
def test_no_flow_starves_beside_one_that_never_runs_dry(others: list[str]) -> None:
    line = Line()
    line.push("light", prompt=200, expected=40)
    for _ in range(3):
        line.queue.push(task_of(spec("heavy")))
    for number in range(20 + 4 * len(set(others))):
        task = line.queue.next(lambda _: True, lambda _: True)
        assert task is not None
        line.queue.start(task)
        if task.key[0] == "light":
            return
        line.queue.settle(task)
        line.queue.push(task_of(spec(others[number % len(others)])))
        line.queue.push(task_of(spec("heavy")))
    pytest.fail("the light flow had no turn")


# Places


def answer(room: Room) -> tuple[str | None, str | None]:
    refusal, fault = room.refusal, room.fault
    return (None if refusal is None else refusal.policy_label), (None if fault is None else fault.policy_label)


@pytest.mark.parametrize("full", FullPolicy)
def test_there_is_room_while_the_priority_is_not_full(full: FullPolicy) -> None:
    line = Line({INTERACTIVE: 2, BATCH: 1}, full)
    line.push("a")
    line.push("a", BATCH)
    assert line.queue.room_for(spec("a")) == Room()
    line.push("a")
    assert line.queue.room_for(spec("a")) != Room()


@pytest.mark.parametrize("full", FullPolicy)
@pytest.mark.parametrize("order", Order)
def test_flow_below_its_share_takes_the_newest_place_of_the_one_furthest_above(full: FullPolicy, order: Order) -> None:
    line = Line(6, full, order=order)
    tasks = [line.push(tenant) for tenant in "aaaabb"]
    room = line.queue.room_for(spec("c"))
    assert room.victim is tasks[3]
    assert room.fault is not None
    assert (room.fault.kind, room.fault.policy_label, room.refusal) == (AdmissionReject, "fair-share", None)


def test_weights_make_shares_of_places() -> None:
    line = Line(6, weights={"a": 5.0})
    for tenant in "aaaabb":
        line.push(tenant)
    assert line.queue.share_of(INTERACTIVE, "a") == 5.0
    assert (line.queue.share_of(INTERACTIVE, "c"), line.queue.share_of(BATCH, "c")) == (6 / 7, 6.0)
    room = line.queue.room_for(spec("a"))
    assert room.victim is not None
    assert room.victim.key[0] == "b"


def test_flows_with_equal_shares_do_not_take_places_from_each_other_for_ever() -> None:
    line = Line(5)
    for tenant in "aaabb":
        line.push(tenant)
    assert answer(line.queue.room_for(spec("b"))) == ("reject", None)


def test_task_that_ran_before_is_not_evicted() -> None:
    line = Line(3)
    first, second = line.push("a"), line.push("a")
    line.start()
    line.settle(first)
    line.queue.push(first)
    line.push("a")
    line.queue.remove(second)
    line.push("a")
    room = line.queue.room_for(spec("b"))
    assert room.victim is not None
    assert room.victim is not first


@pytest.mark.parametrize("order", Order)
def test_drop_lru_takes_the_oldest_of_the_flow_that_never_ran(order: Order) -> None:
    line = Line(2, FullPolicy.DROP_LRU, order=order)
    first, second = line.push("a"), line.push("a")
    line.start()
    line.settle(first)
    line.queue.push(first)
    room = line.queue.room_for(spec("a"))
    assert room.victim is second
    assert room.fault is not None
    assert (room.fault.kind, room.fault.policy_label) == (QueueFullDropLru, "drop-lru")


@pytest.mark.parametrize(("full", "label"), [(each, each.value) for each in FullPolicy])
@pytest.mark.parametrize("priority", Priority)
def test_queue_without_places_refuses_everybody(full: FullPolicy, label: str, priority: Priority) -> None:
    room = Line(0, full).queue.room_for(spec("a", priority))
    assert answer(room) == (label, None)
    assert room.refusal is not None
    assert room.refusal.kind is AdmissionReject


def test_shed_low_priority_takes_the_place_of_the_tenants_newest_batch_task_and_batch_shrinks() -> None:
    line = Line(2, FullPolicy.SHED_LOW_PRIORITY)
    for priority in (INTERACTIVE, INTERACTIVE, BATCH):
        line.push("a", priority)
    newest = line.push("a", BATCH)
    room = line.queue.room_for(spec("a"))
    assert (room.victim, answer(room)) == (newest, (None, "shed-low-priority"))
    line.queue.remove(newest)
    line.push("a")
    assert answer(line.queue.room_for(spec("a", BATCH))) == ("shed-low-priority", None)
    assert len(line.queue) == 4


def test_shed_low_priority_refuses_who_has_no_batch_task() -> None:
    line = Line(1, FullPolicy.SHED_LOW_PRIORITY)
    line.push("a")
    line.push("b", BATCH)
    assert answer(line.queue.room_for(spec("a"))) == ("shed-low-priority", None)


@pytest.mark.parametrize("full", FullPolicy)
@pytest.mark.parametrize("order", Order)
@given(
    moves=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(Priority)), st.integers(0, 3)), max_size=50)
)
def test_full_queue_keeps_its_bound_and_asking_changes_nothing(
    full: FullPolicy, order: Order, moves: list[tuple[str, Priority, int]]
) -> None:
    line = Line({INTERACTIVE: 4, BATCH: 3}, full, order=order)
    for tenant, priority, action in moves:
        before = [(task.order, task.due, task.cost) for task in line.queue]
        room = line.queue.room_for(spec(tenant, priority))
        assert line.queue.room_for(spec(tenant, priority)) == room
        assert [(task.order, task.due, task.cost) for task in line.queue] == before
        if action == 0:
            line.start()
        elif room.refusal is None:
            if room.victim is not None:
                line.queue.remove(room.victim)
            line.push(tenant, priority)
        assert len(line.queue) <= 7
        assert line.queue.depth(BATCH) <= 3
        if full is not FullPolicy.SHED_LOW_PRIORITY:
            assert line.queue.depth(INTERACTIVE) <= 4


@pytest.mark.parametrize("full", FullPolicy)
def test_peer_bug_26_light_tenant_keeps_its_share_beside_one_that_keeps_the_queue_full(full: FullPolicy) -> None:
    line = Line(8, full)
    starts = {"light": 0, "flood": 0}

    def submit(tenant: str) -> None:
        room = line.queue.room_for(spec(tenant))
        if room.refusal is None:
            if room.victim is not None:
                line.queue.remove(room.victim)
            line.push(tenant)

    for _ in range(100):
        for _ in range(12):
            submit("flood")
        submit("light")
        for _ in range(2):
            task = line.start()
            assert task is not None
            starts[task.key[0]] += 1
            line.settle(task)
    assert starts["light"] >= 99


# What is ahead


@settings(deadline=None)
@given(
    pushed=st.lists(st.tuples(st.sampled_from(list(Priority)), st.integers(1, 60), st.booleans()), max_size=25),
    started=st.integers(0, 10),
    fairness=st.sampled_from(list(Fairness)),
)
def test_ahead_is_exact_with_one_flow_in_each_level(
    pushed: list[tuple[Priority, int, bool]], started: int, fairness: Fairness
) -> None:
    line = Line(fairness=fairness, levels=(4.0, 1.0))
    for priority, tokens, is_exact in pushed:
        need = EXACT if is_exact and fairness is Fairness.STRICT else ANYWHERE
        line.push("a", priority, need, expected=tokens)
    for _ in range(min(started, len(pushed))):
        line.start()
    told = {task.order: line.queue.ahead(task) for task in line.queue}
    cost = 0.0
    for number, task in enumerate(drained(line)):
        assert told[task.order] == Ahead(number, cost)
        cost += task.cost


def test_ahead_among_equal_flows_is_what_they_get_first() -> None:
    line = Line()
    for _ in range(20):
        for tenant in "abcde":
            line.push(tenant)
    last = line.push("a")
    assert line.queue.position(last) == 100
    line.push("idle", BATCH)
    tenth = [task for task in line.queue if task.key[0] == "a"][10]
    assert 45 <= line.queue.ahead(tenth).tasks <= 55


def test_share_of_service_is_by_weight_of_level_and_flow() -> None:
    line = Line(weights={"a": 3.0})
    task = line.push("a")
    assert line.queue.share_of_service(task) == 1.0
    line.push("b")
    line.push("b", BATCH)
    assert line.queue.share_of_service(task) == pytest.approx(3 / 4 * 8 / 9)


# Memory


def test_peer_bug_15_tenants_that_came_once_are_forgotten() -> None:
    queue = Line().queue
    for number in range(10_000):
        task = task_of(spec(f"t{number}"))
        queue.push(task)
        queue.start(task)
        queue.settle(task)
    assert len(queue.level(INTERACTIVE).flows) <= 3 * 1024
    assert list(queue.check()) == []
