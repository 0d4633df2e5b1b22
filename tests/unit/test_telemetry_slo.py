"""ORCH-2104: windows over what the tasks of a replica set got of late."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.telemetry_slo import MOST, WINDOW_S, Got, SloWindows, Window, percentile_95

KEY, OTHER = ("route", "cohort", "interactive"), ("route", "cohort", "batch")


def got(ended_at: float, first_s: float | None = 1.0, total_s: float | None = 2.0, *, is_failed: bool = False) -> Got:
    return Got(ended_at, first_s, total_s, is_failed)


def test_nothing_ended_is_no_window() -> None:
    assert SloWindows().look(KEY, 0.0) is None


def test_window_tells_what_its_tasks_got() -> None:
    windows = SloWindows()
    for number in range(20):
        windows.note(KEY, got(float(number), number / 10, number * 1.0, is_failed=number < 5))
    assert windows.look(KEY, 20.0) == Window(20, 1.8, 18.0, 0.25)


def test_windows_are_apart() -> None:
    windows = SloWindows()
    windows.note(KEY, got(1.0))
    assert windows.look(OTHER, 1.0) is None


def test_what_did_not_come_is_not_measured_and_counts_as_a_task() -> None:
    windows = SloWindows()
    windows.note(KEY, got(1.0, None, None, is_failed=True))
    assert windows.look(KEY, 1.0) == Window(1, None, None, 1.0)


def test_tasks_leave_the_window_with_their_time() -> None:
    windows = SloWindows()
    windows.note(KEY, got(0.0, is_failed=True))
    windows.note(KEY, got(100.0))
    assert windows.look(KEY, WINDOW_S - 0.1) == Window(2, 1.0, 2.0, 0.5)
    assert windows.look(KEY, WINDOW_S) == Window(1, 1.0, 2.0, 0.0)
    assert windows.look(KEY, 100.0 + WINDOW_S) is None


def test_oldest_go_first_when_there_are_too_many() -> None:
    windows = SloWindows()
    for number in range(MOST + 1):
        windows.note(KEY, got(1.0, is_failed=number == 0))
    assert windows.look(KEY, 1.0) == Window(MOST, 1.0, 2.0, 0.0)


def test_windows_of_cohorts_that_are_gone_are_forgotten() -> None:
    windows = SloWindows()
    for number in range(1000):
        windows.note(("route", number), got(number * WINDOW_S))
    assert len(windows._windows) <= 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([3.0], 3.0), ([2.0, 1.0], 2.0), ([float(n) for n in range(1, 101)], 95.0)],
)
def test_percentile(values: list[float], expected: float | None) -> None:
    assert percentile_95(values) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentile_is_the_smallest_value_that_95_of_100_do_not_exceed(values: list[float]) -> None:
    found = percentile_95(values)
    assert found is not None
    assert sum(value <= found for value in values) * 100 >= 95 * len(values)
    assert sum(value < found for value in values) * 100 < 95 * len(values)
