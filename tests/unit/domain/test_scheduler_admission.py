"""Who gets in, in which order tasks start, and what a refusal leaves behind."""

import json

import pytest

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.pool import ReplicaState
from llorch.domain.task import WaitReason
from tests.unit.domain.desk import BATCH, INTERACTIVE, LOST, TENANT, Desk, key, names, replica


def test_task_that_finds_a_free_slot_starts_in_the_same_post() -> None:
    """ORCH-3117, peer_bug_13 for the scheduler: nothing waits for a tick."""
    assert Desk(replica()).submit("a") == ["admit a at 0", "start a on r0/0"]


def test_admitted_task_waits_for_a_slot_and_is_told_its_position() -> None:
    desk = Desk(replica())
    desk.submit("a")
    assert desk.submit("b") == ["admit b at 0"]
    assert desk.submit("c") == ["admit c at 1"]
    assert desk.waiting() == ["b", "c"]


def test_task_waits_while_no_replica_is_up_yet_and_starts_when_one_is() -> None:
    desk = Desk(replica(state=ReplicaState.LOADING))
    assert desk.submit("a") == ["admit a at 0"]
    assert desk.scheduler.wait_reason(desk.seen["a"]) is WaitReason.NO_READY_REPLICA
    assert desk.change(replica()) == ["start a on r0/0"]


@pytest.mark.parametrize("state", [state for state in ReplicaState if state is not ReplicaState.READY])
def test_nothing_starts_on_a_replica_that_is_not_ready(state: ReplicaState) -> None:
    """ORCH-3008."""
    desk = Desk(replica("r0", state=state), replica("r1", state=ReplicaState.STARTING))
    assert desk.submit("a") == ["admit a at 0"]


@pytest.mark.parametrize("state", [ReplicaState.STOPPED, ReplicaState.FAILED])
def test_submission_is_refused_when_every_replica_is_gone(state: ReplicaState) -> None:
    """ORCH-3113."""
    assert Desk(replica(state=state)).submit("a") == ["reject a POOL_UNREADY"]


def test_full_queue_rejects_each_priority_on_its_own() -> None:
    """ORCH-3004, ORCH-3005."""
    desk = Desk(replica(), capacity=2, batch_capacity=1)
    desk.submit("running")
    assert desk.submit("b1", BATCH) == ["admit b1 at 0"]
    assert desk.submit("b2", BATCH) == ["reject b2 ADMISSION_REJECT"]
    assert desk.submit("i1") == ["admit i1 at 0"]
    assert desk.submit("i2") == ["admit i2 at 1"]
    assert desk.submit("i3") == ["reject i3 ADMISSION_REJECT"]
    assert desk.waiting() == ["i1", "i2", "b1"]


def test_rejection_by_a_full_queue_names_the_policy_and_no_wait() -> None:
    desk = Desk(replica(), capacity=0)
    desk.submit("a")
    [command] = desk.commands
    assert isinstance(command, ev.Reject)
    assert (command.fault.policy_label, command.fault.retry_after_ms) == ("reject", None)


def test_peer_bug_12_an_idle_route_does_not_hide_a_full_one() -> None:
    ledger = Ledger()
    full, idle = Desk(replica("x"), capacity=1, ledger=ledger), Desk(replica("y", 8), capacity=100, ledger=ledger)
    full.submit("a")
    full.submit("b")
    assert full.submit("c") == ["reject c ADMISSION_REJECT"]
    assert idle.submit("d") == ["admit d at 0", "start d on y/0"]
    assert full.submit("e") == ["reject e ADMISSION_REJECT"]


def test_peer_bug_06_a_refused_submission_changes_nothing() -> None:
    """ORCH-3112: no place, no session, no turn, no timer, no order number."""
    desk = Desk(replica(), capacity=1, turns=2)
    desk.submit("a", session="s")
    desk.submit("b")
    for attempt in range(5):
        name = f"refused {attempt}"
        assert desk.submit(name, session="s", deadline_s=1.0) == [f"reject {name} ADMISSION_REJECT"]
    session = desk.ledger.sessions.get((TENANT, "s"), desk.now)
    assert session is not None
    assert session.turns == 1
    assert desk.scheduler.tasks.keys() == {key("a"), key("b")}
    assert desk.scheduler.next_wakeup() == 600.0  # the wall timer of `a`
    desk.cancel("b")
    desk.submit("c", session="s")
    assert desk.seen["c"].order == desk.seen["b"].order + 1


def test_peer_bug_16_while_no_replica_answers_the_queue_stays_bounded() -> None:
    desk = Desk(replica(state=ReplicaState.UNREADY), capacity=3)
    for number in range(200):
        desk.submit(f"t{number}", session=f"s{number}")
    assert desk.waiting() == ["t0", "t1", "t2"]
    assert len(desk.scheduler.tasks) == len(desk.scheduler.sessions) == len(desk.ledger.sessions) == 3


def test_peer_bug_24_tasks_of_one_priority_start_in_the_order_of_admission() -> None:
    """OC-CORE-1003."""
    desk = Desk(replica("r0", 2))
    order = [f"t{number}" for number in range(10)]
    started = [name for task in order for name in names(desk.submit(task), "start")]
    while desk.running():
        started += names(desk.end(next(iter(desk.running()))), "start")
    assert started == order


def test_interactive_starts_before_batch_that_waits_longer() -> None:
    """ORCH-3075."""
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("b", BATCH)
    assert desk.submit("i", INTERACTIVE) == ["admit i at 0"]
    assert desk.scheduler.queue.position(desk.seen["b"]) == 1
    assert desk.end("running") == ["finish running succeeded", "start i on r0/0"]
    assert desk.end("i") == ["finish i succeeded", "start b on r0/0"]


def test_peer_bug_04_order_means_the_same_after_a_json_round_trip() -> None:
    """ORCH-3116: plain integers, so nothing of their order is lost on the way."""
    desk = Desk(replica())
    for number in range(12):
        desk.submit(f"t{number}")
    orders = [task.order for task in desk.scheduler.queue]
    assert all(type(order) is int for order in orders)
    assert sorted(json.loads(json.dumps(orders))) == json.loads(json.dumps(sorted(orders))) == orders


def test_requeued_task_takes_its_old_place_and_keeps_its_order() -> None:
    """ORCH-3144."""
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.submit("b")
    desk.submit("c")
    order = desk.seen["a"].order
    assert desk.end("a", LOST) == ["requeue a"]
    assert desk.seen["a"].order == order
    assert desk.waiting() == ["a", "c"]
    assert desk.end("b") == ["finish b succeeded", "start a on r1/0"]


def test_requeue_is_not_bounded_by_the_capacity() -> None:
    desk = Desk(replica(), capacity=1)
    desk.submit("a")
    desk.submit("b")
    assert desk.end("a", LOST) == ["requeue a"]
    assert desk.waiting() == ["a", "b"]
    assert desk.submit("c") == ["reject c ADMISSION_REJECT"]


def test_task_id_of_another_tenant_is_another_task() -> None:
    desk = Desk(replica("r0", 2))
    desk.submit("a")
    own = desk.scheduler.tasks[key("a")]
    assert desk.scheduler.handle(ev.CancelRequested(("other", "a")), desk.now) == []
    assert desk.scheduler.tasks[key("a")] is own


def test_wait_reason_tells_tasks_ahead_from_busy_slots() -> None:
    desk = Desk(replica())
    for name in "abc":
        desk.submit(name)
    assert desk.scheduler.wait_reason(desk.seen["b"]) is WaitReason.SLOTS_BUSY
    assert desk.scheduler.wait_reason(desk.seen["c"]) is WaitReason.TASKS_AHEAD
