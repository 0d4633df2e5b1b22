"""The waiting tasks of a route: turns, charges, and what is ahead of whom."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llorch.domain.fair_queue import Ahead
from llorch.domain.policy import Fairness, Order
from llorch.domain.task import ANYWHERE, EXACT, Priority, Task, TaskSpec
from tests.unit.domain.desk import BATCH, INTERACTIVE
from tests.unit.domain.line import Line, drained, spec, task_of

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
