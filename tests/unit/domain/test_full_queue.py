"""Who gets a place in a full queue, and who loses one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.fair_queue import Room
from llorch.domain.policy import FullPolicy, Order
from llorch.domain.task import Priority
from llorch.errors import AdmissionReject, QueueFullDropLru
from tests.unit.domain.desk import BATCH, INTERACTIVE
from tests.unit.domain.line import Line, spec


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
def test_light_tenant_keeps_its_share_beside_one_that_keeps_the_queue_full(full: FullPolicy) -> None:
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
