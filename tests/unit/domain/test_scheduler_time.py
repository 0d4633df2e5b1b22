"""Deadlines, the wall timeout, readers that leave, sessions and shutdown."""

import pytest

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.pool import ReplicaState
from llorch.domain.task import TaskState
from tests.unit.domain.desk import BATCH, LOST, TENANT, Desk, key, replica

SESSION = (TENANT, "s")


def test_peer_bug_09_deadline_in_the_queue_fires_while_another_task_still_runs() -> None:
    """ORCH-3080."""
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("a", deadline_s=5.0)
    assert desk.scheduler.next_wakeup() == 5.0
    assert desk.after(4.9) == []
    assert desk.after(0.1) == ["finish a failed DEADLINE_UNMET"]
    assert desk.running() == {"running": "r0/0"}


def test_peer_bug_08_task_that_expired_in_the_queue_never_starts() -> None:
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("a", deadline_s=5.0)
    desk.now = 5.0  # the slot comes free at the deadline, before any tick
    assert desk.end("running") == ["finish running succeeded", "finish a failed DEADLINE_UNMET"]
    assert desk.seen["a"].tokens_out == 0
    assert desk.seen["a"].started_at is None


def test_deadline_that_is_over_at_once_ends_the_task_without_a_start() -> None:
    assert Desk(replica()).submit("a", deadline_s=0.0) == ["admit a at 0", "finish a failed DEADLINE_UNMET"]


def test_running_task_past_its_deadline_goes_on_with_finish_and_is_late() -> None:
    """ORCH-3081."""
    desk = Desk(replica())
    desk.submit("a", deadline_s=5.0)
    assert desk.after(5.0) == []
    assert desk.seen["a"].is_late
    assert desk.end("a") == ["finish a succeeded"]


def test_running_task_past_its_deadline_is_aborted_with_abort() -> None:
    desk = Desk(replica())
    desk.submit("a", deadline_s=5.0, abort_late=True)
    assert desk.after(5.0) == ["finish a failed DEADLINE_UNMET", "abort a on r0/0"]
    assert desk.submit("b") == ["admit b at 0"]


def test_late_task_is_not_tried_again() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a", deadline_s=5.0)
    desk.after(5.0)
    assert desk.end("a", LOST) == ["finish a failed DEADLINE_UNMET"]


def test_requeued_task_expires_while_it_waits_again() -> None:
    desk = Desk(replica())
    desk.submit("a", deadline_s=5.0)
    desk.end("a", LOST)
    assert desk.after(5.0) == ["finish a failed DEADLINE_UNMET"]


def test_ended_task_is_not_woken_for_its_deadline() -> None:
    desk = Desk(replica())
    desk.submit("a", deadline_s=5.0)
    desk.end("a")
    assert desk.scheduler.next_wakeup() is None
    assert desk.after(10.0) == []


def test_attempt_beyond_the_wall_timeout_ends_and_its_slot_waits_for_the_engine() -> None:
    """ORCH-3016."""
    desk = Desk(replica(), wall_s=60.0)
    desk.submit("a")
    number = desk.attempt_of("a")
    desk.token("a")
    assert desk.after(60.0) == ["finish a failed DECODE_TIMEOUT", "abort a on r0/0"]
    assert desk.submit("b") == ["admit b at 0"]
    assert desk.end("a", attempt_id=number) == ["start b on r0/0"]


def test_wall_timeout_counts_each_attempt_anew_and_not_the_wait() -> None:
    desk = Desk(replica(), wall_s=60.0)
    desk.submit("a")
    desk.now = 50.0
    desk.end("a", LOST)
    assert desk.scheduler.next_wakeup() is None
    desk.now = 100.0
    desk.change(replica())
    assert desk.scheduler.next_wakeup() == 160.0


def test_next_wakeup_is_the_earliest_of_all_timers() -> None:
    desk = Desk(replica("r0", 2), wall_s=60.0)
    assert desk.scheduler.next_wakeup() is None
    desk.submit("a", deadline_s=30.0)
    desk.submit("b", deadline_s=20.0)
    assert desk.scheduler.next_wakeup() == 20.0
    desk.end("b")
    assert desk.scheduler.next_wakeup() == 30.0
    desk.after(30.0)
    assert desk.scheduler.next_wakeup() == 60.0


# Readers


def unread(*joins: str) -> Desk:
    desk = Desk(replica())
    desk.submit("a", cancel_unread=True)
    for _ in joins:
        desk.join("a")
    return desk


def test_task_is_canceled_a_grace_after_its_last_reader_left() -> None:
    """ORCH-2013."""
    desk = unread("x", "y")
    desk.leave("a")
    assert desk.after(100.0) == []
    desk.leave("a")
    assert desk.after(9.9) == []
    assert desk.after(0.1) == ["finish a canceled CANCELED", "abort a on r0/0"]
    assert desk.seen["a"].fault is not None
    assert desk.seen["a"].fault.policy_label == "reader-gone"


def test_reader_who_comes_back_in_time_keeps_the_task_alive() -> None:
    desk = unread("x")
    desk.leave("a")
    desk.after(9.0)
    desk.join("a")
    assert desk.after(100.0) == []
    desk.leave("a")
    assert desk.after(9.9) == []
    assert desk.after(0.1) == ["finish a canceled CANCELED", "abort a on r0/0"]


def test_task_that_nobody_followed_runs_to_its_end() -> None:
    """ORCH-2039."""
    desk = unread()
    assert desk.after(500.0) == []
    assert desk.end("a") == ["finish a succeeded"]


def test_task_that_continues_does_not_mind_readers_leaving() -> None:
    desk = Desk(replica())
    desk.submit("a", cancel_unread=False)
    desk.join("a")
    desk.leave("a")
    assert desk.after(500.0) == []


def test_waiting_task_whose_reader_left_leaves_the_queue() -> None:
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("a", cancel_unread=True)
    desk.join("a")
    desk.leave("a")
    assert desk.after(10.0) == ["finish a canceled CANCELED"]
    assert desk.waiting() == []


def test_readers_of_an_ended_task_come_and_go_without_effect() -> None:
    desk = unread("x")
    desk.end("a")
    desk.leave("a")
    desk.join("a")
    assert desk.scheduler.next_wakeup() is None


# Sessions


def test_session_has_so_many_turns_and_says_when_it_can_be_used_anew() -> None:
    """ORCH-2043, peer_bug_26 for sessions: the wait is the caller's own."""
    desk = Desk(replica("r0", 8), turns=2, wall_s=3600.0)
    desk.submit("a", session="s")
    desk.now = 100.0
    desk.submit("b", session="s")
    desk.now = 150.0
    assert desk.submit("c", session="s") == ["reject c BUDGET_EXHAUSTED"]
    [command] = desk.commands
    assert isinstance(command, ev.Reject)
    assert (command.fault.policy_label, command.fault.retry_after_ms) == ("session-turns", 550_000)
    desk.now = 700.0
    assert desk.submit("c", session="s") == ["admit c at 0", "start c on r0/2"]


def test_peer_bug_07_turns_are_taken_in_the_post_that_admits() -> None:
    desk = Desk(replica(state=ReplicaState.LOADING), turns=3)
    told = [desk.submit(f"t{number}", session="s")[0].split()[0] for number in range(6)]
    assert told == ["admit"] * 3 + ["reject"] * 3
    session = desk.ledger.sessions.get(SESSION, 0.0)
    assert session is not None
    assert session.turns == 3


def test_peer_bug_07_routes_share_the_turns_of_a_session() -> None:
    ledger = Ledger(SessionLimits(turns=1))
    one, other = Desk(replica("x"), ledger=ledger), Desk(replica("y"), ledger=ledger)
    one.submit("a", session="s")
    assert other.submit("b", session="s") == ["reject b BUDGET_EXHAUSTED"]


def test_deleting_a_session_cancels_its_tasks_and_no_others() -> None:
    """ORCH-2005."""
    desk = Desk(replica("r0", 2), turns=3)
    desk.submit("other", session="t")
    for name in "abc":
        desk.submit(name, BATCH, session="s")
    assert desk.handle(ev.SessionDeleted(SESSION)) == [
        "finish a canceled CANCELED",
        "abort a on r0/1",
        "finish b canceled CANCELED",
        "finish c canceled CANCELED",
    ]
    assert desk.running() == {"other": "r0/0"}
    assert desk.ledger.sessions.get(SESSION, 0.0) is None
    assert desk.submit("d", session="s") == ["admit d at 0"]


def test_tasks_of_an_expired_session_go_on_and_can_still_be_deleted() -> None:
    desk = Desk(replica(), wall_s=3600.0)
    desk.submit("a", session="s")
    desk.now = 599.0
    desk.submit("b", session="s")
    assert desk.after(600.0) == []
    assert desk.ledger.sessions.get(SESSION, desk.now) is None
    assert (desk.running(), desk.waiting()) == ({"a": "r0/0"}, ["b"])
    assert desk.handle(ev.SessionDeleted(SESSION)) == [
        "finish a canceled CANCELED",
        "abort a on r0/0",
        "finish b canceled CANCELED",
    ]


# Shutdown


def test_shutdown_ends_what_waits_and_lets_run_what_runs() -> None:
    """ORCH-3114."""
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("a")
    desk.submit("b", BATCH)
    assert desk.handle(ev.ShutdownRequested(30.0)) == [
        "finish a failed POOL_UNAVAILABLE",
        "finish b failed POOL_UNAVAILABLE",
    ]
    fault = desk.seen["a"].fault
    assert fault is not None
    assert (fault.kind.retriable, fault.policy_label) == (True, "shutdown")
    for waited_s, told_ms in ((12.5, 17_500), (17.4, 1000)):
        desk.now += waited_s
        assert desk.submit("late") == ["reject late POOL_UNAVAILABLE"]
        assert isinstance(desk.commands[0], ev.Reject)
        assert desk.commands[0].fault.retry_after_ms == told_ms, "until the grace is over, and never at once"
    assert desk.end("running") == ["finish running succeeded"]


def test_what_still_runs_after_the_grace_is_aborted() -> None:
    desk = Desk(replica("r0", 2))
    desk.submit("a")
    desk.submit("b")
    desk.handle(ev.ShutdownRequested(30.0))
    desk.end("a")
    assert desk.after(29.9) == []
    assert desk.after(0.1) == ["finish b failed POOL_UNAVAILABLE", "abort b on r0/1"]


def test_shutdown_without_grace_aborts_at_once() -> None:
    desk = Desk(replica())
    desk.submit("a")
    assert desk.handle(ev.ShutdownRequested(0.0)) == ["finish a failed POOL_UNAVAILABLE", "abort a on r0/0"]


def test_second_shutdown_can_shorten_the_grace() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.handle(ev.ShutdownRequested(30.0))
    assert desk.handle(ev.ShutdownRequested(0.0)) == ["finish a failed POOL_UNAVAILABLE", "abort a on r0/0"]


def test_nothing_is_requeued_while_closing() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.handle(ev.ShutdownRequested(30.0))
    assert desk.end("a", LOST) == ["finish a failed POOL_UNAVAILABLE"]


@pytest.mark.parametrize("state", [TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED])
def test_task_tells_its_whole_way(state: TaskState) -> None:
    desk = Desk(replica())
    desk.submit("a", deadline_s=1.0)
    desk.end("a", LOST)
    if state is TaskState.CANCELED:
        desk.cancel("a")
    elif state is TaskState.FAILED:
        desk.after(1.0)
    else:
        desk.change(replica())
        desk.end("a")
    way = [TaskState.QUEUED, TaskState.RUNNING, TaskState.QUEUED]
    if state is TaskState.SUCCEEDED:
        way.append(TaskState.RUNNING)
    assert desk.seen["a"].history == [*way, state]
    assert key("a") not in desk.scheduler.tasks
