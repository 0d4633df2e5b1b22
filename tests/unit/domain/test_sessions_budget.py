"""Budgets of sessions: set once, reserved by what runs, spent by what is over (ORCH-3099)."""

import pytest

from llorch.domain.ledger import Ledger
from llorch.domain.limits import Claim, Use
from llorch.domain.sessions import SessionLimits
from llorch.domain.task import Budgets, Fault, Priority, TaskKey, TaskSpec
from llorch.errors import BudgetExhausted, BudgetTooSmall, InvalidParams

SESSION = ("acme", "s")
CLAIM = Claim(prompt_tokens=10, expected_tokens=20, max_tokens=40, time_s=600.0, cost=2.0)
NOTHING = Use(0, 0, 0.0, 0.0)
TTL_S = 100.0


def key(name: str) -> TaskKey:
    return "acme", name


def ledger(turns: int = 100) -> Ledger:
    return Ledger(SessionLimits(ttl_s=TTL_S, turns=turns))


def spec(name: str, budgets: Budgets | None = None) -> TaskSpec:
    return TaskSpec(key(name), SESSION, Priority.INTERACTIVE, max_tokens=40, expected_tokens=20, budgets=budgets)


def admit(book: Ledger, name: str, budgets: Budgets | None = None, *, claim: Claim = CLAIM, now: float = 0.0) -> bool:
    if book.refusal(spec(name, budgets), claim, now) is not None:
        return False
    book.reserve(spec(name, budgets), claim, now)
    return True


def refusal(book: Ledger, *, budgets: Budgets | None = None, claim: Claim = CLAIM, now: float = 0.0) -> Fault:
    fault = book.refusal(spec("asks", budgets), claim, now)
    assert fault is not None
    return fault


def test_peer_bug_07_tasks_of_a_session_cannot_reserve_more_than_its_budget_together() -> None:
    book = ledger()
    admitted = [admit(book, f"t{number}", Budgets(tokens=220)) for number in range(10)]
    assert admitted == [True] * 4 + [False] * 6
    assert book.budgets_left(SESSION, 0.0) == Budgets(tokens=20)


def test_settled_task_leaves_spent_what_it_used_and_the_rest_free() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=200, time_s=700.0, cost=5.0))
    assert book.budgets_left(SESSION, 0.0) == Budgets(tokens=150, time_s=100.0, cost=3.0)
    book.settle_task(key("a"), Use(prompt_tokens=12, tokens_out=30, time_s=8.0, cost=1.25), 9.0)
    assert book.budgets_left(SESSION, 9.0) == Budgets(tokens=158, time_s=692.0, cost=3.75)
    assert book.outstanding() == []


def test_use_beyond_the_reservation_is_spent_all_the_same() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=60))
    book.settle_task(key("a"), Use(25, 40, 1.0, 0.0), 1.0)
    assert book.budgets_left(SESSION, 1.0) == Budgets(tokens=0)


@pytest.mark.parametrize(
    ("budgets", "label"),
    [
        (Budgets(tokens=60), "session-tokens"),
        (Budgets(time_s=50.0), "session-time"),
        (Budgets(cost=3.0), "session-cost"),
    ],
)
def test_spent_budget_comes_back_with_a_new_session_and_a_reserved_one_nobody_knows_when(
    budgets: Budgets, label: str
) -> None:
    book = ledger()
    assert admit(book, "a", budgets)
    held = refusal(book)
    book.settle_task(key("a"), Use(10, 40, 50.0, 2.0), 30.0)
    spent = refusal(book, now=30.0)
    assert (held.kind, held.policy_label, held.retry_after_ms) == (BudgetExhausted, label, None)
    assert (spent.kind, spent.policy_label, spent.retry_after_ms) == (BudgetExhausted, label, 70_000)
    assert book.refusal(spec("asks", budgets), CLAIM, 30.0 + 70.0) is None


def test_first_task_that_could_never_fit_makes_no_session() -> None:
    book = ledger()
    fault = refusal(book, budgets=Budgets(tokens=49))
    assert (fault.kind, fault.policy_label, fault.retry_after_ms) == (BudgetTooSmall, "session-tokens", None)
    assert len(book.sessions) == 0


@pytest.mark.parametrize(
    ("first", "later", "is_refused"),
    [
        (Budgets(tokens=500), None, False),
        (Budgets(tokens=500), Budgets(), False),
        (Budgets(tokens=500), Budgets(tokens=500), False),
        (Budgets(tokens=500), Budgets(tokens=501), True),
        (Budgets(tokens=500), Budgets(tokens=500, cost=9.0), True),
        (Budgets(tokens=500), Budgets(time_s=9.0), True),
        (None, Budgets(tokens=500), True),
        (Budgets(), Budgets(tokens=500), True),
        (Budgets(), None, False),
        (None, Budgets(), False),
    ],
)
def test_budgets_are_set_by_the_first_task_alone(
    first: Budgets | None, later: Budgets | None, is_refused: bool
) -> None:
    book = ledger()
    assert admit(book, "a", first)
    fault = book.refusal(spec("b", later), CLAIM, 0.0)
    assert (fault is not None and fault.kind is InvalidParams) is is_refused
    assert is_refused or fault is None


def test_turns_are_counted_beside_budgets() -> None:
    book = ledger(turns=2)
    assert admit(book, "a", Budgets(tokens=5000), now=0.0)
    assert admit(book, "b", now=1.0)
    fault = refusal(book, now=2.0)
    assert (fault.policy_label, fault.retry_after_ms) == ("session-turns", 99_000)


def test_task_may_run_only_for_the_time_its_session_has_left() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(time_s=700.0))
    assert admit(book, "b")
    assert [book.time_left_s(key(name)) for name in "ab"] == [600.0, 100.0]
    assert refusal(book).policy_label == "session-time"
    book.settle_task(key("a"), Use(10, 5, 20.0, 0.0), 20.0)
    assert admit(book, "c", now=20.0)
    assert book.time_left_s(key("c")) == 580.0


def test_task_of_a_session_without_a_time_budget_has_no_time_of_its_own() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=500))
    assert book.time_left_s(key("a")) is None
    assert book.time_left_s(key("unheard of")) is None


def test_remnant_of_time_too_short_to_run_in_counts_as_spent() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(time_s=10.0))
    book.settle_task(key("a"), Use(1, 1, 9.9995, 0.0), 10.0)
    fault = refusal(book, now=10.0)
    assert (fault.policy_label, fault.retry_after_ms) == ("session-time", 90_000)


def test_task_that_was_requeued_several_times_is_charged_once_for_all_its_runs() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=100, time_s=700.0))
    for _ in range(3):
        lease = book.hold_slot("r0", task=key("a"))
        book.settle_slot(lease.attempt_id)
        book.requeue(key("a"))
        assert book.budgets_left(SESSION, 0.0) == Budgets(tokens=50, time_s=100.0)
    book.settle_task(key("a"), Use(10, 30, 12.0, 0.0), 12.0)
    assert book.budgets_left(SESSION, 12.0) == Budgets(tokens=60, time_s=688.0)


def test_session_does_not_expire_before_its_reservations_are_settled() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=60))
    assert book.budgets_left(SESSION, TTL_S + 50.0) == Budgets(tokens=10)
    fault = refusal(book, now=TTL_S + 50.0)
    assert (fault.policy_label, fault.retry_after_ms) == ("session-tokens", None)
    book.settle_task(key("a"), Use(10, 40, 1.0, 0.0), TTL_S + 60.0)
    assert book.sessions.get(SESSION, TTL_S + 60.0) is None
    assert len(book.sessions) == 0


def test_overdue_session_lives_on_with_a_new_task() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=200))
    assert admit(book, "b", now=TTL_S + 50.0)
    book.settle_task(key("a"), Use(10, 40, 1.0, 0.0), TTL_S + 60.0)
    book.settle_task(key("b"), Use(10, 40, 1.0, 0.0), TTL_S + 70.0)
    session = book.sessions.get(SESSION, TTL_S + 140.0)
    assert session is not None
    assert (session.turns, session.expires_at) == (2, TTL_S + 50.0 + TTL_S)
    assert book.budgets_left(SESSION, TTL_S + 140.0) == Budgets(tokens=100)


def test_leases_of_a_deleted_session_settle_into_nothing() -> None:
    book = ledger()
    assert admit(book, "old", Budgets(tokens=60))
    book.sessions.forget(SESSION)
    assert book.budgets_left(SESSION, 1.0) is None
    assert admit(book, "new", Budgets(tokens=60), now=1.0)
    book.settle_task(key("old"), Use(10, 40, 1.0, 0.0), 2.0)
    assert book.budgets_left(SESSION, 2.0) == Budgets(tokens=10)
    book.settle_task(key("new"), NOTHING, 3.0)
    assert book.budgets_left(SESSION, 3.0) == Budgets(tokens=60)
    assert list(book.check()) == []


def test_deleted_session_that_was_overdue_leaves_nothing_behind() -> None:
    book = ledger()
    assert admit(book, "a", Budgets(tokens=60))
    book.expire(TTL_S + 1.0)
    book.sessions.forget(SESSION)
    assert len(book.sessions) == 0
    book.settle_task(key("a"), NOTHING, TTL_S + 2.0)
    assert (len(book.sessions), book.outstanding()) == (0, [])


def test_session_without_budgets_keeps_no_lease_and_expires_at_its_time() -> None:
    book = ledger()
    assert admit(book, "a")
    assert (book.outstanding(), book.budgets_left(SESSION, 0.0)) == ([], None)
    assert book.sessions.get(SESSION, TTL_S) is None


def test_peer_bug_15_overdue_sessions_are_bounded_by_the_tasks_that_are_not_over() -> None:
    book = ledger()
    for number in range(200):
        now = float(number * 10)
        wish = TaskSpec(
            key(f"t{number}"), ("acme", f"s{number}"), Priority.BATCH, 40, 20, budgets=Budgets(tokens=60, cost=9.0)
        )
        assert book.refusal(wish, CLAIM, now) is None
        book.reserve(wish, CLAIM, now)
        if number >= 20:
            book.settle_task(key(f"t{number - 20}"), NOTHING, now)
        assert len(book.sessions) <= 21
    assert list(book.check()) == []
