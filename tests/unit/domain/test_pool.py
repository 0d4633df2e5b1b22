"""What a replica suits, and the fleet by itself."""

import pytest

from llorch.domain.ledger import Ledger
from llorch.domain.pool import Fleet, ReplicaState
from llorch.domain.task import ANYWHERE, EXACT, Cohort, Need
from tests.unit.domain.desk import replica


@pytest.mark.parametrize(
    ("need", "suits"),
    [
        (ANYWHERE, {"exact", "exact v2", "loose"}),
        (EXACT, {"exact", "exact v2"}),
        (Need(exact=True, cohort=Cohort("v1", "sha256:aa", exact=True)), {"exact"}),
        (Need(exact=True, cohort=Cohort(None, None, exact=True)), set()),
    ],
)
def test_replica_meets_a_need(need: Need, suits: set[str]) -> None:
    fleet = [replica("exact"), replica("exact v2", version="v2"), replica("loose", 2)]
    assert {known.replica_id for known in fleet if known.meets(need)} == suits


def test_only_stopped_and_failed_do_not_come_back() -> None:
    assert {state for state in ReplicaState if state.is_gone} == {ReplicaState.STOPPED, ReplicaState.FAILED}


def test_suspect_replica_is_unready_until_it_is_told_ready() -> None:
    fleet = Fleet(Ledger())
    fleet.put(replica())
    fleet.suspect("r0")
    fleet.suspect("nobody")
    assert fleet.free() == []
    fleet.put(replica())
    assert [known.replica_id for known in fleet.free()] == ["r0"]


def test_free_are_ready_replicas_with_a_slot_that_nobody_holds() -> None:
    ledger = Ledger()
    fleet = Fleet(ledger)
    fleet.put(replica("full", 1))
    fleet.put(replica("half", 2))
    fleet.put(replica("loading", 2, state=ReplicaState.LOADING))
    lease = ledger.hold_slot("full")
    ledger.hold_slot("half")
    assert [known.replica_id for known in fleet.free()] == ["half"]
    ledger.release_slot(lease.attempt_id)
    assert [known.replica_id for known in fleet.free()] == ["half"]
    ledger.settle_slot(lease.attempt_id)
    assert [known.replica_id for known in fleet.free()] == ["full", "half"]


def test_least_loaded_is_by_share_and_ties_go_to_the_first_configured() -> None:
    ledger = Ledger()
    fleet = Fleet(ledger)
    fleet.put(replica("a", 2))
    fleet.put(replica("b", 4))
    fleet.put(replica("c", 1))
    assert fleet.least_loaded(fleet.free(), ANYWHERE).replica_id == "a"
    ledger.hold_slot("a")
    ledger.hold_slot("b")
    assert fleet.least_loaded(fleet.free(), ANYWHERE).replica_id == "c"
    ledger.hold_slot("c")
    assert fleet.least_loaded(fleet.free(), ANYWHERE).replica_id == "b"
