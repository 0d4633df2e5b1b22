"""ORCH-2007: a client that is refused comes back when it was told to, not earlier and not with all the others."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.client import Problem
from llorch.client.patience import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, Patience, advised_wait_s, backoff_s

draws = st.floats(0, 1, exclude_max=True)


def _problem(retry_after_ms: int | None) -> Problem:
    return Problem.model_validate(
        {
            "code": "ADMISSION_REJECT", "message": "full", "engine": None, "pool_id": None, "retriable": True,
            "retry_after_ms": retry_after_ms, "policy_label": "reject", "details": None, "correlation_id": "c",
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "retry_after_ms", "expected"),
    [
        ({"x-backoff-ms": "1730", "retry-after": "2"}, 900, 1.73),
        ({"retry-after": "2"}, 900, 0.9),
        ({"retry-after": "2"}, None, 2.0),
        ({}, None, None),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": "-1"}, None, None),
        ({"x-backoff-ms": "9" * 5000}, None, None),
    ],
)
def test_the_most_precise_advice_counts(
    headers: dict[str, str], retry_after_ms: int | None, expected: float | None
) -> None:
    assert advised_wait_s(headers, _problem(retry_after_ms)) == expected


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    advised = advised_wait_s({"retry-after": date}, None)
    assert advised is not None
    assert 80 < advised <= 90


def test_a_date_that_has_passed_is_now() -> None:
    assert advised_wait_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None) == 0


@given(advised=st.floats(0.1, 1000), budget=st.floats(0, 2000), draw=draws)
def test_advice_is_never_undercut_and_patience_never_exceeded(advised: float, budget: float, draw: float) -> None:
    wait = Patience(budget, lambda: draw).next_wait_s(advised)
    if wait is None:
        assert advised > budget
    else:
        assert advised <= wait <= budget + 1e-9


def test_peer_bug_26_clients_refused_together_do_not_come_back_together() -> None:
    waits = {Patience(60, lambda draw=n / 100: draw).next_wait_s(2.0) for n in range(100)}  # type: ignore[misc]
    assert len(waits) == 100
    assert max(wait or 0 for wait in waits) - min(wait or 0 for wait in waits) > 0.9


def test_waits_add_up_to_the_patience() -> None:
    patience = Patience(5.0, lambda: 0.0)
    assert [patience.next_wait_s(2.0) for _ in range(3)] == [2.0, 2.0, None]


def test_advice_of_nothing_is_still_no_busy_loop() -> None:
    wait = Patience(1.0, lambda: 0.0).next_wait_s(0.0)
    assert wait is not None
    assert wait >= 0.1


@given(failures=st.integers(1, 10_000), draw=draws)
def test_backoff_grows_to_a_bound(failures: int, draw: float) -> None:
    wait = backoff_s(failures, lambda: draw)
    assert FIRST_BACKOFF_S / 2 <= wait <= LONGEST_BACKOFF_S
    assert backoff_s(failures + 1, lambda: draw) >= wait
