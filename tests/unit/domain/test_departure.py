"""Replicas that leave while tasks run there and wait for them (ORCH-3154, ORCH-3158)."""

from dataclasses import replace

import pytest

from llorch.domain import events as ev
from llorch.domain.faults import DRAINED, MOVED
from llorch.domain.policy import PreemptionPolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Fault, WaitReason
from llorch.errors import Canceled
from tests.unit.domain.desk import BATCH, LOST, Desk, key, replica

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


def test_moved_attempt_that_falls_silent_speaks_against_its_replica_and_its_task_goes_on() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    vacate(desk)
    assert desk.stall("a") == []
    assert desk.scheduler.fleet.ready_count == 1
    assert desk.end("a", BROKEN_OFF) == ["requeue a", "start a on r1/0"]


def test_moved_task_that_ran_to_its_end_all_the_same_has_succeeded() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    vacate(desk)
    assert desk.end("a") == ["finish a succeeded"]


def test_moved_task_whose_last_resort_goes_meanwhile_ends_as_drained() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.change(leaving(replica("r0")))
    vacate(desk)
    desk.handle(ev.ReplicaRemoved("r1"))
    assert desk.end("a", BROKEN_OFF) == ["finish a failed POOL_UNAVAILABLE"]
    assert desk.seen["a"].fault is DRAINED


def test_no_room_is_made_on_a_replica_that_starts_nothing() -> None:
    """ORCH-3085: its slot would be of no use to the one that waits."""
    desk = Desk(replica("r0"), replica("r1"), preemption=PreemptionPolicy(hard=True))
    desk.submit("old", BATCH)
    desk.submit("new", BATCH)
    desk.change(leaving(replica("r1")))
    assert desk.submit("urgent") == ["admit urgent at 0", "abort old on r0/0"]


def test_no_cache_is_emptied_on_a_replica_that_is_gone() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a", session="s")
    number = desk.attempt_of("a")
    desk.handle(ev.SessionDeleted(key("s")))
    desk.handle(ev.ReplicaRemoved("r0"))
    assert desk.end("a", attempt_id=number) == []


def test_lease_of_a_removed_replica_fills_a_slot_of_the_one_that_comes_under_its_id() -> None:
    """ORCH-3140: whether a slot is free is decided by leases alone."""
    desk = Desk(replica("r0"))
    desk.submit("a")
    desk.handle(ev.ReplicaRemoved("r0"))
    desk.change(replica("r0"))
    assert desk.submit("b") == ["admit b at 0"]
    assert desk.end("a") == ["finish a succeeded", "start b on r0/0"]


def test_who_waits_for_removed_replicas_is_told_so() -> None:
    desk = Desk(replica("r0"), replica("r1", state=ReplicaState.STARTING))
    desk.submit("a")
    desk.submit("b")
    desk.handle(ev.ReplicaRemoved("r0"))
    task = desk.seen["b"]
    assert desk.scheduler.wait_reason(task) is WaitReason.NO_READY_REPLICA
    assert desk.scheduler.predict(task, desk.now) == (None, None)
