"""One lane against a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain import lane as lane_module
from llorch.domain.lane import Lane
from llorch.domain.task import ANYWHERE, Task
from tests.unit.domain.desk import spec


def waiting(order: int, due: float | None = None, cost: float = 1.0) -> Task:
    task = Task(spec(f"t{order}"), order, accepted_at=0.0, need=ANYWHERE)
    task.due = float(order) if due is None else due
    task.cost = cost
    return task


def lane_of(*tasks: Task) -> Lane:
    lane = Lane()
    for task in tasks:
        lane.push(task)
    return lane


@given(st.data())
def test_lane_is_a_sorted_list_with_prefix_sums(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "_BUCKET", 4)
        lane, model = Lane(), list[Task]()
        for order in data.draw(st.permutations(range(data.draw(st.integers(0, 40))))):
            task = waiting(order, data.draw(st.integers(0, 9)), data.draw(st.integers(1, 100)))
            lane.push(task)
            model.append(task)
            if data.draw(st.booleans()):
                gone = data.draw(st.sampled_from(model))
                lane.remove(gone)
                model.remove(gone)
            model.sort(key=lambda t: (t.due, t.order))
            assert list(lane) == model
            assert list(reversed(lane)) == model[::-1]
            assert not model or lane.head() is model[0]
            assert (len(lane), lane.cost) == (len(model), sum(t.cost for t in model))
            assert list(lane.broken()) == []
        for index, task in enumerate(model):
            assert lane.before(task.due, task.order) == (index, sum(t.cost for t in model[:index]))
        place = data.draw(st.integers(-1, 10)), data.draw(st.integers(-1, 41))
        before = [t for t in model if (t.due, t.order) < place]
        assert lane.before(*place) == (len(before), sum(t.cost for t in before))


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(-1, 200), st.booleans())
def test_reaching_counts_the_tasks_before_which_less_than_the_cost_stands(
    costs: list[int], limit: int, is_inclusive: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "_BUCKET", 4)
        lane = lane_of(*(waiting(order, cost=cost) for order, cost in enumerate(costs)))
    befores = [sum(costs[:index]) for index in range(len(costs))]
    count = sum(1 for before in befores if before < limit or (is_inclusive and before == limit))
    assert lane.reaching(limit, is_inclusive=is_inclusive) == (count, sum(costs[:count]))


def test_task_that_does_not_wait_cannot_be_removed() -> None:
    first, second = waiting(1), waiting(2)
    lane = lane_of(first)
    with pytest.raises(KeyError):
        lane.remove(second)
    with pytest.raises(KeyError):
        lane.remove(waiting(1))
    lane.remove(first)
    with pytest.raises(KeyError):
        lane.remove(first)
    assert (len(lane), lane.cost) == (0, 0.0)


def test_long_lane_keeps_its_order_through_pushes_at_both_ends() -> None:
    lane = lane_of(*(waiting(order) for order in range(1000, 3000)))
    for order in range(999, -1, -1):
        lane.push(waiting(order))
    assert [task.order for task in lane] == list(range(3000))
    assert lane.before(1234.0, 1234) == (1234, 1234.0)
    for order in range(2500):
        assert lane.head().order == order
        lane.remove(lane.head())
    assert list(lane.broken()) == []


def test_broken_names_what_was_changed_while_it_waited() -> None:
    first, second = waiting(1), waiting(2)
    lane = lane_of(first, second)
    first.cost = 5.0
    assert any("costs" in line for line in lane.broken())
    first.cost, first.due = 1.0, 9.0
    assert any("stands as" in line for line in lane.broken())
