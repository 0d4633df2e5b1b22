"""Slots, attempts, cancel and retry."""

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Fault
from llorch.errors import DecodeTimeout, Internal, PoolUnready, WorkerReset
from tests.unit.domain.desk import BATCH, LOST, Desk, key, names, replica


def test_peer_bug_01_cancel_of_a_queued_task_touches_no_running_one() -> None:
    """ORCH-2003."""
    desk = Desk(replica())
    desk.submit("active")
    desk.submit("waiting")
    attempt = desk.seen["active"].attempt
    assert desk.cancel("waiting") == ["finish waiting canceled CANCELED"]
    assert desk.seen["active"].attempt is attempt
    assert [lease.releasing for lease in desk.ledger.leases()] == [False]


def test_peer_bug_01_cancel_after_a_retry_reaches_the_present_attempt_only() -> None:
    desk = Desk(replica("r0"), replica("r1", 2))
    desk.submit("a")
    desk.end("a", LOST)
    desk.submit("b")
    assert desk.cancel("a") == ["finish a canceled CANCELED", "abort a on r1/0"]
    assert desk.running() == {"b": "r1/1"}


def test_peer_bug_02_a_canceled_task_leaves_the_queue_at_once() -> None:
    """ORCH-2040."""
    desk = Desk(replica())
    for name in "abc":
        desk.submit(name)
    desk.cancel("b")
    assert desk.waiting() == ["c"]
    assert desk.scheduler.queue.position(desk.seen["c"]) == 0
    assert desk.end("a") == ["finish a succeeded", "start c on r0/0"]


def test_peer_bug_03_a_queued_task_is_started_once_whoever_makes_room() -> None:
    desk = Desk(replica("r0"), replica("r1"), replica("r2", state=ReplicaState.LOADING))
    for name in "abc":
        desk.submit(name)
    started = names(desk.end("a"), "start") + names(desk.end("b"), "start")
    started += names(desk.change(replica("r2")), "start") + names(desk.after(0.0), "start")
    assert started == ["c"]


def test_peer_bug_05_slot_of_an_attempt_canceled_before_its_first_step_comes_back() -> None:
    desk = Desk(replica())
    for _ in range(3):
        desk.submit("a")
        number = desk.attempt_of("a")
        desk.cancel("a")
        assert desk.ledger.busy_slots("r0") == 1
        desk.end("a", attempt_id=number)
        assert desk.ledger.busy_slots("r0") == 0
        assert desk.ledger.leases() == []


def test_slot_of_a_canceled_task_is_taken_until_the_engine_let_go() -> None:
    """ORCH-3141."""
    desk = Desk(replica())
    desk.submit("a")
    desk.submit("b")
    number = desk.attempt_of("a")
    assert desk.cancel("a") == ["finish a canceled CANCELED", "abort a on r0/0"]
    assert [lease.releasing for lease in desk.ledger.leases()] == [True]
    assert desk.submit("c") == ["admit c at 1"]
    assert desk.after(1000.0) == []
    assert desk.end("a", attempt_id=number) == ["start b on r0/0"]


def test_second_cancel_changes_nothing() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.cancel("a")
    assert desk.cancel("a") == []
    assert desk.cancel("never was") == []


def test_cancel_of_a_finished_task_keeps_its_outcome() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.end("a")
    assert desk.cancel("a") == []
    assert desk.seen["a"].fault is None


def test_duplicate_end_of_an_attempt_settles_once() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.submit("b")
    number = desk.attempt_of("a")
    desk.end("a")
    assert desk.end("a", attempt_id=number) == []
    assert desk.end("a", LOST, attempt_id=number) == []
    assert desk.running() == {"b": "r0/0"}
    assert desk.ledger.busy_slots("r0") == 1


def test_end_of_an_attempt_that_never_was_changes_nothing() -> None:
    desk = Desk(replica())
    desk.submit("a")
    assert desk.end("a", attempt_id=99) == []
    assert desk.running() == {"a": "r0/0"}


def test_events_of_an_old_attempt_do_not_reach_the_task() -> None:
    """ORCH-3142."""
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    old = desk.attempt_of("a")
    desk.end("a", LOST)
    desk.handle(ev.FirstToken(key("a"), old))
    desk.handle(ev.TokensProduced(key("a"), old, 7))
    task = desk.seen["a"]
    assert (task.tokens_out, task.first_token_at) == (0, None)
    assert desk.end("a", LOST) == ["requeue a"]  # it may be retried: no token of its own was seen


def test_tokens_of_the_present_attempt_are_counted() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.now = 3.0
    desk.token("a")
    for count in (1, 32, 4):
        assert desk.handle(ev.TokensProduced(key("a"), desk.attempt_of("a"), count)) == []
    assert (desk.seen["a"].tokens_out, desk.seen["a"].first_token_at) == (37, 3.0)


def test_end_of_an_old_attempt_of_a_task_id_that_runs_again_frees_its_slot_only() -> None:
    desk = Desk(replica("r0", 2))
    desk.submit("a")
    old = desk.attempt_of("a")
    desk.cancel("a")
    assert desk.submit("a") == ["admit a at 0", "start a on r0/1"]
    assert desk.end("a", attempt_id=old) == []
    assert desk.running() == {"a": "r0/1"}
    assert desk.ledger.busy_slots("r0") == 1


def test_attempt_that_fails_before_its_first_token_is_retried_elsewhere() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    first = desk.attempt_of("a")
    assert desk.end("a", LOST) == ["requeue a", "start a on r1/0"]
    assert desk.attempt_of("a") > first
    assert desk.seen["a"].attempts == 2


def test_third_failing_attempt_is_the_last() -> None:
    """ORCH-3144."""
    desk = Desk(replica())
    desk.submit("a")
    for _ in range(2):
        assert desk.end("a", LOST) == ["requeue a"]
        desk.change(replica())
    assert desk.end("a", LOST) == ["finish a failed REPLICA_EXHAUSTED"]


def test_peer_bug_20_no_retry_after_the_first_token() -> None:
    """ORCH-3146: the output of two attempts is never joined."""
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    desk.token("a")
    assert desk.end("a", LOST) == ["finish a failed WORKER_RESET"]
    assert desk.seen["a"].fault is not None
    assert desk.seen["a"].fault.kind.retriable


def test_bug_in_an_adapter_ends_the_task_and_is_not_retried() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    assert desk.end("a", Fault(Internal)) == ["finish a failed INTERNAL"]
    assert desk.submit("b") == ["admit b at 0", "start b on r0/0"]


def test_requeued_task_can_be_canceled() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.end("a", Fault(PoolUnready))
    assert desk.cancel("a") == ["finish a canceled CANCELED"]
    assert desk.waiting() == []


def test_task_that_waits_for_a_retry_lets_interactive_go_first_when_it_is_batch() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("b", BATCH)
    desk.submit("i")
    desk.submit("j")
    desk.end("b", Fault(WorkerReset))
    assert desk.waiting() == ["j", "b"]


def test_ended_task_leaves_nothing_behind() -> None:
    desk = Desk(replica())
    desk.submit("a", deadline_s=5.0, cancel_unread=True)
    desk.join("a")
    desk.leave("a")
    desk.end("a")
    scheduler = desk.scheduler
    assert not scheduler.tasks
    assert not scheduler.attempts
    assert not scheduler.sessions
    assert desk.ledger.leases() == []
    assert scheduler.next_wakeup() is None


def test_stalled_attempt_ends_its_task_at_once_and_keeps_its_slot_until_the_engine_let_go() -> None:
    """ORCH-3016, ORCH-3141."""
    desk = Desk(replica())
    desk.submit("a")
    number = desk.attempt_of("a")
    stalled = ev.AttemptStalled(key("a"), number, Fault(DecodeTimeout))
    assert desk.handle(stalled) == ["finish a failed DECODE_TIMEOUT", "abort a on r0/0"]
    assert [lease.releasing for lease in desk.ledger.leases()] == [True]
    assert desk.handle(stalled) == []
    desk.end("a", attempt_id=number)
    assert desk.ledger.leases() == []


def test_stalled_attempt_takes_its_replica_out_of_service_until_a_probe_finds_it_ready() -> None:
    desk = Desk(replica())
    desk.submit("a")
    number = desk.attempt_of("a")
    desk.handle(ev.AttemptStalled(key("a"), number, Fault(DecodeTimeout)))
    desk.end("a", attempt_id=number)
    assert desk.submit("b") == ["admit b at 0"]
    assert desk.change(replica()) == ["start b on r0/0"]


def test_stall_of_a_canceled_attempt_changes_nothing() -> None:
    desk = Desk(replica("r0", 2))
    desk.submit("a")
    number = desk.attempt_of("a")
    desk.cancel("a")
    assert desk.stall("a", attempt_id=number) == []
    assert desk.submit("b") == ["admit b at 0", "start b on r0/1"]
