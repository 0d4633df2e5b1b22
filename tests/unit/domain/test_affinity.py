"""Where sessions were served last, and what is still warm there."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from llorch.domain.affinity import Bindings
from llorch.domain.task import SessionKey

A, B, C = ("acme", "a"), ("acme", "b"), ("other", "a")
TTL_S = 60.0


def bound_in_turn(*sessions: SessionKey, limit: int = 10) -> Bindings:
    """Each session in slot 0 of a replica of its own, a second apart from 0 on."""
    bindings = Bindings(limit)
    for number, session in enumerate(sessions):
        bindings.bind(session, f"r{number}", 0, number + TTL_S)
    return bindings


def test_session_is_bound_to_where_it_was_served_last_until_its_time_is_up() -> None:
    """ORCH-3009."""
    bindings = bound_in_turn(A)
    assert bindings.bound(A, 0.0) == ("r0", 0)
    bindings.bind(A, "r1", 3, 90.0)
    assert bindings.bound(A, 89.9) == ("r1", 3)
    assert bindings.bound(B, 89.9) is None
    assert bindings.bound(A, 90.0) is None
    assert len(bindings) == 0


def test_sessions_of_two_tenants_with_one_name_are_two() -> None:
    bindings = bound_in_turn(A, C)
    assert (bindings.bound(A, 1.0), bindings.bound(C, 1.0)) == (("r0", 0), ("r1", 0))


def test_slot_is_warm_for_the_session_that_used_it_last_and_for_no_other() -> None:
    """ORCH-3022."""
    bindings = bound_in_turn(A)
    assert bindings.is_warm(A, "r0", 0)
    assert not bindings.is_warm(B, "r0", 0)
    assert not bindings.is_warm(A, "r0", 1)
    assert not bindings.is_warm(A, "r1", 0)
    bindings.bind(B, "r0", 0, TTL_S)
    assert bindings.is_warm(B, "r0", 0)
    assert not bindings.is_warm(A, "r0", 0)
    assert bindings.bound(A, 1.0) == ("r0", 0), "it may go back to where others are warm now"


def test_session_that_moved_is_warm_at_its_new_place_alone() -> None:
    bindings = bound_in_turn(A)
    bindings.bind(A, "r0", 1, TTL_S)
    assert bindings.is_warm(A, "r0", 1)
    assert not bindings.is_warm(A, "r0", 0)


def test_lost_replica_is_cold_and_its_sessions_stay_bound_to_it() -> None:
    """ORCH-3023: so that a repin can be told from a first visit."""
    bindings = bound_in_turn(A, B)
    bindings.lose("r0")
    bindings.lose("r0")
    assert not bindings.is_warm(A, "r0", 0)
    assert bindings.is_warm(B, "r1", 0)
    assert bindings.bound(A, 1.0) == ("r0", 0)
    bindings.bind(A, "r0", 0, TTL_S)
    assert bindings.is_warm(A, "r0", 0)


def test_forgotten_session_names_the_slot_to_evict_only_while_the_slot_is_still_its_own() -> None:
    bindings = bound_in_turn(A, B)
    assert bindings.forget(A) == ("r0", 0)
    assert bindings.forget(A) is None
    assert bindings.bound(A, 1.0) is None
    bindings.bind(C, "r1", 0, TTL_S)
    assert bindings.forget(B) is None, "another session's cache must not be thrown away"
    assert bindings.is_warm(C, "r1", 0)
    bindings.lose("r1")
    assert bindings.forget(C) is None


def test_peer_bug_15_bindings_are_bounded_and_the_one_bound_longest_ago_goes_first() -> None:
    bindings = bound_in_turn(A, B, limit=2)
    bindings.bind(A, "r0", 0, 2 + TTL_S)
    bindings.bind(C, "r2", 0, 3 + TTL_S)
    assert bindings.bound(B, 3.0) is None
    assert not bindings.is_warm(B, "r1", 0)
    assert (bindings.bound(A, 3.0), bindings.bound(C, 3.0)) == (("r0", 0), ("r2", 0))
    for number in range(1000):
        bindings.bind(("acme", f"s{number}"), f"r{number % 7}", number % 5, 4 + TTL_S)
        assert len(bindings) == 2
        assert bindings.owned_slots <= 2


def test_peer_bug_15_sessions_whose_time_is_up_are_dropped_without_being_asked_for() -> None:
    bindings = bound_in_turn(*[("acme", f"s{number}") for number in range(100)], limit=1000)
    assert bindings.bound(A, 49 + TTL_S) is None
    assert (len(bindings), bindings.owned_slots) == (50, 50)
    assert bindings.bound(A, 99 + TTL_S) is None
    assert (len(bindings), bindings.owned_slots) == (0, 0)


@pytest.mark.parametrize("now", [10.0, 11.0])
def test_session_bound_for_a_shorter_time_than_its_elders_is_not_bound_longer(now: float) -> None:
    bindings = bound_in_turn(A)
    bindings.bind(B, "r1", 0, 10.0)
    assert bindings.bound(B, now) is None
    assert bindings.bound(A, now) == ("r0", 0)


def test_limit_of_zero_binds_nothing() -> None:
    bindings = bound_in_turn(A, limit=0)
    assert bindings.bound(A, 0.0) is None
    assert (len(bindings), bindings.owned_slots) == (0, 0)
    assert not bindings.is_warm(A, "r0", 0)


SESSIONS = st.sampled_from([("acme", f"s{number}") for number in range(7)])
REPLICAS = st.sampled_from(["r0", "r1"])
SLOTS = st.integers(0, 2)
LIMIT = 4


class Visits(RuleBasedStateMachine):
    """Against the plain story: who was bound where and when, and who used each slot last."""

    def __init__(self) -> None:
        super().__init__()
        self.bindings = Bindings(LIMIT)
        self.limit = LIMIT
        self.bound: dict[SessionKey, tuple[str, int, float]] = {}
        self.last_user: dict[tuple[str, int], SessionKey] = {}
        self.now = 0.0

    @rule(session=SESSIONS, replica_id=REPLICAS, slot=SLOTS)
    def bind(self, session: SessionKey, replica_id: str, slot: int) -> None:
        self.bindings.bind(session, replica_id, slot, self.now + TTL_S)
        self.bound.pop(session, None)
        self.bound[session] = (replica_id, slot, self.now + TTL_S)
        self.last_user[replica_id, slot] = session
        self.keep_within_limit()

    def keep_within_limit(self) -> None:
        while len(self.bound) > self.limit:
            del self.bound[next(iter(self.bound))]

    @rule(limit=st.sampled_from([LIMIT, LIMIT, 2, 0]))
    def resize(self, limit: int) -> None:
        self.limit = limit
        self.bindings.resize(limit)
        self.keep_within_limit()

    @rule(session=SESSIONS)
    def forget(self, session: SessionKey) -> None:
        expected = self.place(session) if self.is_warm(session) else None
        assert self.bindings.forget(session) == expected
        self.bound.pop(session, None)

    @rule(replica_id=REPLICAS)
    def lose(self, replica_id: str) -> None:
        self.bindings.lose(replica_id)
        self.last_user = {place: session for place, session in self.last_user.items() if place[0] != replica_id}

    @rule(seconds=st.sampled_from([1.0, 20.0, TTL_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        self.bound = {session: binding for session, binding in self.bound.items() if binding[2] > self.now}
        self.bindings.bound(("nobody", ""), self.now)

    def place(self, session: SessionKey) -> tuple[str, int] | None:
        return self.bound[session][:2] if session in self.bound else None

    def is_warm(self, session: SessionKey) -> bool:
        place = self.place(session)
        return place is not None and self.last_user.get(place) == session

    @invariant()
    def agrees_with_the_story(self) -> None:
        warm = 0
        for session in [("acme", f"s{number}") for number in range(7)]:
            place = self.place(session)
            assert self.bindings.bound(session, self.now) == place
            if place is not None:
                assert self.bindings.is_warm(session, *place) is self.is_warm(session)
                warm += self.is_warm(session)
        assert len(self.bindings) == len(self.bound)
        assert self.bindings.owned_slots == warm


def test_bindings_agree_with_the_plain_story_in_random_histories() -> None:
    run_state_machine_as_test(
        Visits,
        settings=settings(
            max_examples=25, stateful_step_count=40, derandomize=True, database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
