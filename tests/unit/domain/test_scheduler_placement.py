"""Where tasks start: load, readiness, exact replicas and cohorts."""

from llorch.domain.pool import ReplicaState
from llorch.domain.task import Fault, WaitReason
from llorch.errors import DecodeTimeout, InvalidParams, PoolUnready
from tests.unit.domain.desk import BATCH, LOST, Desk, names, replica


def test_task_goes_to_the_least_loaded_replica() -> None:
    """ORCH-3010: load is leased slots over slots."""
    desk = Desk(replica("big", 4), replica("small", 2))
    for name in "abcdef":
        desk.submit(name)
    assert desk.running() == {
        "a": "big/0",  # 0 against 0: the first configured
        "b": "small/0",  # 1/4 against 0
        "c": "big/1",  # 1/4 against 1/2
        "d": "big/2",  # 2/4 against 1/2: the first configured
        "e": "small/1",  # 3/4 against 1/2
        "f": "big/3",
    }


def test_peer_bug_11_a_burst_spreads_over_the_replicas() -> None:
    """ORCH-3140: choosing and leasing are one step, also for many starts of one post."""
    loading = [replica(f"r{number}", 2, state=ReplicaState.LOADING) for number in range(4)]
    desk = Desk(*loading)
    for number in range(8):
        desk.submit(f"t{number}")
    for number in range(3):
        desk.change(replica(f"r{number}", 2))
    assert sorted(desk.running().values()) == ["r0/0", "r0/1", "r1/0", "r1/1", "r2/0", "r2/1"]
    idle = Desk(*(replica(f"r{number}", 2) for number in range(4)))
    for number in range(4):
        idle.submit(f"t{number}")
    assert sorted(idle.running().values()) == ["r0/0", "r1/0", "r2/0", "r3/0"]


def test_slot_numbers_of_a_replica_are_reused_from_the_lowest() -> None:
    desk = Desk(replica("r0", 3))
    for name in "abc":
        desk.submit(name)
    desk.end("b")
    assert desk.submit("d") == ["admit d at 0", "start d on r0/1"]


def test_peer_bug_10_a_replica_that_fails_fast_takes_nothing_until_it_is_ready_again() -> None:
    """ORCH-3145."""
    desk = Desk(replica("bad"), replica("good"))
    desk.submit("a")
    desk.submit("b")
    assert desk.end("a", LOST) == ["requeue a"]
    for number in range(5):
        assert desk.submit(f"t{number}") == [f"admit t{number} at {number + 1}"]
    assert desk.end("b") == ["finish b succeeded", "start a on good/0"]
    assert desk.change(replica("bad")) == ["start t0 on bad/0"]


def test_peer_bug_10_a_silent_replica_is_suspect_too() -> None:
    desk = Desk(replica())
    desk.submit("a")
    assert desk.end("a", Fault(DecodeTimeout, "silent")) == ["finish a failed DECODE_TIMEOUT"]
    assert desk.submit("b") == ["admit b at 0"]


def test_fault_of_the_request_does_not_speak_against_the_replica() -> None:
    """ORCH-3153."""
    desk = Desk(replica())
    desk.submit("a")
    desk.submit("b")
    fault = Fault(InvalidParams, "a bad grammar")
    assert desk.end("a", fault) == ["finish a failed INVALID_PARAMS", "start b on r0/0"]


def test_late_fault_of_an_old_attempt_makes_its_replica_suspect() -> None:
    desk = Desk(replica())
    desk.submit("a")
    number = desk.attempt_of("a")
    desk.cancel("a")
    assert desk.end("a", LOST, attempt_id=number) == []
    assert desk.submit("b") == ["admit b at 0"]


def test_suspect_replica_that_drains_stays_draining() -> None:
    desk = Desk(replica())
    desk.submit("a")
    desk.change(replica(state=ReplicaState.DRAINING))
    desk.end("a", LOST)
    known = desk.scheduler.fleet.get("r0")
    assert known is not None
    assert known.state is ReplicaState.DRAINING


def test_strict_task_starts_on_an_exact_replica_only() -> None:
    """ORCH-3147."""
    desk = Desk(replica("loose", 4), replica("exact", 1))
    assert desk.submit("s1", strict=True) == ["admit s1 at 0", "start s1 on exact/0"]
    assert desk.submit("s2", strict=True) == ["admit s2 at 0"]
    assert desk.end("s1") == ["finish s1 succeeded", "start s2 on exact/0"]


def test_strict_task_is_refused_when_no_exact_replica_can_come() -> None:
    desk = Desk(replica("loose", 2), replica("exact", 1, state=ReplicaState.FAILED))
    assert desk.submit("s", strict=True) == ["reject s POOL_UNREADY"]
    assert desk.submit("a") == ["admit a at 0", "start a on loose/0"]


def test_strict_task_says_that_it_waits_for_an_exact_replica() -> None:
    desk = Desk(replica("loose", 2), replica("exact", state=ReplicaState.LOADING))
    desk.submit("s", strict=True)
    assert desk.scheduler.wait_reason(desk.seen["s"]) is WaitReason.NO_EXACT_REPLICA


def test_waiting_strict_head_is_passed_over_only_for_a_slot_that_it_may_not_use() -> None:
    """ORCH-3148."""
    desk = Desk(replica("loose", 2), replica("exact", 1))
    desk.submit("s1", strict=True)
    desk.submit("a1")
    desk.submit("a2")
    assert desk.submit("s2", strict=True) == ["admit s2 at 0"]
    assert desk.submit("a3") == ["admit a3 at 1"]
    assert desk.end("s1") == ["finish s1 succeeded", "start s2 on exact/0"]
    assert desk.end("a1") == ["finish a1 succeeded", "start a3 on loose/0"]


def test_task_behind_a_strict_head_takes_a_slot_that_the_head_may_not_use() -> None:
    desk = Desk(replica("loose", 2), replica("exact", 1, state=ReplicaState.LOADING))
    desk.submit("s", strict=True)
    assert desk.submit("a") == ["admit a at 1", "start a on loose/0"]
    desk.submit("b", BATCH)
    assert desk.waiting() == ["s"]
    assert desk.submit("c") == ["admit c at 1"]
    assert desk.change(replica("exact", 1)) == ["start s on exact/0"]


def test_waiting_interactive_strict_task_does_not_hold_slots_back_from_batch() -> None:
    desk = Desk(replica("loose", 2), replica("exact", 1, state=ReplicaState.LOADING))
    desk.submit("s", strict=True)
    assert names(desk.submit("b", BATCH), "start") == ["b"]


def test_older_loose_task_goes_first_on_an_exact_replica() -> None:
    """Nobody overtakes: what may run anywhere has its turn on an exact replica, too."""
    desk = Desk(replica("exact", 1))
    desk.submit("running")
    desk.submit("loose")
    desk.submit("strict", strict=True)
    assert desk.end("running") == ["finish running succeeded", "start loose on exact/0"]


def test_strict_task_is_pinned_to_the_cohort_of_its_first_start() -> None:
    """ORCH-3149."""
    old, new = replica("old", version="v1"), replica("new", version="v2")
    desk = Desk(old)
    desk.submit("s", strict=True)
    desk.change(new)
    assert desk.end("s", LOST) == ["requeue s"]
    assert desk.submit("t", strict=True) == ["admit t at 1", "start t on new/0"]
    assert desk.change(old) == ["start s on old/0"]


def test_loose_task_is_retried_in_any_cohort() -> None:
    desk = Desk(replica("old", version="v1"), replica("new", 2, version="v2"))
    desk.submit("a")
    assert desk.end("a", LOST) == ["requeue a", "start a on new/0"]


def test_task_that_nothing_can_take_any_more_does_not_wait_in_vain() -> None:
    desk = Desk(replica("r0", state=ReplicaState.LOADING), replica("r1", 2, state=ReplicaState.LOADING))
    desk.submit("s", strict=True)
    desk.submit("a")
    assert desk.change(replica("r0", state=ReplicaState.FAILED)) == ["finish s failed POOL_UNREADY"]
    assert desk.change(replica("r1", 2, state=ReplicaState.STOPPED)) == ["finish a failed POOL_UNREADY"]


def test_task_whose_cohort_was_replaced_does_not_wait_in_vain() -> None:
    desk = Desk(replica("r0"))
    desk.submit("s", strict=True)
    desk.end("s", LOST)
    assert desk.change(replica("r0", version="v2")) == ["finish s failed POOL_UNREADY"]


def test_task_whose_replica_failed_for_good_before_its_attempt_ended_does_not_wait_in_vain() -> None:
    """The process is known to be dead before its connection breaks off."""
    desk = Desk(replica())
    desk.submit("a")
    desk.change(replica(state=ReplicaState.FAILED))
    assert desk.end("a", LOST) == ["finish a failed POOL_UNREADY"]


def test_running_task_survives_its_replica_being_told_not_ready() -> None:
    desk = Desk(replica())
    desk.submit("a")
    assert desk.change(replica(state=ReplicaState.UNREADY)) == []
    assert desk.end("a") == ["finish a succeeded"]


def test_replica_found_loading_is_a_fault_that_is_retried() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("a")
    assert desk.end("a", Fault(PoolUnready, "loading")) == ["requeue a", "start a on r1/0"]
