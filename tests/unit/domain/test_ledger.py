"""Leases of slots, turns of sessions, and quotas of tenants."""

import pytest

from llorch.domain.ledger import Ledger, SlotLease
from llorch.domain.limits import Claim, Use
from llorch.domain.policy import Quota, Rate
from llorch.domain.sessions import SessionLimits, Sessions
from llorch.domain.task import Budgets, Fault, Priority, TaskKey, TaskSpec
from llorch.errors import BudgetExhausted, Conflict, QuotaExceeded

KEY = ("acme", "s")
CLAIM = Claim(prompt_tokens=10, expected_tokens=20, max_tokens=40, time_s=600.0, cost=2.0)
NOTHING = Use(0, 0, 0.0, 0.0)
ALL_LIMITS = Quota(
    max_queued=2,
    max_concurrent=2,
    rate={Priority.INTERACTIVE: Rate(1.0, 4.0)},
    tokens_per_minute=120,
    kv_tokens=100,
)


def key(name: str, tenant: str = "acme") -> TaskKey:
    return tenant, name


def spec(name: str, tenant: str = "acme", *, budgets: Budgets | None = None) -> TaskSpec:
    return TaskSpec((tenant, name), (tenant, f"session of {name}"), Priority.INTERACTIVE, 40, 20, budgets=budgets)


def ask(ledger: Ledger, name: str, tenant: str = "acme", *, claim: Claim = CLAIM, now: float = 0.0) -> Fault | None:
    return ledger.refusal(spec(name, tenant), claim, now)


def admit(ledger: Ledger, name: str, tenant: str = "acme", *, claim: Claim = CLAIM, now: float = 0.0) -> bool:
    if ask(ledger, name, tenant, claim=claim, now=now) is not None:
        return False
    ledger.reserve(spec(name, tenant), claim, now)
    return True


def start(ledger: Ledger, name: str, tenant: str = "acme", *, kv_tokens: int = 10) -> SlotLease:
    assert ledger.can_start(tenant, kv_tokens)
    return ledger.hold_slot("r0", task=key(name, tenant), kv_tokens=kv_tokens)


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


@pytest.mark.parametrize(
    ("busy", "given_back", "prefer", "slot", "then"),
    [
        (0, (), 0, 0, [1, 2, 3]),
        (0, (), 2, 2, [0, 1, 3]),
        (2, (), 0, 2, [3, 4, 5]),
        (3, (1,), 1, 1, [3, 4, 5]),
        (3, (0, 2), 2, 2, [0, 3, 4]),
        (3, (0, 1, 2), None, 0, [1, 2, 3]),
        (3, (0, 1), 4, 4, [0, 1, 3]),
    ],
)
def test_preferred_slot_is_leased_if_it_is_free_and_else_the_lowest(
    busy: int, given_back: tuple[int, ...], prefer: int | None, slot: int, then: list[int]
) -> None:
    ledger = Ledger()
    held = [ledger.hold_slot("r0") for _ in range(busy)]
    for number in given_back:
        ledger.settle_slot(held[number].attempt_id)
    assert ledger.hold_slot("r0", prefer=prefer).slot == slot
    assert [ledger.hold_slot("r0").slot for _ in range(3)] == then


def test_peer_bug_06_refused_submission_consumes_no_limit() -> None:
    ledger = Ledger(default=ALL_LIMITS)
    assert admit(ledger, "a")
    assert admit(ledger, "b")
    before = ledger.outstanding()
    for number in range(50):
        fault = ask(ledger, f"refused {number}")
        assert fault is not None
        assert fault.policy_label == "max-queued"
    assert ledger.outstanding() == before
    assert len(ledger.sessions) == 2
    ledger.settle_task(key("a"), NOTHING, 0.0)
    ledger.settle_task(key("b"), NOTHING, 0.0)
    assert [admit(ledger, name) for name in "cdef"] == [True, True, False, False]
    assert ledger.outstanding() == [
        (key("c"), "max-queued", 1), (key("c"), "tokens-per-minute", 30),
        (key("d"), "max-queued", 1), (key("d"), "tokens-per-minute", 30),
    ]  # fmt: skip


def test_peer_bug_06_asking_makes_no_accounts() -> None:
    ledger = Ledger(default=ALL_LIMITS)
    for number in range(50):
        assert ask(ledger, "a", f"tenant {number}") is None
        assert ledger.can_start(f"tenant {number}", 10)
    assert not ledger._tenants


@pytest.mark.parametrize(
    ("quota", "label", "admitted"),
    [
        (Quota(max_queued=3), "max-queued", 3),
        (Quota(rate={Priority.INTERACTIVE: Rate(1.0, 5.0)}), "rate", 5),
        (Quota(tokens_per_minute=100), "tokens-per-minute", 3),
    ],
)
def test_peer_bug_07_submissions_at_one_time_cannot_overrun_a_quota(quota: Quota, label: str, admitted: int) -> None:
    ledger = Ledger(quotas={"acme": quota})
    assert [admit(ledger, f"t{number}") for number in range(10)] == [True] * admitted + [False] * (10 - admitted)
    fault = ask(ledger, "one more")
    assert fault is not None
    assert (fault.kind, fault.policy_label) == (QuotaExceeded, label)
    assert admit(ledger, "a", "other tenant")


def test_peer_bug_05_task_that_is_over_leaves_nothing_held_whatever_is_told_twice() -> None:
    ledger = Ledger(SessionLimits(turns=100), default=ALL_LIMITS)
    for number in range(100):
        now = number * 60.0
        assert admit(ledger, "a", now=now), "a leak has locked the tenant out"
        lease = start(ledger, "a", kv_tokens=100)
        ledger.release_slot(lease.attempt_id)
        for _ in range(2):
            ledger.settle_slot(lease.attempt_id)
        for _ in range(2):
            ledger.settle_task(key("a"), Use(10, 20, 1.0, 1.0), now)
        assert (ledger.outstanding(), ledger.leases(), list(ledger.check())) == ([], [], [])


@pytest.mark.parametrize("is_settled_first", [True, False])
def test_slot_holds_its_limits_until_the_engine_let_go_whichever_is_settled_first(is_settled_first: bool) -> None:
    ledger = Ledger(default=ALL_LIMITS)
    assert admit(ledger, "a")
    lease = start(ledger, "a", kv_tokens=60)
    if is_settled_first:
        ledger.settle_task(key("a"), Use(10, 5, 1.0, 1.0), 1.0)
        assert ledger.outstanding() == [(key("a"), "max-concurrent", 1), (key("a"), "kv-tokens", 60)]
        ledger.settle_slot(lease.attempt_id)
    else:
        ledger.settle_slot(lease.attempt_id)
        assert ledger.outstanding() == [(key("a"), "tokens-per-minute", 30)]
        ledger.settle_task(key("a"), Use(10, 5, 1.0, 1.0), 1.0)
    assert ledger.outstanding() == []
    ledger.expire(3600.0)
    assert not ledger._tenants


def test_started_task_gives_its_place_up_and_a_requeued_one_takes_it_even_if_there_is_none() -> None:
    ledger = Ledger(default=Quota(max_queued=1))
    assert admit(ledger, "a")
    lease = start(ledger, "a")
    assert admit(ledger, "b")
    ledger.settle_slot(lease.attempt_id)
    for _ in range(2):
        ledger.requeue(key("a"))
    assert ledger.outstanding() == [(key("a"), "max-queued", 1), (key("b"), "max-queued", 1)]
    ledger.settle_task(key("b"), NOTHING, 0.0)
    assert not admit(ledger, "c")
    start(ledger, "a")
    assert admit(ledger, "c")


def test_tenant_at_its_most_attempts_is_kept_from_starting_and_told_when_one_ends() -> None:
    ledger = Ledger(default=Quota(max_concurrent=1))
    assert admit(ledger, "a")
    assert admit(ledger, "b")
    lease = start(ledger, "a")
    assert ledger.take_lifted() == []
    assert not ledger.can_start("acme", 10)
    assert ledger.can_start("other", 10)
    ledger.release_slot(lease.attempt_id)
    assert not ledger.can_start("acme", 10)
    ledger.settle_slot(lease.attempt_id)
    assert ledger.take_lifted() == ["acme"]
    assert ledger.take_lifted() == []
    start(ledger, "b")


def test_end_of_an_attempt_that_kept_nobody_waiting_lifts_nothing() -> None:
    ledger = Ledger(default=Quota(max_concurrent=2))
    assert admit(ledger, "a")
    ledger.settle_slot(start(ledger, "a").attempt_id)
    assert ledger.take_lifted() == []


def test_attempt_bigger_than_the_whole_kv_quota_runs_alone() -> None:
    ledger = Ledger(default=Quota(kv_tokens=100))
    for name in "abc":
        assert admit(ledger, name)
    small = start(ledger, "a", kv_tokens=40)
    assert not ledger.can_start("acme", 500)
    ledger.settle_slot(small.attempt_id)
    big = start(ledger, "b", kv_tokens=500)
    assert not ledger.can_start("acme", 1)
    ledger.settle_slot(big.attempt_id)
    assert ledger.take_lifted() == ["acme"]
    assert ledger.can_start("acme", 1)


def test_claim_bigger_than_the_whole_bucket_is_admitted_when_it_is_full_and_paid_off_afterwards() -> None:
    ledger = Ledger(default=Quota(tokens_per_minute=60))
    huge = Claim(prompt_tokens=100, expected_tokens=80, max_tokens=80, time_s=60.0, cost=0.0)
    assert admit(ledger, "a", claim=huge)
    fault = ask(ledger, "b", claim=huge)
    assert fault is not None
    assert fault.retry_after_ms == 180_000
    assert not admit(ledger, "b", claim=huge, now=179.0)
    assert admit(ledger, "b", claim=huge, now=180.0)


def test_tokens_that_were_not_used_come_back_and_overshoot_is_a_debt() -> None:
    """ORCH-3077."""
    ledger = Ledger(default=Quota(tokens_per_minute=60))
    claims = Claim(prompt_tokens=20, expected_tokens=40, max_tokens=400, time_s=60.0, cost=0.0)
    assert admit(ledger, "a", claim=claims)
    ledger.settle_task(key("a"), Use(20, 10, 1.0, 0.0), 0.0)
    frugal = ask(ledger, "b", claim=claims)
    assert admit(ledger, "b", claim=claims, now=30.0)
    ledger.settle_task(key("b"), Use(20, 100, 1.0, 0.0), 30.0)
    lavish = ask(ledger, "c", claim=claims, now=30.0)
    assert frugal is not None
    assert lavish is not None
    assert (frugal.retry_after_ms, lavish.retry_after_ms) == (30_000, 120_000)


def test_own_quota_takes_the_place_of_the_default_one_as_a_whole() -> None:
    ledger = Ledger(quotas={"free": Quota(), "big": Quota(max_queued=2)}, default=Quota(max_queued=1))
    admitted = {tenant: [admit(ledger, name, tenant) for name in "abc"] for tenant in ("free", "big", "other")}
    assert admitted == {"free": [True] * 3, "big": [True, True, False], "other": [True, False, False]}


def test_task_id_whose_earlier_task_is_still_being_stopped_reserves_nothing() -> None:
    ledger = Ledger(default=ALL_LIMITS)
    assert admit(ledger, "a")
    lease = start(ledger, "a")
    before = ledger.outstanding()
    fault = ask(ledger, "a")
    assert fault is not None
    assert fault.kind is Conflict
    assert ledger.outstanding() == before
    ledger.settle_slot(lease.attempt_id)
    ledger.settle_task(key("a"), NOTHING, 0.0)
    assert admit(ledger, "a")


def test_tenant_without_quota_in_a_session_without_budgets_leaves_no_lease() -> None:
    ledger = Ledger(quotas={"other": ALL_LIMITS})
    assert admit(ledger, "a")
    lease = start(ledger, "a")
    ledger.requeue(key("a"))
    assert (lease.lease, ledger.outstanding()) == (None, [])
    ledger.settle_slot(lease.attempt_id)
    ledger.settle_task(key("a"), Use(1, 1, 1.0, 1.0), 0.0)
    assert not ledger._tenants
    assert not ledger._tasks


@pytest.mark.parametrize(
    "quota",
    [ALL_LIMITS, Quota(max_queued=9), Quota(max_concurrent=9), Quota(rate={Priority.INTERACTIVE: Rate(9.0, 9.0)})],
)
def test_peer_bug_15_accounts_of_idle_tenants_are_forgotten(quota: Quota) -> None:
    ledger = Ledger(SessionLimits(ttl_s=10.0), default=quota)
    for number in range(500):
        tenant, now = f"tenant {number}", float(number)
        assert admit(ledger, "a", tenant, now=now)
        ledger.settle_slot(start(ledger, "a", tenant).attempt_id)
        ledger.settle_task(key("a", tenant), Use(10, 20, 1.0, 1.0), now)
        assert len(ledger._tenants) == len(ledger._resting) <= 62
    ledger.expire(1000.0)
    assert (len(ledger._tenants), len(ledger._resting), len(ledger.sessions)) == (0, 0, 0)


def test_accounts_in_debt_outlive_the_idle_time() -> None:
    ledger = Ledger(default=Quota(tokens_per_minute=60))
    assert admit(ledger, "a")
    ledger.settle_task(key("a"), Use(10, 600, 1.0, 1.0), 0.0)
    ledger.expire(500.0)
    fault = ask(ledger, "b", now=500.0)
    assert fault is not None
    assert fault.retry_after_ms == 80_000
    ledger.expire(610.0)
    assert not ledger._tenants


def test_reservations_are_right_while_the_clock_stands_still() -> None:
    ledger = Ledger(default=ALL_LIMITS)
    for number in range(4):
        assert admit(ledger, "a", now=5.0), number
        lease = start(ledger, "a")
        ledger.settle_slot(lease.attempt_id)
        ledger.settle_task(key("a"), NOTHING, 5.0)
    fault = ask(ledger, "a", now=5.0)
    assert fault is not None
    assert (fault.policy_label, fault.retry_after_ms) == ("rate", 1000)
    assert (ledger.outstanding(), list(ledger.check())) == ([], [])
