"""The table of states, and faults as values."""

import itertools

import pytest

from llorch.domain.task import ANYWHERE, TRANSITIONS, Fault, InvalidTransition, Task, TaskState
from llorch.errors import PoolUnready, WorkerReset
from tests.unit.domain.desk import spec

FINAL = {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED}


def fresh() -> Task:
    return Task(spec("a"), 1, accepted_at=0.0, need=ANYWHERE)


def test_final_states_are_those_of_the_contract() -> None:
    """ORCH-2030."""
    assert {state for state in TaskState if state.is_final} == FINAL
    assert [state.value for state in TaskState] == ["queued", "running", "succeeded", "failed", "canceled"]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(TaskState, TaskState)))
def test_only_steps_of_the_table_can_be_taken(before: TaskState, after: TaskState) -> None:
    task = fresh()
    task.state = before
    if after in TRANSITIONS[before]:
        task.move(after)
        assert task.state is after
    else:
        with pytest.raises(InvalidTransition):
            task.move(after)
        assert task.state is before


def test_the_only_way_back_is_from_running_to_queued() -> None:
    back = {(a, b) for a in TaskState for b in TRANSITIONS[a] if list(TaskState).index(b) < list(TaskState).index(a)}
    assert back == {(TaskState.RUNNING, TaskState.QUEUED)}


def test_illegal_step_tells_the_whole_story() -> None:
    task = fresh()
    task.move(TaskState.RUNNING)
    task.move(TaskState.CANCELED)
    with pytest.raises(InvalidTransition, match="queued → running → canceled → running"):
        task.move(TaskState.RUNNING)


def test_fault_becomes_the_error_with_everything_it_knows() -> None:
    error = Fault(WorkerReset, "lost", policy_label="x", retry_after_ms=7).error(engine="llamacpp", pool_id="p")
    assert type(error) is WorkerReset
    assert (error.message, error.policy_label, error.retry_after_ms, error.engine, error.pool_id) == (
        "lost",
        "x",
        7,
        "llamacpp",
        "p",
    )


def test_fault_without_a_message_has_that_of_its_kind() -> None:
    assert Fault(PoolUnready).error().message == "No replica of the route is ready yet."
