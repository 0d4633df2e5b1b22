"""Random histories of reservations: the ledger says after every step what a naive recount of all steps says."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from llorch.domain.ledger import Ledger
from llorch.domain.limits import Claim, Use
from llorch.domain.policy import NO_QUOTA, Quota, Rate
from llorch.domain.sessions import SessionLimits
from llorch.domain.task import Budgets, Priority, SessionKey, TaskKey, TaskSpec
from tests.unit.domain.ledger_model import Model

QUOTAS = {
    "narrow": Quota(
        max_queued=3,
        max_concurrent=2,
        rate={Priority.INTERACTIVE: Rate(0.5, 4.0)},
        tokens_per_minute=240,
        kv_tokens=64,
    ),
    "metered": Quota(rate={Priority.BATCH: Rate(2.0, 0.5)}, tokens_per_minute=120),
    "free": NO_QUOTA,
}
DEFAULT = Quota(max_queued=4, max_concurrent=1)
RESIZED = {
    "narrow": Quota(
        max_queued=5,
        max_concurrent=1,
        rate={Priority.INTERACTIVE: Rate(0.5, 4.0)},
        tokens_per_minute=480,
        kv_tokens=128,
    ),
    "metered": Quota(rate={Priority.BATCH: Rate(4.0, 2.0)}, tokens_per_minute=120),
    "free": NO_QUOTA,
}
CONFIGS = [(QUOTAS, DEFAULT), (RESIZED, DEFAULT), (RESIZED, Quota(max_queued=2, max_concurrent=3))]
TENANTS = [*QUOTAS, "nameless"]
LIMITS = SessionLimits(ttl_s=64.0, turns=12)
BUDGETS = [None, None, Budgets(), Budgets(tokens=160), Budgets(time_s=40.0), Budgets(tokens=400, time_s=96.0, cost=8.0)]
INDEX = st.integers(0, 99)
SMALL = st.integers(0, 15)

SHORT = settings(
    max_examples=60, stateful_step_count=50, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(SHORT, max_examples=400, stateful_step_count=100)


class LedgerHistories(RuleBasedStateMachine):
    """Every rule is a step of a scheduler, of a client, or of time, or a stale or doubled one that must do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(LIMITS, QUOTAS, DEFAULT)
        self.model = Model(LIMITS, QUOTAS, DEFAULT)
        self.now = 0.0
        self.tasks = 0
        self.settled: list[tuple[TaskKey, Use]] = []
        self.ended: list[int] = []

    def snapshot(self) -> tuple[Any, ...]:
        budgets = [self.ledger.budgets_left((tenant, f"s{s}"), self.now) for tenant in TENANTS for s in range(3)]
        buckets = sorted((tenant, accounts.full_at()) for tenant, accounts in self.ledger._tenants.items())
        return self.ledger.outstanding(), budgets, buckets, len(self.ledger.sessions), self.ledger.leases()

    # Admission

    @rule(
        tenant=st.sampled_from(TENANTS), session=st.integers(0, 2), priority=st.sampled_from(Priority),
        sizes=st.lists(st.tuples(SMALL, SMALL, SMALL, INDEX), min_size=1, max_size=5),
    )  # fmt: skip
    def submit(self, tenant: str, session: int, priority: Priority, sizes: list[tuple[int, int, int, int]]) -> None:
        for prompt, expected, more, whim in sizes:
            budgets = BUDGETS[whim % len(BUDGETS)] if whim < 12 else BUDGETS[2 * session + 1]
            self.submit_one((tenant, f"s{session}"), priority, budgets, (prompt, expected, more), is_wanted=whim < 95)

    def submit_one(
        self,
        session: SessionKey,
        priority: Priority,
        budgets: Budgets | None,
        sizes: tuple[int, int, int],
        *,
        is_wanted: bool,
    ) -> None:
        self.tasks += 1
        prompt, expected, more = sizes
        huge = 64 if more == 0 else 1
        claim = Claim(prompt * huge, expected + 1, expected + more + 1, 16.0 * (more + 1), prompt * 0.25)
        spec = TaskSpec(
            (session[0], f"t{self.tasks}"), session, priority, claim.max_tokens, claim.expected_tokens, budgets=budgets
        )
        expected_refusal = self.model.refusal(spec, claim, self.now)
        before = self.snapshot()
        faults = [self.ledger.refusal(spec, claim, self.now) for _ in range(2)]
        assert self.snapshot() == before, "a question changed something"
        for fault in faults:
            told = None if fault is None else (fault.kind, fault.policy_label, fault.retry_after_ms)
            assert told == expected_refusal
        if expected_refusal is None and is_wanted:  # otherwise there was no place in the queue, say
            self.ledger.reserve(spec, claim, self.now)
            self.model.reserve(spec, claim, self.now)

    # Runs

    @precondition(lambda self: any(work.is_waiting and not work.is_over for work in self.model.work.values()))
    @rule(index=INDEX, kv_tokens=st.sampled_from([0, 8, 32, 100]), prefer=st.sampled_from([None, 0, 1, 3]))
    def start(self, index: int, kv_tokens: int, prefer: int | None) -> None:
        waiting = [key for key, work in self.model.work.items() if work.is_waiting and not work.is_over]
        key = waiting[index % len(waiting)]
        can_start = self.ledger.can_start(key[0], kv_tokens)
        assert can_start == self.model.can_start(key[0], kv_tokens)
        if not can_start:
            return
        held = {lease.slot for lease in self.ledger.leases()}
        lease = self.ledger.hold_slot("r0", task=key, kv_tokens=kv_tokens, prefer=prefer)
        assert lease.slot not in held
        assert lease.slot == prefer or prefer in held or prefer is None
        self.model.start(key, lease.attempt_id, kv_tokens)

    @precondition(lambda self: self.model.runs)
    @rule(index=INDEX, is_requeued=st.booleans())
    def end_attempt(self, index: int, is_requeued: bool) -> None:
        attempt_id = list(self.model.runs)[index % len(self.model.runs)]
        key, _ = self.model.runs[attempt_id]
        self.ledger.settle_slot(attempt_id)
        self.model.end(attempt_id)
        self.ended.append(attempt_id)
        work = self.model.work.get(key)
        if work is None:
            return
        if work.is_over or not is_requeued:
            self.settle(key, index)
            return
        self.ledger.requeue(key)
        work.is_waiting = True

    @precondition(lambda self: self.model.work)
    @rule(index=INDEX, is_settled_early=st.booleans())
    def finish(self, index: int, is_settled_early: bool) -> None:
        """A task ends while it waits, or while it holds a slot; then it is settled after the slot, or before."""
        key = list(self.model.work)[index % len(self.model.work)]
        work = self.model.work[key]
        work.is_over = True
        for attempt_id in work.attempts:
            self.ledger.release_slot(attempt_id)
        if not work.attempts or is_settled_early:
            self.settle(key, index)

    def settle(self, key: TaskKey, number: int) -> None:
        claim = self.model.work[key].claim
        reserved_s = self.ledger.time_left_s(key)
        ran_s = (number % 5) / 4 * (claim.time_s if reserved_s is None else reserved_s)
        more = 16 if number == 99 else 0
        use = Use(claim.prompt_tokens + more, number % (claim.max_tokens + 1), ran_s, number % 7 * 0.25)
        self.ledger.settle_task(key, use, self.now)
        self.model.settle(key, use, self.now)
        self.settled.append((key, use))

    # Stale and doubled news

    @precondition(lambda self: self.settled)
    @rule(index=INDEX)
    def settle_a_task_again(self, index: int) -> None:
        key, use = self.settled[index % len(self.settled)]
        before = self.snapshot()
        self.ledger.settle_task(key, use, self.now)
        self.ledger.requeue(key)
        assert self.snapshot() == before
        assert self.ledger.time_left_s(key) is None

    @precondition(lambda self: self.ended)
    @rule(index=INDEX)
    def settle_a_slot_again(self, index: int) -> None:
        before = self.snapshot()
        self.ledger.release_slot(self.ended[index % len(self.ended)])
        self.ledger.settle_slot(self.ended[index % len(self.ended)])
        assert self.snapshot() == before

    @precondition(lambda self: any(work.is_waiting for work in self.model.work.values()))
    @rule(index=INDEX)
    def requeue_what_waits(self, index: int) -> None:
        waiting = [key for key, work in self.model.work.items() if work.is_waiting]
        before = self.snapshot()
        self.ledger.requeue(waiting[index % len(waiting)])
        assert self.snapshot() == before

    # Clients and time

    @rule(tenant=st.sampled_from(TENANTS), session=st.integers(0, 2), is_meant=INDEX)
    def forget(self, tenant: str, session: int, is_meant: int) -> None:
        if is_meant < 50:
            self.ledger.sessions.forget((tenant, f"s{session}"))
            self.model.forget((tenant, f"s{session}"))

    @rule(seconds=st.sampled_from([0.25, 0.25, 1.0, 1.0, 8.0, 40.0, 64.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        before = self.snapshot()
        self.ledger.expire(self.now)
        after = self.snapshot()
        assert (after[0], after[1], after[4]) == (before[0], before[1], before[4])

    @rule(config=st.sampled_from(CONFIGS), ttl_s=st.sampled_from([64.0, 64.0, 16.0]), turns=st.sampled_from([12, 6]))
    def reconfigure(self, config: tuple[dict[str, Quota], Quota], ttl_s: float, turns: int) -> None:
        """Nothing that is held changes, nor what was used of that which keeps its size."""
        quotas, default = config
        before = self.ledger.outstanding(), self.ledger.leases()
        for _ in range(2):
            self.ledger.reconfigure(quotas, default, SessionLimits(ttl_s, turns))
        assert (self.ledger.outstanding(), self.ledger.leases()) == before
        lifted = self.model.reconfigure(quotas, default, SessionLimits(ttl_s, turns), self.now)
        assert set(self.ledger.take_lifted()) == lifted

    # What must hold

    @invariant()
    def agrees_with_the_recount(self) -> None:
        assert list(self.ledger.check()) == []
        assert Counter(self.ledger.outstanding()) == self.model.outstanding()
        lifted, self.model.lifted = self.model.lifted, []
        assert self.ledger.take_lifted() == list(dict.fromkeys(lifted))
        for tenant in TENANTS:
            for number in range(3):
                self.agrees_on_session(tenant, f"s{number}")

    def agrees_on_session(self, tenant: str, name: str) -> None:
        told, known = self.ledger.sessions.get((tenant, name), self.now), self.model.session((tenant, name), self.now)
        assert (told is None) == (known is None)
        if told is not None and known is not None:
            assert (told.turns, told.expires_at) == (known.turns, known.expires_at)
            assert self.ledger.budgets_left((tenant, name), self.now) == known.left()
            for key, hold in known.reserved.items():
                assert self.ledger.time_left_s(key) == hold.time_s

    def teardown(self) -> None:
        """Every history can be brought to an end, and then nothing is held, and nothing is remembered for long."""
        for attempt_id in list(self.model.runs):
            self.ledger.settle_slot(attempt_id)
            self.model.end(attempt_id)
        for key in list(self.model.work):
            self.settle(key, 33)
        self.agrees_with_the_recount()
        assert (self.ledger.outstanding(), self.ledger.leases()) == ([], [])
        self.now += 100_000.0
        self.ledger.expire(self.now)
        held = (self.ledger._tenants, self.ledger._resting, self.ledger._tasks, self.ledger._slots, self.ledger._lifted)
        assert [len(table) for table in held] == [0, 0, 0, 0, 0]
        assert len(self.ledger.sessions) == 0


def test_any_history_of_reservations_adds_up() -> None:
    """ORCH-3006, 3077, 3099; peer_bug_05, 06, 07, 15."""
    run_state_machine_as_test(LedgerHistories, settings=SHORT)


@pytest.mark.prove
def test_any_long_history_of_reservations_adds_up() -> None:
    run_state_machine_as_test(LedgerHistories, settings=LONG)
