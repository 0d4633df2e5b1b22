"""What a replica suits, and the fleet by itself: who is free, who is chosen, what an engine says of its load."""

from dataclasses import replace

import pytest

from llorch.domain.ledger import Ledger
from llorch.domain.pool import FRESH_S, Fleet, Replica, ReplicaState
from llorch.domain.task import ANYWHERE, EXACT, Cohort, Need
from tests.unit.domain.desk import replica

STRICT_V1 = Need(exact=True, cohort=Cohort("v1", "sha256:aa", exact=True))


class Rack:
    """A fleet with its ledger; a start is the one step that the scheduler makes it: choose, lease, take."""

    def __init__(self, *replicas: Replica, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.fleet = Fleet(self.ledger)
        for known in replicas:
            self.fleet.put(known)

    def start(self, work_s: float = 1.0, *, on: str | None = None, prefer: str | None = None) -> tuple[int, str, float]:
        chosen = on or self.fleet.choose(ANYWHERE, prefer=prefer).replica_id
        lease = self.ledger.hold_slot(chosen)
        self.fleet.take(chosen, work_s)
        return lease.attempt_id, chosen, work_s

    def end(self, started: tuple[int, str, float]) -> None:
        attempt_id, replica_id, work_s = started
        self.ledger.settle_slot(attempt_id)
        self.fleet.give_back(replica_id, work_s)

    def least(self, need: Need = ANYWHERE) -> str:
        return self.fleet.choose(need).replica_id


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
    assert not fleet.can_start(ANYWHERE)
    fleet.put(replica())
    assert fleet.choose(ANYWHERE).replica_id == "r0"


# Who is free


def test_replica_is_free_until_its_last_slot_is_leased_and_again_when_one_is_settled() -> None:
    rack = Rack(replica("r0", 2))
    first = rack.start()
    assert rack.fleet.can_start(ANYWHERE)
    rack.start()
    assert not rack.fleet.can_start(ANYWHERE)
    assert not rack.fleet.has_free
    with pytest.raises(LookupError, match="no free replica"):
        rack.fleet.choose(ANYWHERE)
    rack.end(first)
    assert rack.fleet.has_free


@pytest.mark.parametrize("state", ReplicaState)
def test_only_ready_starts_and_what_is_gone_or_leaves_cannot_serve(state: ReplicaState) -> None:
    """ORCH-3154."""
    fleet = Rack(replica(state=state)).fleet
    is_ready = state is ReplicaState.READY
    assert fleet.can_serve(ANYWHERE) is (
        state not in (ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED)
    )
    assert fleet.can_start(ANYWHERE) is is_ready
    assert fleet.ready(ANYWHERE) is is_ready
    assert (fleet.ready_count, fleet.ready_slots) == (is_ready, is_ready)


def test_needs_are_asked_of_each_cohort() -> None:
    loose = replica("loose", 2)
    rack = Rack(loose, replica("strict", state=ReplicaState.LOADING))
    fleet = rack.fleet
    assert [fleet.can_serve(need) for need in (ANYWHERE, EXACT, STRICT_V1)] == [True, True, True]
    assert [fleet.can_start(need) for need in (ANYWHERE, EXACT, STRICT_V1)] == [True, False, False]
    assert [fleet.ready(need) for need in (ANYWHERE, EXACT, STRICT_V1)] == [True, False, False]
    fleet.put(replica("strict"))
    assert rack.least(EXACT) == rack.least(STRICT_V1) == "strict"
    assert rack.least() == "loose"
    assert not fleet.can_serve(Need(exact=True, cohort=Cohort("v2", "sha256:aa", exact=True)))


def test_ready_slots_count_busy_ones_and_follow_every_change() -> None:
    rack = Rack(replica("a", 4), replica("b", 2), replica("c", 8, state=ReplicaState.LOADING))
    rack.start()
    fleet = rack.fleet
    assert (fleet.ready_count, fleet.ready_slots) == (2, 6)
    fleet.put(replica("c", 8))
    fleet.put(replica("a", 1))
    assert (fleet.ready_count, fleet.ready_slots) == (3, 11)
    fleet.suspect("c")
    fleet.suspect("c")
    assert (fleet.ready_count, fleet.ready_slots) == (2, 3)


def test_replica_that_shrinks_below_its_busy_slots_is_free_only_below_the_new_number() -> None:
    rack = Rack(replica("r0", 3))
    runs = [rack.start() for _ in range(3)]
    rack.fleet.put(replica("r0", 1, exact=False))
    for run in runs[:2]:
        rack.end(run)
        assert not rack.fleet.can_start(ANYWHERE)
    rack.end(runs[2])
    assert rack.fleet.can_start(ANYWHERE)


def test_replica_that_changes_its_cohort_is_found_in_the_new_one_alone() -> None:
    rack = Rack(replica("r0"))
    rack.fleet.put(replica("r0", version="v2"))
    assert not rack.fleet.can_serve(STRICT_V1)
    assert not rack.fleet.can_start(STRICT_V1)
    assert rack.least(Need(exact=True, cohort=Cohort("v2", "sha256:aa", exact=True))) == "r0"


@pytest.mark.parametrize("gone", [ReplicaState.STOPPED, ReplicaState.FAILED])
def test_replica_that_vanishes_and_returns_still_has_the_work_of_attempts_that_have_not_ended(
    gone: ReplicaState,
) -> None:
    rack = Rack(replica("a", 2), replica("b", 2))
    run = rack.start(5.0)
    rack.fleet.put(replica("a", 2, state=gone))
    assert rack.least() == "b"
    assert rack.fleet.work_s("a") == 5.0
    rack.fleet.put(replica("a", 2))
    assert rack.least() == "b"
    rack.end(run)
    assert rack.least() == "a"


def test_peer_bug_15_cohorts_that_no_replica_has_any_more_leave_nothing_behind() -> None:
    fleet = Rack(replica("r0"), replica("r1")).fleet
    for number in range(1000):
        fleet.put(replica("r0", version=f"v{number}"))
    assert [cohort.engine_version for cohort in fleet.cohorts] == ["v1", "v999"]


# Who is chosen


def test_least_predicted_work_counts_and_not_the_number_of_tasks() -> None:
    """ORCH-3010."""
    rack = Rack(replica("a", 4), replica("b", 4))
    rack.start(60.0, on="a")
    for _ in range(3):
        rack.start(1.0, on="b")
    assert rack.least() == "b"


def test_work_of_replicas_with_many_slots_is_compared_per_slot() -> None:
    rack = Rack(replica("small", 2), replica("big", 8))
    rack.start(3.0, on="small")
    rack.start(8.0, on="big")
    assert rack.least() == "big"
    rack.start(8.0, on="big")
    assert rack.least() == "small"


def test_of_equal_work_the_smaller_share_of_slots_decides_and_then_the_configuration() -> None:
    rack = Rack(replica("a", 4), replica("b", 4))
    assert rack.least() == "a"
    rack.start(0.0, on="a")
    assert rack.least() == "b"
    rack.fleet.note_foreign("b", 2, 0.0)
    assert rack.least() == "a"
    rack.start(0.0, on="a")
    assert rack.least() == "a"


def test_given_back_work_is_never_below_zero_and_nothing_is_left_of_it_when_nothing_is_held() -> None:
    rack = Rack(replica("r0", 3))
    runs = [rack.start(work_s) for work_s in (0.1, 0.2, 0.3)]
    assert rack.fleet.work_s("r0") == pytest.approx(0.6)
    for run in runs:
        rack.end(run)
    assert rack.fleet.work_s("r0") == 0.0
    attempt_id, _, _ = rack.start(1.0)
    rack.start(0.5)
    rack.end((attempt_id, "r0", 100.0))
    assert rack.fleet.work_s("r0") == 0.0
    assert rack.fleet.work_s("nobody") == 0.0


@pytest.mark.parametrize(
    ("ahead_s", "detour_s", "chosen"),
    [(0.5, 0.5, "home"), (0.51, 0.5, "other"), (0.0, 0.0, "home"), (0.01, 0.0, "other")],
)
def test_preferred_replica_wins_while_it_is_no_great_detour(ahead_s: float, detour_s: float, chosen: str) -> None:
    """ORCH-3009."""
    rack = Rack(replica("other", 1), replica("home", 2))
    rack.start(ahead_s * 2, on="home")
    assert rack.fleet.choose(ANYWHERE, prefer="home", detour_s=detour_s).replica_id == chosen


def test_preferred_replica_that_is_busy_unready_unfit_or_unknown_is_no_choice() -> None:
    rack = Rack(replica("other"), replica("loose", 2), replica("busy"), replica("unready", state=ReplicaState.UNREADY))
    rack.start(on="busy")
    for prefer in ("busy", "unready", "loose", "nobody"):
        assert rack.fleet.choose(EXACT, prefer=prefer, detour_s=1e9).replica_id == "other"
    assert rack.fleet.choose(ANYWHERE, prefer="loose", detour_s=0.0).replica_id == "loose"


def test_peer_bug_10_a_replica_that_fails_fast_is_not_the_least_loaded() -> None:
    """ORCH-3145: it has no work because it loses it all."""
    rack = Rack(replica("bad", 4), replica("good", 4))
    run = rack.start(10.0)
    rack.start(10.0, on="good")
    rack.end(run)
    rack.fleet.suspect("bad")
    for _ in range(3):
        assert rack.start(10.0)[1] == "good"
    assert not rack.fleet.can_start(ANYWHERE)
    assert rack.fleet.can_serve(ANYWHERE)
    assert rack.fleet.get("bad") == replace(replica("bad", 4), state=ReplicaState.UNREADY)
    rack.fleet.put(replica("bad", 4))
    assert rack.least() == "bad"


@pytest.mark.parametrize("work_s", [0.0, 2.5])
def test_peer_bug_11_a_burst_does_not_land_on_one_replica(work_s: float) -> None:
    """ORCH-3140: what a start takes is seen by the next choice, also while nothing is predicted."""
    rack = Rack(*(replica(f"r{number}", 4) for number in range(5)))
    burst = [rack.start(work_s)[1] for _ in range(10)]
    assert burst == [f"r{number}" for number in range(5)] * 2


def test_peer_bug_12_capacity_is_not_summed_over_routes() -> None:
    ledger = Ledger()
    saturated = Rack(replica("a0"), replica("a1"), ledger=ledger)
    idle = Rack(replica("b0", 8), ledger=ledger)
    saturated.start()
    saturated.start()
    assert not saturated.fleet.can_start(ANYWHERE)
    assert not saturated.fleet.has_free
    assert (saturated.fleet.ready_count, saturated.fleet.ready_slots) == (2, 2)
    assert idle.fleet.can_start(ANYWHERE)
    assert (idle.fleet.ready_count, idle.fleet.ready_slots) == (1, 8)


# What engines say of their load


@pytest.mark.parametrize(
    ("own", "foreign", "is_free"),
    [(0, 3, True), (0, 4, False), (1, 2, True), (1, 3, False), (3, 1, False), (0, 99, False), (0, -5, True)],
)
def test_foreign_work_and_own_leases_fill_the_slots_together(own: int, foreign: int, is_free: bool) -> None:
    rack = Rack(replica("r0", 4))
    for _ in range(own):
        rack.start()
    rack.fleet.note_foreign("r0", foreign, 0.0)
    assert rack.fleet.can_start(ANYWHERE) is is_free


def test_peer_bug_18_stale_engine_metrics_degrade_to_own_counts_and_never_to_a_halt() -> None:
    rack = Rack(replica("r0", 2))
    rack.fleet.note_foreign("r0", 2, 100.0)
    assert rack.fleet.next_stale() == 100.0 + FRESH_S
    assert not rack.fleet.drop_stale(100.0 + FRESH_S - 0.001)
    assert not rack.fleet.can_start(ANYWHERE), "a fresh report that says full is honoured"
    assert rack.fleet.drop_stale(100.0 + FRESH_S)
    assert rack.fleet.next_stale() is None
    rack.start()
    assert rack.fleet.can_start(ANYWHERE)
    rack.start()
    assert not rack.fleet.can_start(ANYWHERE), "own leases count always"


def test_peer_bug_18_a_report_is_stale_by_its_own_age_and_a_new_one_replaces_it() -> None:
    rack = Rack(replica("a"), replica("b"))
    fleet = rack.fleet
    fleet.note_foreign("a", 1, 0.0)
    fleet.note_foreign("b", 1, 1.0)
    fleet.note_foreign("a", 1, 2.0)
    fleet.note_foreign("nobody", 1, 2.0)
    assert fleet.next_stale() == 1.0 + FRESH_S
    assert fleet.drop_stale(1.0 + FRESH_S)
    assert rack.least() == "b"
    fleet.note_foreign("a", 0, 1.0 + FRESH_S)
    assert fleet.next_stale() is None
    assert rack.least() == "a"


def test_foreign_work_is_remembered_while_a_replica_is_not_ready() -> None:
    rack = Rack(replica("r0", state=ReplicaState.UNREADY))
    rack.fleet.note_foreign("r0", 1, 0.0)
    rack.fleet.put(replica("r0"))
    assert not rack.fleet.can_start(ANYWHERE)
    assert rack.fleet.drop_stale(FRESH_S)
    assert rack.fleet.can_start(ANYWHERE)
