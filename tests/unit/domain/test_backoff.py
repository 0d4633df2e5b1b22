"""Restarts: the waits, the breaker, and the number of starts that no storm exceeds."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.backoff import Breaker, RestartPolicy, Restarts

WINDOW_S, MOST_STARTS = 300.0, 6
POLICY = RestartPolicy()
DRAWS = st.floats(0, 1, exclude_max=True)


@dataclass(frozen=True, slots=True)
class Life:
    """One start that fails: after `load_s` it comes up (or never does), and `up_s` later it is dead."""

    comes_up: bool
    load_s: float
    up_s: float
    draw: float


LIVES = st.builds(
    Life,
    comes_up=st.booleans(),
    load_s=st.one_of(st.just(0.0), st.floats(0, 400)),
    up_s=st.one_of(st.just(0.0), st.floats(0, POLICY.stable_s, exclude_max=True)),
    draw=st.one_of(st.just(0.0), DRAWS),
)


def live(restarts: Restarts, life: Life, now: float) -> float:
    """Start at `now`, fail as told; returns when the next start is due."""
    restarts.note_start(now)
    died_at = now + life.load_s
    if life.comes_up:
        restarts.note_up(died_at)
        died_at += life.up_s
    return restarts.note_failure(died_at, life.draw)


def fail(restarts: Restarts, now: float = 0.0, draw: float = 0.0) -> float:
    restarts.note_start(now)
    return restarts.note_failure(now, draw)


def open_breaker(restarts: Restarts) -> float:
    now = 0.0
    for _ in range(POLICY.storm_failures):
        now = fail(restarts, now)
    return now


@given(st.lists(LIVES, min_size=8, max_size=25))
def test_no_window_sees_more_starts_than_promised_whatever_fails(lives: list[Life]) -> None:
    """ORCH-3053: at most 6 starts in any 300 s, also when each comes up first and dies before it is stable."""
    restarts = Restarts()
    now, starts = 0.0, list[float]()
    for life in lives:
        starts.append(now)
        now = live(restarts, life, now)
    crowds = [sum(begin <= start <= begin + WINDOW_S for start in starts) for begin in starts]
    assert max(crowds) <= MOST_STARTS


def test_the_fastest_storm_makes_exactly_the_promised_starts() -> None:
    """The bound is tight: nothing is waited longer than it must."""
    restarts, now, starts = Restarts(), 0.0, list[float]()
    while now <= 400:
        starts.append(now)
        now = fail(restarts, now)
    assert starts == [0, 1, 5, 21, 141, 261, 381]
    assert sum(start <= WINDOW_S for start in starts) == MOST_STARTS


@given(st.lists(LIVES, min_size=1, max_size=25))
def test_next_start_comes_within_one_step_of_any_failure(lives: list[Life]) -> None:
    """ORCH-3053: once the cause is gone, the pool is not kept away for longer than one step."""
    restarts, now = Restarts(), 0.0
    for life in lives:
        restarts.note_start(now)
        due = restarts.note_failure(now, life.draw)
        assert now < due <= now + POLICY.cool_down_s * 1.2
        assert restarts.due == due
        now = due


@given(DRAWS)
def test_jitter_only_lengthens_by_a_fifth_at_most(draw: float) -> None:
    restarts = Restarts()
    waits = [fail(restarts, draw=draw) for _ in range(5)]
    for wait, plain in zip(waits, [1, 4, 16, 120, 120], strict=True):
        assert plain <= wait <= plain * 1.2


def test_waits_grow_up_to_their_limit() -> None:
    restarts = Restarts(RestartPolicy(first_s=1, factor=4, max_s=10, storm_failures=10_000))
    assert [fail(restarts) for _ in range(5_000)][:4] == [1, 4, 10, 10]


def test_breaker_opens_after_the_storm_and_lets_one_start_try() -> None:
    restarts = Restarts()
    due = open_breaker(restarts)
    assert (restarts.breaker, restarts.failures_in_row) == (Breaker.OPEN, 4)
    restarts.note_start(due)
    assert restarts.breaker is Breaker.HALF_OPEN
    assert restarts.due is None
    restarts.note_up(due + 5)
    restarts.settle(due + 64.9)
    assert restarts.breaker is Breaker.HALF_OPEN
    restarts.settle(due + 65)
    assert (restarts.breaker, restarts.failures_in_row) == (Breaker.CLOSED, 0)


def test_failed_trial_opens_the_breaker_again() -> None:
    restarts = Restarts()
    due = open_breaker(restarts)
    restarts.note_start(due)
    assert restarts.note_failure(due + 1, 0.5) == pytest.approx(due + 1 + 132)
    assert restarts.breaker is Breaker.OPEN


def test_refusals_without_a_start_keep_the_breaker_open() -> None:
    """What could not even be started is a failure, and no trial."""
    restarts = Restarts()
    due = open_breaker(restarts)
    assert restarts.note_failure(due, 0.0) == due + 120
    assert restarts.breaker is Breaker.OPEN


def test_failures_are_forgotten_only_after_being_up_long_enough() -> None:
    restarts = Restarts()
    fail(restarts)
    fail(restarts)
    restarts.note_start(10)
    restarts.note_up(20)
    assert restarts.note_failure(79.9, 0.0) == pytest.approx(79.9 + 16)
    restarts.note_start(100)
    restarts.note_up(110)
    assert restarts.note_failure(170, 0.0) == 171  # nobody called settle: the failure does
    assert (restarts.failures_in_row, restarts.breaker) == (1, Breaker.CLOSED)


def test_long_loading_is_not_being_up() -> None:
    restarts = Restarts()
    fail(restarts)
    restarts.note_start(1)
    restarts.settle(1000)
    restarts.note_failure(1000, 0.0)
    assert restarts.failures_in_row == 2


def test_reset_forgets_everything_and_starts_at_once() -> None:
    restarts = Restarts()
    open_breaker(restarts)
    restarts.reset()
    assert (restarts.breaker, restarts.failures_in_row, restarts.due) == (Breaker.CLOSED, 0, None)
    assert fail(restarts, 500) == 501
