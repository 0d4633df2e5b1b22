"""When to come back after a refusal or a broken connection.

Pure arithmetic: random draws come in as a function and nothing here sleeps. The server's advice is never undercut, and
a random part is added to it, so that clients refused together do not come back together.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from llorch_contract.models import Problem

Draw = Callable[[], float]
"""Gives a random number in [0, 1)."""

SHORTEST_WAIT_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 15.0
FIRST_BACKOFF_S: Final = 0.5
SPREAD: Final = 0.5
"""Up to this share of the advised wait is added to it."""


def advised_wait_s(headers: Mapping[str, str], problem: Problem | None) -> float | None:
    """Seconds to wait that an answer tells, from the most precise source that it has; None when it tells nothing.

    X-Backoff-Ms and the envelope count milliseconds. Retry-After counts seconds or is a date (RFC 9110, 10.2.3).
    """
    backoff_ms = _number(headers.get("x-backoff-ms", ""))
    if backoff_ms is not None:
        return backoff_ms / 1000
    if problem is not None and problem.retry_after_ms is not None:
        return problem.retry_after_ms / 1000
    return _retry_after_s(headers.get("retry-after", ""))


def _retry_after_s(value: str) -> float | None:
    seconds = _number(value)
    if seconds is not None:
        return float(seconds)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _number(value: str) -> int | None:
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 12 else None


def backoff_s(failures: int, draw: Draw) -> float:
    """Seconds before the next try after `failures` (from 1) in a row: doubling, bounded, half of it random."""
    ceiling = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
    return ceiling * (0.5 + 0.5 * draw())


class Patience:
    """The waiting that one call may still do: `budget_s` seconds in all."""

    def __init__(self, budget_s: float, draw: Draw) -> None:
        self._left_s = budget_s
        self._draw = draw
        self._refusals = 0

    def next_wait_s(self, advised_s: float | None) -> float | None:
        """Seconds to wait before the next try; None when patience does not reach that far.

        Coming back earlier than advised would be refused again, so a longer advice than what is left ends it at once.
        """
        self._refusals += 1
        if advised_s is None:
            wait: float | None = backoff_s(self._refusals, self._draw)
        else:
            wait = self._advised(max(advised_s, SHORTEST_WAIT_S))
        if wait is None or wait > self._left_s:
            return None
        self._left_s -= wait
        return wait

    def _advised(self, advised_s: float) -> float | None:
        if advised_s > self._left_s:
            return None
        return advised_s + self._draw() * min(max(advised_s * SPREAD, SHORTEST_WAIT_S), self._left_s - advised_s)
