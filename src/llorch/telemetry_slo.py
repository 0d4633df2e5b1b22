"""What the tasks of each replica set got of late: the numbers behind the SLO snapshots of the control plane.

A window of time, bounded in number, for each route, cohort and priority. Knows neither targets nor alerts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 300.0
MOST = 512
"""Tasks that are remembered for a priority of a replica set; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Got:
    """One task that ended: seconds from its acceptance to its first token and to its end, None where there was none."""

    ended_at: float
    first_token_s: float | None
    total_s: float | None
    is_failed: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What the tasks of the window got, times in seconds; None where there was nothing to measure."""

    tasks: int
    first_token_p95_s: float | None
    total_p95_s: float | None
    error_ratio: float


class SloWindows:
    """Windows by (route, cohort, priority); those of a cohort that is gone end with their time."""

    def __init__(self) -> None:
        self._windows: dict[tuple[object, ...], deque[Got]] = {}

    def note(self, key: tuple[object, ...], got: Got) -> None:
        """A task ended. `ended_at` is never smaller than before."""
        window = self._windows.get(key)
        if window is None:
            self._forget_old(got.ended_at)
            window = self._windows[key] = deque(maxlen=MOST)
        window.append(got)

    def look(self, key: tuple[object, ...], now: float) -> Window | None:
        """The window up to now; None when no task ended in it."""
        window = self._windows.get(key)
        if window is None:
            return None
        while window and window[0].ended_at <= now - WINDOW_S:
            window.popleft()
        if not window:
            del self._windows[key]
            return None
        return Window(
            tasks=len(window),
            first_token_p95_s=percentile_95([got.first_token_s for got in window if got.first_token_s is not None]),
            total_p95_s=percentile_95([got.total_s for got in window if got.total_s is not None]),
            error_ratio=sum(got.is_failed for got in window) / len(window),
        )

    def _forget_old(self, now: float) -> None:
        for key, window in list(self._windows.items()):
            if window[-1].ended_at <= now - WINDOW_S:
                del self._windows[key]


def percentile_95(values: Sequence[float]) -> float | None:
    """The smallest value that 95 of 100 do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, -(-len(values) * 95 // 100) - 1)]
