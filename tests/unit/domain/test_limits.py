"""Accounts and leases: what fits, what is told of the wait, and what comes back."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.limits import Bucket, Budget, Claim, Gauge, Lease, Measure, SessionBudgets, TenantAccounts, Use
from llorch.domain.policy import NO_QUOTA, Quota, Rate
from llorch.domain.task import Budgets, Fault, Priority
from llorch.errors import BudgetTooSmall, QuotaExceeded

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
OWNER, SESSION = ("acme", "a"), ("acme", "s")
CLAIM = Claim(prompt_tokens=10, expected_tokens=20, max_tokens=50, time_s=60.0, cost=1.5)
NOTHING = Use(0, 0, 0.0, 0.0)


def lease() -> Lease:
    return Lease(OWNER, None)


def told(fault: Fault | None) -> tuple[str | None, int | None] | None:
    return None if fault is None else (fault.policy_label, fault.retry_after_ms)


@pytest.mark.parametrize(
    ("limit", "held", "amount", "fits"),
    [
        (2, 0, 1, True),
        (2, 1, 1, True),
        (2, 2, 1, False),
        (100, 60, 40, True),
        (100, 60, 41, False),
        (100, 0, 500, True),  # bigger than all: alone
        (100, 1, 500, False),
        (100, 500, 1, False),
        (0, 0, 1, False),
    ],
)
def test_gauge_has_room_up_to_its_limit(limit: int, held: int, amount: int, fits: bool) -> None:
    gauge = Gauge("kv-tokens", limit)
    gauge.lend(lease(), held)
    assert gauge.fits(amount) is fits


def bucket(per_s: float = 2.0, burst: float = 10.0) -> Bucket:
    return Bucket("rate", Measure.TOKENS, per_s, burst)


@pytest.mark.parametrize(
    ("spent", "after_s", "amount", "wait_s"),
    [
        (0, 0, 10, 0.0),
        (4, 0, 6, 0.0),
        (4, 0, 7, 0.5),
        (10, 0, 1, 0.5),
        (10, 5, 10, 0.0),
        (10, 4, 10, 1.0),
        (10, 1000, 10, 0.0),
        (0, 0, 500, 0.0),  # bigger than the whole bucket: admitted when it is full
        (1, 0, 500, 0.5),
        (500, 0, 1, 245.5),  # and paid off before anything else
        (500, 245.5, 1, 0.0),
    ],
)
def test_bucket_tells_how_long_to_wait(spent: float, after_s: float, amount: float, wait_s: float) -> None:
    taken = bucket()
    taken.spend(spent, 7.0)
    assert taken.wait_s(amount, 7.0 + after_s) == wait_s


@pytest.mark.parametrize(("per_s", "burst"), [(0.0, 5.0), (5.0, 0.0), (0.0, 0.0)])
def test_bucket_that_holds_or_gets_nothing_lets_nothing_in(per_s: float, burst: float) -> None:
    assert bucket(per_s, burst).wait_s(1, 0.0) == inf


def test_bucket_gives_no_more_than_its_burst_for_time_in_which_it_was_full() -> None:
    taken = bucket()
    for _ in range(10):
        assert taken.wait_s(1, 1000.0) == 0.0
        taken.spend(1, 1000.0)
    assert taken.wait_s(1, 1000.0) == 0.5


@pytest.mark.parametrize(("used", "wait_s"), [(0, 0.0), (4, 2.0), (10, 5.0), (30, 15.0)])
def test_settled_bucket_is_charged_with_the_true_use(used: float, wait_s: float) -> None:
    """ORCH-3077: what was not used comes back; what was used beyond the reservation is a debt."""
    taken = bucket()
    taken.lend(lease(), 10, 0.0)
    taken.settle(10, used, 0.0)
    assert taken.wait_s(10, 0.0) == wait_s


def test_refund_after_the_bucket_has_refilled_gives_no_credit_beyond_the_burst() -> None:
    taken = bucket()
    taken.lend(lease(), 10, 0.0)
    taken.settle(10, 0, 60.0)
    taken.spend(10, 60.0)
    assert taken.wait_s(1, 60.0) == 0.5


@given(
    per_s=st.floats(0.01, 1e5), burst=st.floats(0.1, 1e7), now=st.floats(0, 1e7),
    amounts=st.lists(st.floats(0.01, 1e6), max_size=20),
)  # fmt: skip
def test_who_comes_back_after_the_time_told_is_let_in(
    per_s: float, burst: float, now: float, amounts: list[float]
) -> None:
    taken = bucket(per_s, burst)
    for amount in amounts:
        wait_s = taken.wait_s(amount, now)
        assert wait_s >= 0.0
        now += wait_s
        assert taken.wait_s(amount, now) == 0.0
        taken.spend(amount, now)


def test_whole_burst_can_be_taken_one_by_one_whatever_the_rounding() -> None:
    taken = bucket(per_s=3.0, burst=10.0)
    for _ in range(10):
        assert taken.wait_s(1, 12345.678) == 0.0
        taken.spend(1, 12345.678)
    assert taken.wait_s(1, 12345.678) > 0.3


def test_budget_keeps_no_crumbs_of_reservations_that_have_ended() -> None:
    budget = Budget("session-cost", Measure.COST, 1.0)
    for amount in (0.1, 0.2, 0.3):
        budget.lend(lease(), amount)
    for amount in (0.3, 0.1, 0.2):
        budget.settle(amount, 0.0, 0.0)
    assert (budget.reserved, budget.left) == (0.0, 1.0)


def test_budget_can_be_spent_to_its_last_tenth_whatever_the_rounding() -> None:
    budgets = SessionBudgets(SESSION, Budgets(cost=0.3))
    for _ in range(3):
        claim = Claim(1, 1, 1, 1.0, 0.1)
        assert budgets.refusal(claim, 100.0, 0.0) is None
        taken = Lease(OWNER, None, budgets)
        budgets.reserve(taken, claim)
        taken.settle(Use(1, 1, 1.0, 0.1), 0.0)
    assert budgets.refusal(Claim(1, 1, 1, 1.0, 0.01), 100.0, 0.0) is not None


def test_budget_that_was_overrun_has_nothing_left_rather_than_less() -> None:
    budget = Budget("session-time", Measure.SECONDS, 10.0)
    budget.lend(lease(), 10.0)
    budget.settle(10.0, 10.25, 0.0)
    assert (budget.spent, budget.left) == (10.25, 0.0)


@pytest.mark.parametrize(
    ("limits", "label"),
    [
        (Budgets(tokens=59), "session-tokens"),
        (Budgets(time_s=0.0), "session-time"),
        (Budgets(cost=1.4), "session-cost"),
    ],
)
def test_claim_bigger_than_the_whole_budget_is_refused_without_a_time_to_come_back(limits: Budgets, label: str) -> None:
    fault = SessionBudgets(SESSION, limits).refusal(CLAIM, 100.0, 0.0)
    assert fault is not None
    assert (fault.kind, told(fault)) == (BudgetTooSmall, (label, None))


@pytest.mark.parametrize("limits", [Budgets(tokens=60), Budgets(time_s=0.001), Budgets(cost=1.5), Budgets()])
def test_claim_as_big_as_the_whole_budget_is_admitted(limits: Budgets) -> None:
    assert SessionBudgets(SESSION, limits).refusal(CLAIM, 100.0, 0.0) is None


@pytest.mark.parametrize(
    ("quota", "label", "retry_after_ms"),
    [
        (Quota(max_queued=1), "max-queued", None),
        (Quota(rate={INTERACTIVE: Rate(4.0, 1.0)}), "rate", 250),
        (Quota(tokens_per_minute=60), "tokens-per-minute", 30_000),
        (Quota(max_queued=1, rate={INTERACTIVE: Rate(4.0, 1.0)}, tokens_per_minute=60), "max-queued", None),
        (Quota(rate={INTERACTIVE: Rate(4.0, 1.0)}, tokens_per_minute=60), "rate", 250),
    ],
)
def test_peer_bug_26_each_quota_tells_its_own_time_to_come_back(
    quota: Quota, label: str, retry_after_ms: int | None
) -> None:
    accounts = TenantAccounts(quota)
    claim = Claim(20, 40, 40, 1.0, 0.0)
    assert accounts.refusal(INTERACTIVE, claim, 5.0) is None
    accounts.reserve(Lease(OWNER, accounts), INTERACTIVE, claim, 5.0)
    fault = accounts.refusal(INTERACTIVE, Claim(10, 20, 40, 1.0, 0.0), 5.0)
    assert fault is not None
    assert (fault.kind, told(fault)) == (QuotaExceeded, (label, retry_after_ms))


@pytest.mark.parametrize(
    "quota", [Quota(max_queued=0), Quota(rate={INTERACTIVE: Rate(1.0, 0.0)}), Quota(tokens_per_minute=0)]
)
def test_limit_of_zero_lets_nothing_in_and_promises_nothing(quota: Quota) -> None:
    fault = TenantAccounts(quota).refusal(INTERACTIVE, CLAIM, 0.0)
    assert fault is not None
    assert fault.retry_after_ms is None


def test_rate_of_one_priority_is_not_used_up_by_the_other() -> None:
    """ORCH-3006."""
    accounts = TenantAccounts(Quota(rate={INTERACTIVE: Rate(1.0, 1.0), BATCH: Rate(1.0, 2.0)}))
    taken = Lease(OWNER, accounts)
    accounts.reserve(taken, INTERACTIVE, CLAIM, 0.0)
    assert accounts.refusal(INTERACTIVE, CLAIM, 0.0) is not None
    for _ in range(2):
        assert accounts.refusal(BATCH, CLAIM, 0.0) is None
        accounts.reserve(taken, BATCH, CLAIM, 0.0)
    assert accounts.refusal(BATCH, CLAIM, 0.0) is not None


@pytest.mark.parametrize(
    ("quota", "is_limited"),
    [
        (NO_QUOTA, False),
        (Quota(max_queued=1), True),
        (Quota(max_concurrent=1), True),
        (Quota(kv_tokens=1), True),
        (Quota(tokens_per_minute=1), True),
        (Quota(rate={BATCH: Rate(1.0, 1.0)}), True),
    ],
)
def test_quota_without_any_limit_needs_no_accounts(quota: Quota, is_limited: bool) -> None:
    assert TenantAccounts(quota).is_limited is is_limited


def test_peer_bug_05_lease_that_has_ended_gives_nothing_back_again() -> None:
    budgets = SessionBudgets(SESSION, Budgets(tokens=1000))
    accounts = TenantAccounts(Quota(max_queued=5, tokens_per_minute=6000))
    taken, other = Lease(OWNER, accounts, budgets), Lease(("acme", "b"), accounts, budgets)
    for each in (taken, other):
        accounts.reserve(each, INTERACTIVE, CLAIM, 0.0)
        budgets.reserve(each, CLAIM)
    taken.settle(Use(10, 5, 1.0, 0.0), 0.0)
    before = (budgets.left(), accounts.full_at(), accounts.leases, budgets.leases, list(other.outstanding()))
    for _ in range(3):
        taken.settle(Use(10, 5, 1.0, 0.0), 0.0)
        taken.abandon()
    assert (budgets.left(), accounts.full_at(), accounts.leases, budgets.leases, list(other.outstanding())) == before
    assert list(taken.outstanding()) == []
    assert budgets.left().tokens == 1000 - 15 - 60


def test_abandoned_lease_leaves_every_account_as_it_was() -> None:
    budgets = SessionBudgets(SESSION, Budgets(tokens=1000, time_s=90.0, cost=3.0))
    accounts = TenantAccounts(Quota(max_queued=1, max_concurrent=1, tokens_per_minute=30, kv_tokens=10))
    taken = Lease(OWNER, accounts, budgets)
    accounts.reserve(taken, INTERACTIVE, CLAIM, 0.0)
    accounts.run(taken, 10)
    budgets.reserve(taken, CLAIM)
    assert accounts.refusal(INTERACTIVE, CLAIM, 0.0) is not None
    assert not accounts.can_start(10)
    assert budgets.left() == Budgets(tokens=940, time_s=30.0, cost=1.5)
    taken.abandon()
    assert accounts.refusal(INTERACTIVE, CLAIM, 0.0) is None
    assert accounts.can_start(10)
    assert budgets.left() == budgets.limits
    assert accounts.full_at() == 0.0
