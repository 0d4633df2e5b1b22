"""Breaking off running work for more urgent work, and placing sessions where they were."""

import pytest

from llorch.domain import events as ev
from llorch.domain.policy import PreemptionPolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Affinity, Fault
from llorch.errors import Canceled
from tests.unit.domain.desk import BATCH, Desk, replica

HARD = PreemptionPolicy(hard=True)
BROKEN_OFF = Fault(Canceled, "told to stop")


def preempted(desk: Desk, name: str) -> list[str]:
    """The engine let go of what was told to make room."""
    return desk.end(name, BROKEN_OFF)


def test_urgent_task_makes_running_batch_work_give_up_its_slot() -> None:
    """ORCH-3085: aborted, requeued at its flow's head, resumed when there is room."""
    desk = Desk(replica(), preemption=HARD)
    desk.submit("batch", BATCH)
    desk.submit("next", BATCH)
    desk.tokens("batch", 4)
    assert desk.submit("urgent") == ["admit urgent at 0", "abort batch on r0/0"]
    assert preempted(desk, "batch") == ["requeue batch", "start urgent on r0/0"]
    assert desk.waiting() == ["batch", "next"]
    assert desk.end("urgent") == ["finish urgent succeeded", "start batch on r0/0"]
    attempt = desk.seen["batch"].attempt
    assert attempt is not None
    assert attempt.tokens_before == 4


def test_soft_preemption_stops_nothing_that_runs() -> None:
    desk = Desk(replica(), preemption=PreemptionPolicy(hard=False))
    desk.submit("batch", BATCH)
    assert desk.submit("urgent") == ["admit urgent at 0"]


def test_no_task_is_broken_off_past_half_of_its_progress() -> None:
    """ORCH-3086."""
    desk = Desk(replica(slots=2), preemption=HARD)
    desk.submit("far", BATCH)
    desk.submit("near", BATCH)
    desk.tokens("near", 9)
    desk.tokens("far", 8)
    assert desk.submit("urgent") == ["admit urgent at 0", "abort far on r0/0"]


@pytest.mark.parametrize("wishes", [{"can_continue": False}, {"can_continue": False, "max_tokens": 20}])
def test_task_that_can_neither_be_replayed_nor_continued_is_left_alone(wishes: dict[str, int]) -> None:
    """ORCH-3087: a grammar is never continued from text."""
    desk = Desk(replica(), preemption=HARD)
    desk.submit("grammar", BATCH, **wishes)
    assert desk.submit("urgent") == ["admit urgent at 0"]


def test_strict_task_can_be_broken_off_whatever_its_text() -> None:
    desk = Desk(replica(), preemption=HARD)
    desk.submit("strict", BATCH, strict=True, can_continue=False)
    assert desk.submit("urgent") == ["admit urgent at 0", "abort strict on r0/0"]


def test_engine_that_cannot_interrupt_is_not_asked_to() -> None:
    desk = Desk(replica(can_interrupt=False), preemption=HARD)
    desk.submit("batch", BATCH)
    assert desk.submit("urgent") == ["admit urgent at 0"]


def test_protected_priority_is_never_broken_off() -> None:
    desk = Desk(replica(), preemption=PreemptionPolicy(hard=True, protected=frozenset({BATCH})))
    desk.submit("batch", BATCH)
    assert desk.submit("urgent") == ["admit urgent at 0"]


def test_task_is_broken_off_twice_at_most() -> None:
    desk = Desk(replica(), preemption=PreemptionPolicy(hard=True, per_minute=100))
    desk.submit("batch", BATCH)
    for number in range(2):
        assert desk.submit(f"urgent{number}")[1] == "abort batch on r0/0"
        preempted(desk, "batch")
        desk.end(f"urgent{number}")
    assert desk.submit("last") == ["admit last at 0"]


def test_allowance_of_a_minute_is_kept_and_comes_back_by_itself() -> None:
    desk = Desk(replica("r0"), replica("r1"), preemption=PreemptionPolicy(hard=True, per_minute=1))
    desk.submit("b0", BATCH)
    desk.submit("b1", BATCH)
    assert desk.submit("u0")[1] == "abort b1 on r1/0"
    assert desk.submit("u1") == ["admit u1 at 1"]
    preempted(desk, "b1")
    assert desk.scheduler.next_wakeup() == pytest.approx(60.0)
    assert desk.after(60.0) == ["abort b0 on r0/0"]


def test_one_slot_is_cleared_for_each_urgent_task_and_no_more() -> None:
    desk = Desk(replica("r0"), replica("r1"), replica("r2"), preemption=HARD)
    for name in ("b0", "b1", "b2"):
        desk.submit(name, BATCH)
    assert desk.submit("u0") == ["admit u0 at 0", "abort b2 on r2/0"]
    desk.join("b0")
    assert desk.after(1.0) == []


def test_preempted_task_can_be_canceled_before_the_engine_let_go() -> None:
    desk = Desk(replica(), preemption=HARD)
    desk.submit("batch", BATCH)
    attempt = desk.attempt_of("batch")
    desk.submit("urgent")
    assert desk.cancel("batch") == ["finish batch canceled CANCELED"]
    assert desk.end("batch", BROKEN_OFF, attempt_id=attempt) == ["start urgent on r0/0"]


def test_preempted_task_that_had_just_ended_has_succeeded() -> None:
    desk = Desk(replica(), preemption=HARD)
    desk.submit("batch", BATCH)
    desk.submit("urgent")
    assert desk.end("batch") == ["finish batch succeeded", "start urgent on r0/0"]


# Affinity and warmth


def affinity(desk: Desk, name: str) -> tuple[Affinity | None, bool | None]:
    attempt = desk.seen[name].attempt
    assert attempt is not None
    return attempt.affinity, attempt.kv_warmth


def test_session_returns_to_its_replica_and_slot() -> None:
    """ORCH-3009, 3022: against the order of the configuration."""
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("other")
    desk.submit("first", session="s")
    assert affinity(desk, "first") == (None, None)
    desk.end("first")
    desk.end("other")
    assert desk.submit("second", session="s")[1] == "start second on r1/0"
    assert affinity(desk, "second") == (Affinity.HIT, True)


def test_slot_that_served_another_session_meanwhile_is_cold() -> None:
    desk = Desk(replica())
    for name, session in (("a", "s"), ("b", "t"), ("c", "s")):
        desk.submit(name, session=session)
        if name != "c":
            desk.end(name)
    assert affinity(desk, "c") == (Affinity.HIT, False)


def test_session_whose_replica_is_busy_goes_elsewhere_and_says_so() -> None:
    """ORCH-3023."""
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("first", session="s")
    desk.end("first")
    desk.submit("other")
    assert desk.submit("second", session="s")[1] == "start second on r1/0"
    assert affinity(desk, "second") == (Affinity.MISS, False)


def test_session_whose_replica_is_gone_is_pinned_anew() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("first", session="s")
    desk.end("first")
    desk.change(replica("r0", state=ReplicaState.UNREADY))
    desk.submit("second", session="s")
    assert affinity(desk, "second") == (Affinity.REPIN, False)


def test_cold_wish_ignores_where_the_session_was() -> None:
    desk = Desk(replica("r0"), replica("r1"))
    desk.submit("other")
    desk.submit("first", session="s")
    desk.end("first")
    desk.end("other")
    assert desk.submit("second", session="s", wants_warm=False)[1] == "start second on r0/0"


def test_deleted_session_is_evicted_from_its_slot_once_that_is_idle() -> None:
    """ORCH-2005."""
    desk = Desk(replica())
    desk.submit("a", session="s")
    attempt = desk.attempt_of("a")
    deleted = desk.handle(ev.SessionDeleted(("acme", "s")))
    assert deleted == ["finish a canceled CANCELED", "abort a on r0/0"]
    assert desk.end("a", BROKEN_OFF, attempt_id=attempt) == ["evict r0/0"]


def test_slot_that_works_for_somebody_else_is_not_evicted() -> None:
    desk = Desk(replica())
    desk.submit("a", session="s")
    desk.end("a")
    desk.submit("b", session="t")
    assert desk.handle(ev.SessionDeleted(("acme", "s"))) == []


# Load that the engine tells of


def test_foreign_load_fills_a_replica_until_the_report_is_stale() -> None:
    """ORCH-3019, peer_bug_18: never a halt."""
    desk = Desk(replica(slots=2))
    desk.handle(ev.EngineLoad("r0", 2))
    assert desk.submit("a") == ["admit a at 0"]
    due = desk.scheduler.next_wakeup()
    assert due is not None
    assert desk.after(due - desk.now) == ["start a on r0/0"]
