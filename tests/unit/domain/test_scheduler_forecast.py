"""What a route foretells, and whom it refuses for it."""

import pytest

from llorch.domain import events as ev
from llorch.errors import DeadlineUnmet
from tests.unit.domain.desk import Desk, replica


def practised(*, tasks: int = 30, run_s: float = 2.0, **wishes: object) -> Desk:
    """A route that has seen enough tasks of the same length to know its rates; nothing runs."""
    desk = Desk(replica(), **wishes)  # type: ignore[arg-type]
    for number in range(tasks):
        name = f"past{number}"
        desk.submit(name, prompt_tokens=10)
        desk.now += run_s / 4
        desk.tokens(name, 16)
        desk.now += 3 * run_s / 4
        desk.end(name)
    return desk


def test_nothing_is_foretold_while_rates_are_unknown() -> None:
    """ORCH-3079: and nobody is refused for it."""
    desk = Desk(replica())
    desk.submit("running")
    desk.submit("a", deadline_s=0.001)
    assert desk.seen["a"].predicted_wait is None
    assert desk.seen["a"].on_time_probability is None


def test_task_that_starts_at_once_is_told_so() -> None:
    desk = practised()
    desk.submit("a", prompt_tokens=10)
    wait = desk.seen["a"].predicted_wait
    assert wait is not None
    assert wait.mean_s == 0.0


def test_wait_grows_by_a_service_time_for_each_task_ahead() -> None:
    """ORCH-3029."""
    desk = practised(run_s=2.0)
    for name in "abcd":
        desk.submit(name, prompt_tokens=10)
    waits = [desk.seen[name].predicted_wait for name in "bcd"]
    told = [wait.mean_s for wait in waits if wait is not None]
    assert told[1] - told[0] == pytest.approx(2.0, rel=0.1)
    assert told[2] - told[1] == pytest.approx(2.0, rel=0.1)


def test_infeasible_deadline_is_refused_at_once_with_the_predicted_wait() -> None:
    """ORCH-3079: the refusal changes nothing."""
    desk = practised(run_s=2.0)
    for name in "abc":
        desk.submit(name, prompt_tokens=10)
    assert desk.submit("d", prompt_tokens=10, deadline_s=1.0) == ["reject d DEADLINE_UNMET"]
    refusal = desk.commands[0]
    assert isinstance(refusal, ev.Reject)
    assert refusal.fault.kind is DeadlineUnmet
    assert refusal.fault.details is not None
    assert refusal.fault.details["predicted_start_ms"] == pytest.approx(5000, rel=0.25)
    assert refusal.fault.retry_after_ms is not None
    assert desk.waiting() == ["b", "c"]
    assert desk.submit("e", prompt_tokens=10, deadline_s=60.0)[0].startswith("admit e")


def test_task_whose_turn_comes_too_late_is_ended_not_started() -> None:
    """ORCH-3080, peer_bug_08: never a success, and its slot serves one that can still make it."""
    desk = practised(run_s=2.0)
    desk.submit("a", prompt_tokens=10)
    desk.submit("b", prompt_tokens=10, deadline_s=5.0)
    desk.submit("c", prompt_tokens=10)
    desk.now += 4.5
    assert desk.end("a") == ["finish a succeeded", "finish b failed DEADLINE_UNMET", "start c on r0/0"]


def test_chance_falls_as_the_deadline_comes_nearer() -> None:
    desk = practised(run_s=2.0)
    desk.submit("a", prompt_tokens=10)
    desk.submit("b", prompt_tokens=10, deadline_s=4.2)
    task = desk.seen["b"]
    _, early = desk.scheduler.predict(task, desk.now)
    _, late = desk.scheduler.predict(task, desk.now + 3.0)
    assert early is not None
    assert late is not None
    assert 0.0 <= late < early <= 1.0


def test_refusal_by_a_full_queue_says_when_a_place_is_free() -> None:
    """ORCH-2007: from the measured drain rate."""
    desk = practised(run_s=2.0, capacity=1)
    desk.submit("a", prompt_tokens=10)
    desk.submit("b", prompt_tokens=10)
    assert desk.submit("c", prompt_tokens=10) == ["reject c ADMISSION_REJECT"]
    refusal = desk.commands[0]
    assert isinstance(refusal, ev.Reject)
    assert refusal.fault.retry_after_ms == pytest.approx(2000, rel=0.2)


def test_nothing_is_foretold_without_a_ready_replica() -> None:
    from llorch.domain.pool import ReplicaState

    desk = practised()
    desk.change(replica(state=ReplicaState.UNREADY))
    desk.submit("a")
    assert desk.seen["a"].predicted_wait is None
