"""Shares, bounds and quotas as the scheduler keeps them: who starts next, who loses a place, who is skipped."""

from collections import Counter

import pytest

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import Fairness, FullPolicy, Order, Quota, Rate
from llorch.domain.task import Budgets, Priority, WaitReason
from tests.unit.domain.desk import BATCH, INTERACTIVE, Desk, names, replica

WFQ = Fairness.WFQ
FULL = {policy: dict.fromkeys(Priority, policy) for policy in FullPolicy}


def ledger(**quotas: Quota) -> Ledger:
    return Ledger(SessionLimits(turns=10_000), quotas)


def serve(desk: Desk, rounds: int) -> list[str]:
    """End the running task again and again; who started, in order."""
    started: list[str] = []
    for _ in range(rounds):
        running = list(desk.running())
        if not running:
            break
        name = running[0]
        desk.tokens(name, desk.seen[name].spec.expected_tokens)
        started += names(desk.end(name), "start")
    return started


def test_tenants_with_equal_weights_share_tokens_not_turns() -> None:
    """ORCH-3075: a tenant with ten times longer prompts starts a tenth as often."""
    desk = Desk(replica(), fairness=WFQ, capacity=1000)
    for number in range(60):
        desk.submit(f"long{number}", tenant="long", prompt_tokens=288, expected_tokens=16)
        desk.submit(f"short{number}", tenant="short", prompt_tokens=0, expected_tokens=16)
    turns = Counter(name.rstrip("0123456789") for name in serve(desk, 44))
    assert turns["short"] == pytest.approx(10 * turns["long"], abs=2 * 10)
    assert turns["long"] >= 3


def test_weight_multiplies_a_tenants_share() -> None:
    desk = Desk(replica(), fairness=WFQ, capacity=1000, queue={"weights": {"heavy": 3.0}})
    for number in range(60):
        desk.submit(f"heavy{number}", tenant="heavy")
        desk.submit(f"light{number}", tenant="light")
    turns = Counter(name.rstrip("0123456789") for name in serve(desk, 40))
    assert turns["heavy"] == pytest.approx(30, abs=2)


def test_levels_share_by_their_weights_and_batch_does_not_starve() -> None:
    """ORCH-3076: eight to one, whatever the number of tenants in a level."""
    desk = Desk(replica(), fairness=WFQ, capacity=1000)
    for number in range(100):
        desk.submit(f"batch{number}", BATCH, tenant=f"b{number % 20}")
        desk.submit(f"inter{number}", tenant="one")
    turns = Counter(name.rstrip("0123456789") for name in serve(desk, 90))
    assert turns["inter"] == pytest.approx(80, abs=2)


def test_strict_fairness_serves_the_urgent_level_first() -> None:
    desk = Desk(replica(), fairness=Fairness.STRICT, capacity=1000)
    for number in range(5):
        desk.submit(f"batch{number}", BATCH)
        desk.submit(f"inter{number}")
    desk.end("batch0")
    assert desk.running() == {"inter0": "r0/0"}
    assert serve(desk, 6) == ["inter1", "inter2", "inter3", "inter4", "batch1", "batch2"]


def test_nobody_overtakes_within_a_flow() -> None:
    """OC-CORE-1003, peer_bug_24."""
    desk = Desk(replica(), fairness=WFQ)
    for number in range(8):
        desk.submit(f"t{number}", expected_tokens=1 + 5 * (number % 3))
    assert serve(desk, 8) == [f"t{number}" for number in range(1, 8)]


def test_edf_orders_a_flow_by_deadline_and_counts_the_absence_of_one_as_far() -> None:
    desk = Desk(replica(), queue={"order": Order.EDF, "edf_default_s": 50.0})
    desk.submit("running")
    desk.submit("none")
    desk.submit("late", deadline_s=100.0)
    desk.submit("soon", deadline_s=10.0)
    assert serve(desk, 3) == ["soon", "none", "late"]


def test_idle_tenant_gains_no_credit() -> None:
    desk = Desk(replica(), fairness=WFQ, capacity=1000)
    for number in range(40):
        desk.submit(f"busy{number}", tenant="busy")
    serve(desk, 20)
    for number in range(20):
        desk.submit(f"back{number}", tenant="back")
    turns = Counter(name.rstrip("0123456789") for name in serve(desk, 10))
    assert turns["busy"] >= 4


# The full queue


@pytest.mark.parametrize("policy", list(FullPolicy))
def test_tenant_below_its_share_takes_a_place_from_the_one_furthest_above(policy: FullPolicy) -> None:
    """ORCH-3004: the backlog of one tenant shuts nobody out, whatever the policy."""
    desk = Desk(replica(), capacity=4, full_policy=FULL[policy])
    desk.submit("running", tenant="hog")
    for number in range(4):
        desk.submit(f"hog{number}", tenant="hog")
    assert desk.submit("light", tenant="light") == ["admit light at 0", "finish hog3 failed ADMISSION_REJECT"]
    assert desk.seen["hog3"].fault is not None
    assert desk.seen["hog3"].fault.policy_label == "fair-share"
    assert desk.submit("light2", tenant="light")[1] == "finish hog2 failed ADMISSION_REJECT"


def test_tenant_at_its_share_is_refused_by_reject_and_evicts_nobody() -> None:
    """ORCH-3112."""
    desk = Desk(replica(), capacity=2)
    desk.submit("running")
    desk.submit("a")
    desk.submit("b")
    assert desk.submit("c") == ["reject c ADMISSION_REJECT"]
    assert desk.waiting() == ["a", "b"]


def test_drop_lru_ends_the_oldest_waiting_task_of_the_same_flow() -> None:
    """ORCH-3005."""
    desk = Desk(replica(), capacity=2, full_policy=FULL[FullPolicy.DROP_LRU])
    desk.submit("running")
    desk.submit("a")
    desk.submit("b")
    assert desk.submit("c") == ["admit c at 1", "finish a failed QUEUE_FULL_DROP_LRU"]
    assert desk.waiting() == ["b", "c"]


def test_shed_low_priority_gives_a_batch_place_to_an_interactive_task_of_the_same_tenant() -> None:
    desk = Desk(replica(), capacity=1, full_policy=FULL[FullPolicy.SHED_LOW_PRIORITY])
    desk.submit("running")
    desk.submit("batch", BATCH)
    desk.submit("first")
    assert desk.submit("second") == ["admit second at 1", "finish batch failed ADMISSION_REJECT"]
    assert desk.submit("third") == ["reject third ADMISSION_REJECT"]
    fault = desk.seen["batch"].fault
    assert fault is not None
    assert fault.policy_label == "shed-low-priority"


def test_a_task_that_has_run_is_never_dropped_for_a_newer_one() -> None:
    from tests.unit.domain.desk import LOST

    desk = Desk(replica(), capacity=1, full_policy=FULL[FullPolicy.DROP_LRU])
    desk.submit("a")
    desk.end("a", LOST)  # waits again, its replica is suspected
    assert desk.submit("b") == ["reject b ADMISSION_REJECT"]
    assert desk.waiting() == ["a"]


# Quotas


def test_tenant_at_its_concurrency_is_skipped_and_goes_on_when_one_ends() -> None:
    """ORCH-3077: skipped, not refused; others take the slot."""
    desk = Desk(replica(slots=3), ledger=ledger(acme=Quota(max_concurrent=1)))
    assert desk.submit("a") == ["admit a at 0", "start a on r0/0"]
    assert desk.submit("b") == ["admit b at 0"]
    assert desk.scheduler.wait_reason(desk.seen["b"]) is WaitReason.QUOTA
    assert desk.submit("x", tenant="other")[1] == "start x on r0/1"
    assert desk.end("a") == ["finish a succeeded", "start b on r0/0"]


def test_concurrency_of_a_tenant_is_lifted_on_its_other_routes() -> None:
    shared = ledger(acme=Quota(max_concurrent=1))
    one, other = Desk(replica(), ledger=shared), Desk(replica("r9"), ledger=shared)
    one.submit("a")
    assert other.submit("b") == ["admit b at 0"]
    one.end("a")
    assert shared.take_lifted() == ["acme"]
    assert other.handle(ev.LimitLifted("acme")) == ["start b on r9/0"]


def test_concurrency_is_held_until_the_engine_let_go() -> None:
    """peer_bug_05: cancellation in the middle neither leaks nor frees too early."""
    desk = Desk(replica(slots=2), ledger=ledger(acme=Quota(max_concurrent=1)))
    desk.submit("a")
    desk.submit("b")
    attempt = desk.attempt_of("a")
    assert desk.cancel("a") == ["finish a canceled CANCELED", "abort a on r0/0"]
    assert desk.end("a", attempt_id=attempt) == ["start b on r0/0"]
    desk.end("b")
    assert not desk.ledger.outstanding()


def test_rate_is_refused_with_the_time_until_it_refills() -> None:
    """ORCH-3006."""
    desk = Desk(replica(), ledger=ledger(acme=Quota(rate={INTERACTIVE: Rate(per_s=2.0, burst=1)})))
    desk.submit("a")
    assert desk.submit("b") == ["reject b QUOTA_EXCEEDED"]
    refusal = desk.commands[0]
    assert isinstance(refusal, ev.Reject)
    assert refusal.fault.retry_after_ms == pytest.approx(500, abs=2)
    assert desk.submit("c", BATCH)[0] == "admit c at 0"
    desk.now += 0.5
    assert desk.submit("d")[0].startswith("admit d")


def test_refused_submission_takes_nothing_of_rate_or_budget() -> None:
    """peer_bug_06."""
    desk = Desk(replica(), capacity=0, ledger=ledger(acme=Quota(rate={INTERACTIVE: Rate(per_s=0.001, burst=1)})))
    for name in ("a", "b", "c"):
        desk.submit(name, budgets=Budgets(tokens=40))
        refusal = desk.commands[0]
        assert isinstance(refusal, ev.Reject)
        assert refusal.fault.policy_label == "reject"
    assert not desk.ledger.outstanding()


# Budgets


def test_session_budget_is_reserved_whole_and_settled_to_what_was_used() -> None:
    """ORCH-3099, peer_bug_07."""
    desk = Desk(replica())
    desk.submit("a", session="s", prompt_tokens=10, max_tokens=16, budgets=Budgets(tokens=60))
    assert desk.ledger.budgets_left(("acme", "s"), desk.now) == Budgets(tokens=34)
    desk.submit("b", session="s", prompt_tokens=10)
    assert desk.submit("c", session="s", prompt_tokens=10) == ["reject c BUDGET_EXHAUSTED"]
    desk.tokens("a", 4)
    desk.end("a", prompt_tokens=12)
    assert desk.ledger.budgets_left(("acme", "s"), desk.now) == Budgets(tokens=60 - 16 - 26)


def test_tokens_that_come_after_the_cancel_are_paid_for() -> None:
    desk = Desk(replica())
    desk.submit("a", session="s", prompt_tokens=10, budgets=Budgets(tokens=60))
    desk.submit("keeps the session", session="s", prompt_tokens=0, expected_tokens=1, max_tokens=1)
    desk.tokens("a", 4)
    attempt = desk.attempt_of("a")
    desk.cancel("a")
    desk.handle(ev.TokensProduced(desk.seen["a"].key, attempt, 3))
    desk.end("a", attempt_id=attempt)
    assert desk.ledger.budgets_left(("acme", "s"), desk.now) == Budgets(tokens=60 - 10 - 7 - 1)


def test_running_time_ends_a_task_when_its_session_has_no_more() -> None:
    desk = Desk(replica())
    desk.submit("a", session="s", budgets=Budgets(time_s=5.0))
    attempt = desk.attempt_of("a")
    assert desk.after(5.0) == ["finish a failed BUDGET_EXHAUSTED", "abort a on r0/0"]
    desk.end("a", attempt_id=attempt)
    assert desk.submit("b", session="s") == ["reject b BUDGET_EXHAUSTED"]
