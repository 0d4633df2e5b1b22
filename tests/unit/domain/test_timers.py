"""The timetable by itself."""

from llorch.domain.timers import Timer, Timers
from tests.unit.domain.desk import key

A, B = key("a"), key("b")


def test_due_timers_come_earliest_first_and_once() -> None:
    timers = Timers()
    timers.set(A, Timer.WALL, 3.0)
    timers.set(B, Timer.DEADLINE, 1.0)
    timers.set(A, Timer.DEADLINE, 2.0)
    timers.set(B, Timer.UNREAD, 4.0)
    assert timers.next_at() == 1.0
    assert timers.pop_due(3.0) == [(B, Timer.DEADLINE), (A, Timer.DEADLINE), (A, Timer.WALL)]
    assert timers.pop_due(3.0) == []
    assert timers.next_at() == 4.0


def test_setting_a_timer_again_moves_it() -> None:
    timers = Timers()
    timers.set(A, Timer.UNREAD, 1.0)
    timers.set(A, Timer.UNREAD, 5.0)
    assert len(timers) == 1
    assert timers.pop_due(4.0) == []
    assert timers.pop_due(5.0) == [(A, Timer.UNREAD)]


def test_cleared_timers_never_come_and_may_be_cleared_again() -> None:
    timers = Timers()
    for timer in Timer:
        timers.set(A, timer, 1.0)
    timers.set(B, Timer.WALL, 1.0)
    timers.clear(A, Timer.WALL)
    timers.clear(A, Timer.WALL)
    timers.clear_all(A)
    assert timers.pop_due(1.0) == [(B, Timer.WALL)]
    assert timers.next_at() is None


def test_peer_bug_15_moved_and_cleared_timers_leave_nothing_behind() -> None:
    timers = Timers()
    for second in range(1000):
        timers.set(A, Timer.UNREAD, float(second))
    timers.clear_all(A)
    assert len(timers) == 0
    assert timers.next_at() is None
