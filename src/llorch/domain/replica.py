"""One replica as the scheduler sees it, and the states of its life with the transitions between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llorch.domain.task import Cohort, Need


class ReplicaState(Enum):
    """Life of a replica. Only READY takes tasks; STOPPED and FAILED do not come back by themselves."""

    STARTING = "starting"
    LOADING = "loading"
    SELF_TEST = "self-test"
    READY = "ready"
    UNREADY = "unready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_gone(self) -> bool:
        """It will not become Ready without somebody's doing."""
        return self in (ReplicaState.STOPPED, ReplicaState.FAILED)


class IllegalTransition(Exception):
    """A replica was to take a step that its states do not have."""


_S = ReplicaState
_COMING_UP = frozenset(ReplicaState)

TRANSITIONS: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    _S.STARTING: _COMING_UP - {_S.STARTING},
    _S.LOADING: _COMING_UP - {_S.LOADING},
    _S.SELF_TEST: _COMING_UP - {_S.SELF_TEST},
    _S.UNREADY: _COMING_UP - {_S.UNREADY},
    _S.READY: frozenset({_S.STARTING, _S.UNREADY, _S.DRAINING, _S.STOPPED, _S.FAILED}),
    _S.DRAINING: frozenset({_S.STARTING, _S.STOPPED, _S.FAILED}),
    _S.STOPPED: frozenset({_S.STARTING, _S.FAILED}),
    _S.FAILED: frozenset({_S.STARTING, _S.STOPPED}),
}
"""What may follow each state. What drains, has stopped or has failed becomes Ready only by starting anew."""


def check_move(old: ReplicaState, new: ReplicaState) -> None:
    """Return when the step may be taken; to stay where it is always may. Raises IllegalTransition."""
    if new is not old and new not in TRANSITIONS[old]:
        raise IllegalTransition(f"a replica does not become {new.value} from {old.value}")


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine process as last told. `can_interrupt`: it stops decoding at once when it is told to.

    `comes_back` is said of one that drains: another process takes its place under the same id.
    """

    replica_id: str
    pool_id: str
    slots: int
    cohort: Cohort
    state: ReplicaState = ReplicaState.STARTING
    can_interrupt: bool = False
    comes_back: bool = False

    @property
    def may_serve(self) -> bool:
        """It takes tasks, or may take some again without somebody's doing."""
        return not self.state.is_gone and (self.state is not ReplicaState.DRAINING or self.comes_back)

    def meets(self, need: Need) -> bool:
        """A task with this need may run here."""
        if need.cohort is not None:
            return self.cohort == need.cohort
        return self.cohort.exact or not need.exact
