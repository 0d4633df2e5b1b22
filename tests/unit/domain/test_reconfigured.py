"""Policies and quotas that change while tasks wait and run (ORCH-3159)."""

from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import NO_QUOTA, Order, PreemptionPolicy, Quota, Rate
from llorch.domain.task import WaitReason
from tests.unit.domain.desk import BATCH, INTERACTIVE, LOST, Desk, names, replica
from tests.unit.domain.line import Line


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


def test_attempt_that_ran_out_of_time_is_told_the_time_that_it_had() -> None:
    desk = Desk(replica("r0"), wall_s=20.0)
    desk.submit("a")
    desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, wall_s=5.0)))
    assert desk.after(20.0) == ["finish a failed DECODE_TIMEOUT", "abort a on r0/0"]
    assert desk.seen["a"].fault is not None
    assert "20 s" in desk.seen["a"].fault.message


def test_attempts_that_failed_count_against_the_new_number() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, attempts=1)))
    assert desk.end("a", LOST) == ["finish a failed REPLICA_EXHAUSTED"]


def test_rules_of_making_room_hold_for_what_runs_already() -> None:
    """ORCH-3086: what has become protected is not broken off; what may be, is."""
    desk = Desk(replica("r0"))
    desk.submit("batch", BATCH)
    hard, protecting = PreemptionPolicy(hard=True), PreemptionPolicy(hard=True, protected=frozenset({BATCH}))
    desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, preemption=protecting)))
    assert desk.submit("urgent") == ["admit urgent at 0"]
    assert desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, preemption=hard))) == ["abort batch on r0/0"]
    assert desk.handle(ev.ConfigChanged(replace(desk.scheduler.policy, preemption=hard))) == [], "once is enough"


def test_refund_of_what_was_charged_before_is_no_credit() -> None:
    """A flow that had paid in advance owes as much under the new policy until its runs are over."""
    line = Line()
    tasks = [line.push(tenant, prompt=0, expected=100) for tenant in ("runs", "waits", "waits")]
    assert line.start() is tasks[0]
    line.queue.reconfigure(replace(line.queue.policy, output_cost=3.0), [tasks[0]])
    line.check()
    assert (line.counter("runs"), line.counter("waits")) == (300.0, 0.0)
    line.settle(tasks[0])
    assert line.counter("runs") == 0.0
    line.check()


def test_counters_of_flows_that_wait_stand_as_far_apart_as_what_they_run() -> None:
    line = Line()
    tasks = [line.push(tenant, prompt=0) for tenant in ("two", "one", "two", "none", "one", "two")]
    running = [task for task in (line.start() for _ in range(4)) if task is not None]
    line.queue.reconfigure(line.queue.policy, running)
    line.check()
    runs = [task.key[0] for task in running]
    assert {name: line.counter(name) for name in ("two", "one")} == {n: 20.0 * runs.count(n) for n in ("two", "one")}
    assert [task for task in tasks if task not in running] == list(line.queue)


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


def test_lower_limit_counts_what_runs_already() -> None:
    ledger = Ledger(SessionLimits(), {"acme": Quota(max_concurrent=3)})
    desk = Desk(replica("r0", slots=4), ledger=ledger)
    for name in "abc":
        desk.submit(name)
    ledger.reconfigure({"acme": Quota(max_concurrent=2)}, NO_QUOTA, SessionLimits())
    assert desk.submit("d") == ["admit d at 0"]
    assert desk.scheduler.wait_reason(desk.seen["d"]) is WaitReason.QUOTA
    assert desk.end("a") == ["finish a succeeded"]
    assert desk.end("b") == ["finish b succeeded", "start d on r0/0"]


def test_new_limit_holds_for_what_waits_since_a_time_without_limits() -> None:
    ledger = Ledger(SessionLimits())
    desk = Desk(replica("r0"), ledger=ledger)
    for name in "abc":
        desk.submit(name)
    ledger.reconfigure({"acme": Quota(max_concurrent=1)}, NO_QUOTA, SessionLimits())
    desk.change(replica("r1"))
    assert names(desk.handle(ev.Tick()), "start") == []
    assert desk.running() == {"a": "r0/0", "b": "r1/0"}, "what runs is let run; what comes counts"
    assert desk.end("a") == ["finish a succeeded"]
    assert desk.end("b") == ["finish b succeeded", "start c on r0/0"]


def test_bucket_of_the_same_rate_keeps_what_was_drawn_from_it() -> None:
    rate = {INTERACTIVE: Rate(per_s=0.001, burst=1)}
    ledger = Ledger(SessionLimits(), {"acme": Quota(rate=rate)})
    desk = Desk(replica("r0"), ledger=ledger)
    desk.submit("a")
    ledger.reconfigure({"acme": Quota(rate=rate, max_queued=9)}, NO_QUOTA, SessionLimits())
    assert desk.submit("b") == ["reject b QUOTA_EXCEEDED"]
    ledger.reconfigure({"acme": Quota(rate={INTERACTIVE: Rate(per_s=1.0, burst=1)})}, NO_QUOTA, SessionLimits())
    assert names(desk.submit("c"), "admit") == ["c"]


def test_sessions_in_use_live_as_long_as_the_new_limits_say() -> None:
    ledger = Ledger(SessionLimits(ttl_s=100.0))
    desk = Desk(replica("r0"), ledger=ledger)
    desk.submit("a", session="s")
    ledger.reconfigure({}, NO_QUOTA, SessionLimits(ttl_s=10.0))
    assert ledger.sessions.get(("acme", "s"), 9.0) is not None
    ledger.reconfigure({}, NO_QUOTA, SessionLimits(ttl_s=50.0))
    assert ledger.sessions.get(("acme", "s"), 49.0) is not None
    assert ledger.sessions.get(("acme", "s"), 50.0) is None


def test_parked_flow_takes_part_again_when_the_task_that_was_too_big_is_gone() -> None:
    """ORCH-3077: nobody waits beside a free slot for a quota that has room."""
    ledger = Ledger(SessionLimits(), {"acme": Quota(kv_tokens=50)})
    desk = Desk(replica("r0", slots=3), ledger=ledger)
    desk.submit("runs", max_tokens=30)
    assert desk.submit("big", max_tokens=40) == ["admit big at 0"]
    assert names(desk.submit("small", max_tokens=20), "start") == []
    assert desk.cancel("big") == ["finish big canceled CANCELED", "start small on r0/1"]


def test_smaller_task_that_is_due_earlier_starts_though_its_flow_was_parked() -> None:
    ledger = Ledger(SessionLimits(), {"acme": Quota(kv_tokens=50)})
    desk = Desk(replica("r0", slots=3), ledger=ledger, queue={"order": Order.EDF})
    desk.submit("runs", max_tokens=30)
    desk.submit("big", max_tokens=40, deadline_s=500.0)
    assert names(desk.submit("small", max_tokens=20, deadline_s=50.0), "start") == ["small"]
