"""Leases of slots, and turns of sessions."""

from llorch.domain.ledger import Ledger, SessionLimits, Sessions
from llorch.errors import BudgetExhausted

KEY = ("acme", "s")


def test_slots_are_leased_from_the_lowest_free_number_under_new_attempt_ids() -> None:
    ledger = Ledger()
    first, second, other = ledger.hold_slot("r0"), ledger.hold_slot("r0"), ledger.hold_slot("r1")
    assert [lease.slot for lease in (first, second, other)] == [0, 1, 0]
    assert len({lease.attempt_id for lease in (first, second, other)}) == 3
    ledger.settle_slot(first.attempt_id)
    again = ledger.hold_slot("r0")
    assert again.slot == 0
    assert again.attempt_id > other.attempt_id


def test_releasing_slot_counts_as_busy_until_it_is_settled() -> None:
    ledger = Ledger()
    lease = ledger.hold_slot("r0")
    ledger.release_slot(lease.attempt_id)
    assert lease.releasing
    assert ledger.busy_slots("r0") == 1
    ledger.settle_slot(lease.attempt_id)
    assert ledger.busy_slots("r0") == 0


def test_peer_bug_05_settling_twice_does_not_free_a_slot_of_somebody_else() -> None:
    ledger = Ledger()
    first = ledger.hold_slot("r0")
    ledger.settle_slot(first.attempt_id)
    second = ledger.hold_slot("r0")
    ledger.settle_slot(first.attempt_id)
    ledger.release_slot(first.attempt_id)
    assert ledger.leases() == [second]
    assert not second.releasing


def test_session_is_pushed_out_by_every_turn_and_ends_at_its_time() -> None:
    """ORCH-2042."""
    sessions = Sessions(SessionLimits(ttl_s=10.0, turns=8))
    sessions.take_turn(KEY, 0.0)
    sessions.take_turn(KEY, 9.0)
    session = sessions.get(KEY, 18.9)
    assert session is not None
    assert (session.turns, session.expires_at) == (2, 19.0)
    assert sessions.get(KEY, 19.0) is None
    sessions.take_turn(KEY, 20.0)
    anew = sessions.get(KEY, 20.0)
    assert anew is not None
    assert anew.turns == 1


def test_session_id_of_another_tenant_is_another_session() -> None:
    sessions = Sessions(SessionLimits(turns=1))
    sessions.take_turn(("acme", "s"), 0.0)
    assert sessions.refusal(("other", "s"), 0.0) is None
    assert sessions.refusal(("acme", "s"), 0.0) is not None


def test_peer_bug_26_refusal_tells_the_time_that_is_left_of_this_session() -> None:
    sessions = Sessions(SessionLimits(ttl_s=10.0, turns=1))
    sessions.take_turn(("acme", "s"), 0.0)
    sessions.take_turn(("acme", "t"), 4.0)
    told = [sessions.refusal(("acme", name), 5.0) for name in "st"]
    assert [(fault.kind, fault.retry_after_ms) for fault in told if fault] == [
        (BudgetExhausted, 5000),
        (BudgetExhausted, 9000),
    ]


def test_asking_does_not_take_a_turn() -> None:
    sessions = Sessions(SessionLimits(turns=1))
    assert sessions.refusal(KEY, 0.0) is None
    assert sessions.get(KEY, 0.0) is None
    assert len(sessions) == 0


def test_peer_bug_15_sessions_are_bounded_by_what_was_accepted_within_one_ttl() -> None:
    """ORCH-2044."""
    sessions = Sessions(SessionLimits(ttl_s=10.0))
    for second in range(1000):
        sessions.take_turn(("acme", f"s{second}"), float(second))
        assert len(sessions) <= 10


def test_forgotten_session_may_be_forgotten_again() -> None:
    sessions = Sessions(SessionLimits())
    sessions.take_turn(KEY, 0.0)
    sessions.forget(KEY)
    sessions.forget(KEY)
    assert sessions.get(KEY, 0.0) is None


def test_peer_bug_15_replicas_without_leases_are_not_remembered() -> None:
    ledger = Ledger()
    for number in range(100):
        ledger.settle_slot(ledger.hold_slot(f"r{number}").attempt_id)
    assert ledger.leases() == []
    assert not ledger._slots
