"""Replicas that leave while tasks run there and wait for them (ORCH-3154, ORCH-3158), and policies that change."""

from dataclasses import replace

import pytest

from llorch.domain import events as ev
from llorch.domain.faults import DRAINED, MOVED
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import NO_QUOTA, Order, PreemptionPolicy, Quota, Rate
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Fault
from llorch.errors import Canceled
from tests.unit.domain.desk import BATCH, INTERACTIVE, LOST, Desk, replica

DRAINING = ReplicaState.DRAINING
BROKEN_OFF = Fault(Canceled, "told to stop")


def leaving(known: Replica, *, comes_back: bool = False) -> Replica:
    return replace(known, state=DRAINING, comes_back=comes_back)


def vacate(desk: Desk, replica_id: str = "r0") -> list[str]:
    return desk.handle(ev.ReplicaVacated(replica_id))


def test_draining_replica_starts_nothing_and_breaks_nothing_off() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    assert desk.change(leaving(replica("r0"))) == []
    assert desk.submit("b") == ["admit b at 0", "start b on r1/0"]
    assert desk.submit("c") == ["admit c at 0"]
    assert desk.end("a") == ["finish a succeeded"]


def test_vacated_replica_moves_what_can_go_on_to_the_head_of_its_flow() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.submit("b")
    desk.submit("c")
    desk.tokens("a", 4)
    desk.change(leaving(replica("r0")))
    assert vacate(desk) == ["abort a on r0/0"]
    assert vacate(desk) == [], "once is enough"
    assert desk.end("a", BROKEN_OFF) == ["requeue a"]
    assert isinstance(desk.commands[0], ev.Requeue)
    assert desk.commands[0].fault is MOVED
    assert desk.waiting() == ["a", "c"]
    assert desk.end("b") == ["finish b succeeded", "start a on r1/0"]
    assert desk.seen["a"].attempt is not None
    assert desk.seen["a"].attempt.tokens_before == 4


def test_move_is_no_preemption_and_counts_against_nothing() -> None:
    desk = Desk(replica("r0"), replica("r1"), preemption=PreemptionPolicy(hard=True, per_minute=0), attempts=1)
    desk.submit("a", BATCH)
    for _ in range(5):
        attempt = desk.seen["a"].attempt
        assert attempt is not None
        here = attempt.replica_id
        desk.change(leaving(replica(here)))
        assert vacate(desk, here) == [f"abort a on {here}/0"]
        desk.end("a", BROKEN_OFF)
        desk.change(replica(here, state=ReplicaState.STARTING))
        desk.change(replica(here))
    assert (desk.seen["a"].preemptions, desk.seen["a"].moves) == (0, 5)
    assert desk.end("a", LOST) == ["finish a failed REPLICA_EXHAUSTED"], "the one try that it has"


def test_task_that_nobody_can_go_on_with_ends_honestly() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("grammar", can_continue=False)
    desk.tokens("grammar", 1)
    desk.change(leaving(replica("r0")))
    assert vacate(desk) == ["finish grammar failed POOL_UNAVAILABLE", "abort grammar on r0/0"]
    assert desk.seen["grammar"].fault is DRAINED


def test_task_without_a_token_can_always_be_moved() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("grammar", can_continue=False)
    desk.change(leaving(replica("r0")))
    assert vacate(desk) == ["abort grammar on r0/0"]


def test_strict_task_stays_with_its_replica_set() -> None:
    """ORCH-3149: another engine version is another set."""
    desk = Desk(replica("r0"), replica("r1", version="v2"))
    desk.submit("strict", strict=True)
    desk.tokens("strict", 1)
    desk.change(leaving(replica("r0")))
    assert vacate(desk) == ["finish strict failed POOL_UNAVAILABLE", "abort strict on r0/0"]


def test_exchanged_replica_keeps_what_waits_and_what_it_ran() -> None:
    desk = Desk(replica("r0"))
    desk.submit("a")
    desk.submit("b")
    assert desk.change(leaving(replica("r0"), comes_back=True)) == []
    assert vacate(desk) == ["abort a on r0/0"]
    assert desk.end("a", BROKEN_OFF) == ["requeue a"]
    desk.change(replica("r0", state=ReplicaState.STARTING))
    assert desk.change(replica("r0")) == ["start a on r0/0"]
    assert desk.waiting() == ["b"]


@pytest.mark.parametrize("event", [ev.ReplicaChanged(leaving(replica("r0"))), ev.ReplicaRemoved("r0")])
def test_last_replica_that_goes_ends_what_waits_and_what_comes(event: ev.Event) -> None:
    """ORCH-3305."""
    desk = Desk(replica("r0"))
    desk.submit("a")
    desk.submit("b")
    assert desk.handle(event) == ["finish b failed POOL_UNREADY"]
    assert desk.submit("late") == ["reject late POOL_UNREADY"]
    assert desk.end("a") == ["finish a succeeded"]


def test_removed_replica_is_chosen_no_more_and_its_lease_settles_as_ever() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.handle(ev.ReplicaRemoved("r0"))
    desk.handle(ev.ReplicaRemoved("r0"))
    assert desk.submit("b") == ["admit b at 0", "start b on r1/0"]
    assert desk.end("a", LOST) == ["requeue a"]
    assert desk.end("b") == ["finish b succeeded", "start a on r1/0"]
    assert desk.ledger.busy_slots("r0") == 0


def test_cancel_of_a_task_that_is_being_moved_ends_it_once() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    number = desk.attempt_of("a")
    desk.change(leaving(replica("r0")))
    vacate(desk)
    assert desk.cancel("a") == ["finish a canceled CANCELED"]
    assert desk.end("a", BROKEN_OFF, attempt_id=number) == []


# Policies


def reconfigured(desk: Desk, **queue: object) -> list[str]:
    policy = desk.scheduler.policy
    return desk.handle(ev.ConfigChanged(replace(policy, queue=replace(policy.queue, **queue))))  # type: ignore[arg-type]


def test_smaller_queue_keeps_what_waits_and_takes_nothing_until_it_fits() -> None:
    """ORCH-3159."""
    desk = Desk(replica("r0"))
    for name in "abcd":
        desk.submit(name)
    assert reconfigured(desk, capacity=dict.fromkeys((INTERACTIVE, BATCH), 2)) == []
    assert desk.waiting() == ["b", "c", "d"]
    assert desk.submit("late") == ["reject late ADMISSION_REJECT"]
    desk.end("a")
    desk.end("b")
    assert desk.submit("fits") == ["admit fits at 1"]


def test_other_order_holds_for_what_waits_already() -> None:
    desk = Desk(replica("r0"))
    desk.submit("runs")
    desk.submit("late", deadline_s=500.0)
    desk.submit("soon", deadline_s=100.0)
    reconfigured(desk, order=Order.EDF)
    assert desk.end("runs") == ["finish runs succeeded", "start soon on r0/0"]


def test_other_weights_share_what_comes_and_settle_what_ran() -> None:
    desk = Desk(replica("r0", slots=2))
    for number in range(12):
        desk.submit(f"a{number}", tenant="a")
        desk.submit(f"b{number}", tenant="b")
    reconfigured(desk, weights={"a": 3.0})
    starts: list[str] = []
    for _ in range(8):
        name = next(iter(desk.running()))
        desk.tokens(name, 16)
        starts += [line.split()[1][0] for line in desk.end(name) if line.startswith("start")]
    assert starts.count("a") == 6, starts


def test_wall_timeout_of_the_new_policy_holds_for_new_attempts() -> None:
    desk = Desk(replica("r0"))
    desk.submit("old")
    desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, wall_s=5.0)))
    assert desk.after(6.0) == []
    desk.end("old")
    desk.submit("new")
    assert desk.after(6.0) == ["finish new failed DECODE_TIMEOUT", "abort new on r0/0"]


# Quotas


def test_tenant_whose_quota_was_raised_goes_on_and_one_left_alone_keeps_its_rate() -> None:
    """ORCH-3251."""
    slow = Quota(rate={INTERACTIVE: Rate(per_s=0.001, burst=1)})
    ledger = Ledger(SessionLimits(), {"acme": Quota(max_concurrent=1), "calm": slow})
    desk = Desk(replica("r0", slots=3), ledger=ledger)
    desk.submit("one")
    desk.submit("two")
    desk.submit("calm", tenant="calm")
    ledger.reconfigure({"acme": Quota(max_concurrent=2), "calm": slow}, NO_QUOTA, SessionLimits())
    assert ledger.take_lifted() == ["acme"]
    assert desk.handle(ev.LimitLifted("acme")) == ["start two on r0/2"]
    assert desk.submit("again", tenant="calm") == ["reject again QUOTA_EXCEEDED"]
    for name in ("one", "two"):
        desk.end(name)
    assert ledger.outstanding() == []


def test_quota_that_goes_leaves_nothing_reserved() -> None:
    ledger = Ledger(SessionLimits(), {"acme": Quota(max_queued=1, tokens_per_minute=1000)})
    desk = Desk(replica("r0"), ledger=ledger)
    desk.submit("runs")
    desk.submit("waits")
    ledger.reconfigure({}, NO_QUOTA, SessionLimits(turns=1))
    assert desk.submit("more") == ["admit more at 1"]
    for name in ("runs", "waits", "more"):
        desk.end(name)
    assert ledger.outstanding() == []
    ledger.expire(10_000.0)
