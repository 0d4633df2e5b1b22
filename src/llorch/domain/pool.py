"""Replicas as the scheduler sees them: which there are, what they are, and which can take a task now.

How a replica's state is found out is not known here; it comes in as ReplicaChanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from llorch.domain.ledger import Ledger
from llorch.domain.task import Cohort, Need


class ReplicaState(Enum):
    """Life of a replica. Only READY takes tasks; STOPPED and FAILED do not come back by themselves."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    UNREADY = "unready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_gone(self) -> bool:
        """It will not become Ready without somebody's doing."""
        return self in (ReplicaState.STOPPED, ReplicaState.FAILED)


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine process as last told. `can_interrupt`: it stops decoding at once when it is told to."""

    replica_id: str
    pool_id: str
    slots: int
    cohort: Cohort
    state: ReplicaState = ReplicaState.STARTING
    can_interrupt: bool = False

    def meets(self, need: Need) -> bool:
        """A task with this need may run here."""
        if need.cohort is not None:
            return self.cohort == need.cohort
        return self.cohort.exact or not need.exact


class Fleet:
    """The replicas of one route, in the order of the configuration, which breaks ties."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._replicas: dict[str, Replica] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> Replica | None:
        """The replica as last told."""
        return self._replicas.get(replica_id)

    def put(self, replica: Replica) -> None:
        """Take over what was told of a replica."""
        self._replicas[replica.replica_id] = replica

    def suspect(self, replica_id: str) -> None:
        """Take a Ready replica that just failed a task out of service until it is told Ready again.

        A replica that fails fast would else look idle and attract all the load.
        """
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.state is ReplicaState.READY:
            self._replicas[replica_id] = replace(replica, state=ReplicaState.UNREADY)

    def can_serve(self, need: Need) -> bool:
        """Some replica that meets the need is Ready or may yet become it."""
        for replica in self._replicas.values():  # noqa: SIM110 (asked for every task; a generator takes twice as long)
            if not replica.state.is_gone and replica.meets(need):
                return True
        return False

    def free(self) -> list[Replica]:
        """Ready replicas with a slot that nobody holds."""
        busy = self._ledger.busy_slots
        return [r for r in self._replicas.values() if r.state is ReplicaState.READY and busy(r.replica_id) < r.slots]

    def least_loaded(self, free: Sequence[Replica], need: Need) -> Replica:
        """Of those that meet the need, the one with the smallest share of its slots busy; the first of equals."""
        fit = [replica for replica in free if replica.meets(need)]
        if len(fit) == 1:
            return fit[0]
        return min(fit, key=lambda replica: self._ledger.busy_slots(replica.replica_id) / replica.slots)
