"""The states of a replica and the steps between them (ORCH-3008)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.replica import TRANSITIONS, IllegalTransition, Replica, ReplicaState, check_move
from llorch.domain.task import Cohort

ANEW = (ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED)


def reachable(start: ReplicaState, *, without: frozenset[ReplicaState] = frozenset()) -> set[ReplicaState]:
    found, todo = {start}, [start]
    while todo:
        for state in TRANSITIONS[todo.pop()] - found - without:
            found.add(state)
            todo.append(state)
    return found


@pytest.mark.parametrize("state", ReplicaState)
def test_no_state_is_a_dead_end(state: ReplicaState) -> None:
    assert ReplicaState.READY in reachable(state)
    assert ReplicaState.STOPPED in reachable(state)


@pytest.mark.parametrize("state", ANEW)
def test_what_drains_or_is_gone_is_ready_only_by_starting_anew(state: ReplicaState) -> None:
    assert ReplicaState.READY not in reachable(state, without=frozenset({ReplicaState.STARTING}))


@given(st.lists(st.sampled_from(ReplicaState), max_size=30))
def test_random_walk_takes_the_steps_of_the_table_and_no_other(walk: list[ReplicaState]) -> None:
    state = ReplicaState.STARTING
    for step in walk:
        if step is state or step in TRANSITIONS[state]:
            check_move(state, step)
            state = step
        else:
            with pytest.raises(IllegalTransition, match=f"{step.value} from {state.value}"):
                check_move(state, step)


@pytest.mark.parametrize(("state", "comes_back"), [(state, back) for state in ReplicaState for back in (False, True)])
def test_replica_that_is_only_exchanged_will_serve_again(state: ReplicaState, comes_back: bool) -> None:
    replica = Replica("r", "p", 1, Cohort(None, None, exact=True), state, comes_back=comes_back)
    assert replica.may_serve is (not state.is_gone and (state is not ReplicaState.DRAINING or comes_back))
