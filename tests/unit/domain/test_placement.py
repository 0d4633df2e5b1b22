"""The order of the free replicas by itself, and the whole fleet against a scan over all replicas."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llorch.domain.ledger import Ledger
from llorch.domain.placement import Place, ReplicaSet
from llorch.domain.pool import FRESH_S, Fleet, Replica, ReplicaState
from llorch.domain.task import ANYWHERE, EXACT, Cohort, Need
from tests.unit.domain.desk import EXACT_COHORT, LOOSE_COHORT

OTHER_COHORT = Cohort("v2", None, exact=True)
COHORTS = [EXACT_COHORT, LOOSE_COHORT, OTHER_COHORT]
NEEDS = [ANYWHERE, EXACT, *(Need(exact=True, cohort=cohort) for cohort in COHORTS)]


# The order of one replica set


def place_of(replica_set: ReplicaSet, rank: int, slots: int = 1) -> Place:
    place = Place(f"r{rank}", rank, replica_set)
    place.slots = slots
    return place


def least(replica_set: ReplicaSet, need: Need = ANYWHERE) -> str | None:
    entry = replica_set.least(need)
    return None if entry is None else entry[3].replica_id


@pytest.mark.parametrize(
    ("cohort", "suited"),
    [
        (EXACT_COHORT, [ANYWHERE, EXACT, Need(exact=True, cohort=EXACT_COHORT)]),
        (LOOSE_COHORT, [ANYWHERE, Need(exact=True, cohort=LOOSE_COHORT)]),
    ],
)
def test_replica_set_suits_what_each_of_its_replicas_meets(cohort: Cohort, suited: list[Need]) -> None:
    replica_set = ReplicaSet(cohort)
    member = Replica("r0", "pool", 1, cohort)
    replica_set.update(place_of(replica_set, 0), 0)
    assert [need for need in NEEDS if replica_set.suits(need)] == suited
    assert [need for need in NEEDS if member.meets(need)] == suited
    assert [need for need in NEEDS if least(replica_set, need)] == suited


def test_order_follows_every_update_and_ends_with_the_last_withdrawal() -> None:
    replica_set = ReplicaSet(EXACT_COHORT)
    first, second = place_of(replica_set, 0, 2), place_of(replica_set, 1, 2)
    assert least(replica_set) is None
    for place in (second, first):
        replica_set.update(place, 0)
    assert (replica_set.free, least(replica_set)) == (2, "r0")
    first.work_s = 3.0
    replica_set.update(first, 1)
    assert (replica_set.free, least(replica_set)) == (2, "r1")
    replica_set.update(second, 2)
    assert (replica_set.free, least(replica_set)) == (1, "r0")
    replica_set.withdraw(first)
    replica_set.withdraw(first)
    assert (replica_set.free, least(replica_set)) == (0, None)
    replica_set.update(second, 1)
    assert (replica_set.free, least(replica_set)) == (1, "r1")


def touch(replica_set: ReplicaSet, place: Place) -> None:
    place.work_s += 1.0
    replica_set.update(place, 0)


def leave_and_return(replica_set: ReplicaSet, place: Place) -> None:
    replica_set.withdraw(place)
    replica_set.update(place, 0)


@pytest.mark.parametrize("change", [touch, leave_and_return])
def test_peer_bug_15_entries_that_no_longer_hold_do_not_pile_up(change: Callable[[ReplicaSet, Place], None]) -> None:
    """The first of the order stays where it is, so that what happens behind it never comes up."""
    replica_set = ReplicaSet(EXACT_COHORT)
    places = [place_of(replica_set, rank) for rank in range(20)]
    for rank, place in enumerate(places):
        place.work_s = float(rank)
        replica_set.update(place, 0)
    for number in range(5000):
        change(replica_set, places[1 + number % 19])
        assert replica_set.entries <= 2 * 20 + 65
    assert least(replica_set) == "r0"


# The fleet against a scan


@dataclass
class Known:
    """One replica as the model has it: what was told, what runs there, what its engine said last."""

    told: Replica
    is_there: bool = True
    work: dict[int, Fraction] = field(default_factory=dict)
    foreign: int = 0
    told_at: float = 0.0

    def taken(self, now: float) -> int:
        return len(self.work) + (self.foreign if now < self.told_at + FRESH_S else 0)

    def is_free(self, now: float) -> bool:
        return self.is_there and self.told.state is ReplicaState.READY and self.taken(now) < self.told.slots

    def load(self) -> Fraction:
        return sum(self.work.values(), Fraction(0)) / self.told.slots


IDS = st.sampled_from([f"r{number}" for number in range(6)])
STATES = st.sampled_from([*ReplicaState, *[ReplicaState.READY] * 10])
QUARTERS = st.integers(0, 40).map(lambda quarters: Fraction(quarters, 4))
SLOTS = st.sampled_from([1, 1, 2, 4])
"""Powers of two, as quarters of seconds divided by them are exact as floats too."""

SHORT = settings(
    max_examples=40, stateful_step_count=50, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(SHORT, max_examples=150, stateful_step_count=150)


class Placements(RuleBasedStateMachine):
    """Replicas come, change, fail and go; attempts start by choice and end in any order; engines tell their load."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.fleet = Fleet(self.ledger)
        self.known: dict[str, Known] = {}
        self.runs: dict[int, str] = {}
        self.now = 0.0

    @rule(replica_id=IDS, slots=SLOTS, cohort=st.sampled_from(COHORTS), state=STATES)
    def put(self, replica_id: str, slots: int, cohort: Cohort, state: ReplicaState) -> None:
        told = Replica(replica_id, "pool", slots, cohort, state, comes_back=slots == 2)
        self.fleet.put(told)
        known = self.known.setdefault(replica_id, Known(told))
        if not known.is_there:  # one that comes again is the last in order
            self.known[replica_id] = self.known.pop(replica_id)
        known.told, known.is_there = told, True

    @rule(replica_id=IDS)
    def remove(self, replica_id: str) -> None:
        """Perhaps with leases that are still held; they count if it comes again."""
        for _ in range(2):
            self.fleet.remove(replica_id)
        known = self.known.get(replica_id)
        if known is not None:
            known.is_there, known.foreign = False, 0

    @rule(replica_id=IDS)
    def suspect(self, replica_id: str) -> None:
        self.fleet.suspect(replica_id)
        known = self.known.get(replica_id)
        if known is not None and known.is_there and known.told.state is ReplicaState.READY:
            known.told = replace(known.told, state=ReplicaState.UNREADY)

    @rule(
        need=st.sampled_from([*NEEDS, ANYWHERE, EXACT]), prefer=st.none() | IDS, detour=QUARTERS, work=QUARTERS,
        burst=st.integers(1, 6),
    )  # fmt: skip
    def start(self, need: Need, prefer: str | None, detour: Fraction, work: Fraction, burst: int) -> None:
        for _ in range(burst):
            if not self.fleet.can_start(need):
                return
            expected = self.choice(need, prefer, detour)
            chosen = self.fleet.choose(need, prefer=prefer, detour_s=float(detour))
            assert chosen is self.known[expected].told
            lease = self.ledger.hold_slot(expected)
            self.fleet.take(expected, float(work))
            self.known[expected].work[lease.attempt_id] = work
            self.runs[lease.attempt_id] = expected

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 23), count=st.integers(1, 6))
    def end(self, which: int, count: int) -> None:
        for _ in range(min(count, len(self.runs))):
            attempt_id = list(self.runs)[which % len(self.runs)]
            replica_id = self.runs.pop(attempt_id)
            self.ledger.settle_slot(attempt_id)
            self.fleet.give_back(replica_id, float(self.known[replica_id].work.pop(attempt_id)))

    @rule(replica_id=IDS, foreign=st.integers(0, 5))
    def note_foreign(self, replica_id: str, foreign: int) -> None:
        self.fleet.note_foreign(replica_id, foreign, self.now)
        if replica_id in self.known and self.known[replica_id].is_there:
            self.known[replica_id].foreign, self.known[replica_id].told_at = foreign, self.now

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.5, 6.0]))
    def let_time_pass(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        assert self.fleet.drop_stale(self.now) is any(
            known.foreign and before < known.told_at + FRESH_S <= self.now for known in self.known.values()
        )

    def choice(self, need: Need, prefer: str | None, detour: Fraction) -> str:
        free = [known for known in self.known.values() if known.is_free(self.now) and known.told.meets(need)]
        best = min(free, key=lambda known: (known.load(), Fraction(known.taken(self.now), known.told.slots)))
        near = [known for known in free if known.told.replica_id == prefer and known.load() - best.load() <= detour]
        return (near or [best])[0].told.replica_id

    @invariant()
    def agrees_with_a_scan(self) -> None:
        told = [known.told for known in self.known.values() if known.is_there]
        assert list(self.fleet) == told
        ready = [known for known in told if known.state is ReplicaState.READY]
        assert self.fleet.ready_slots == sum(known.slots for known in ready)
        assert self.fleet.ready_count == len(ready)
        free = [known.told for known in self.known.values() if known.is_free(self.now)]
        assert self.fleet.has_free is bool(free)
        for need in NEEDS:
            assert self.fleet.can_start(need) is any(known.meets(need) for known in free)
            assert self.fleet.ready(need) is any(known.meets(need) for known in ready)
            assert self.fleet.can_serve(need) is any(known.meets(need) and known.may_serve for known in told)
            if self.fleet.can_start(need):
                assert self.fleet.choose(need).replica_id == self.choice(need, None, Fraction(0))

    @invariant()
    def agrees_with_the_ledger(self) -> None:
        for replica_id, known in self.known.items():
            assert self.ledger.busy_slots(replica_id) == len(known.work)
            assert self.fleet.work_s(replica_id) == float(sum(known.work.values()))
        fresh = [k.told_at + FRESH_S for k in self.known.values() if k.foreign and self.now < k.told_at + FRESH_S]
        assert self.fleet.next_stale() == min(fresh, default=None)


def test_fleet_agrees_with_a_scan_over_all_replicas_in_random_histories() -> None:
    """ORCH-3010, ORCH-3140, ORCH-3145."""
    run_state_machine_as_test(Placements, settings=SHORT)


@pytest.mark.prove
def test_fleet_agrees_with_a_scan_over_all_replicas_in_many_random_histories() -> None:
    run_state_machine_as_test(Placements, settings=LONG)
