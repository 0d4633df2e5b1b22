"""When a process that failed is started again: exponential backoff with jitter, and a circuit breaker for storms.

Pure: time and random draws are arguments. Source of the jitter: "Exponential Backoff And Jitter", M. Brooker, AWS
Architecture Blog, 2015; here it only ever lengthens a wait, so that starts stay below what is promised.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

_JITTER: Final = 0.2
"""The part of a wait by which it is lengthened at most."""


class Breaker(Enum):
    """CLOSED: failures are waited out. OPEN: a storm; nothing starts. HALF_OPEN: one start shows whether it is over."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Waits in seconds. The n-th failure in a row is waited out for first_s * factor ** (n - 1), at most max_s."""

    first_s: float = 1.0
    factor: float = 4.0
    max_s: float = 60.0
    storm_failures: int = 4
    """Failures in a row that open the breaker."""
    cool_down_s: float = 120.0
    """How long an open breaker lets nothing start."""
    stable_s: float = 60.0
    """How long a process must have been up for its failures to be forgotten, and the breaker closed."""


class Restarts:
    """When one replica may be started next: its failures in a row, and its breaker.

    `now` is absolute, in seconds of one clock that never goes back. With the default policy no 300 s ever see more than
    6 starts, however fast each of them fails, unless a process was up for `stable_s` in between. Coming up alone
    proves nothing: a process that comes up and dies at once, again and again, is a storm too.
    """

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self._policy = policy or RestartPolicy()
        self._failures = 0
        self._wait_s = self._policy.first_s
        self._breaker = Breaker.CLOSED
        self._up_since: float | None = None
        self.due: float | None = None
        """When the next start may be made; None while nothing is waited out."""

    @property
    def failures_in_row(self) -> int:
        """Failures since a process was last up for `stable_s`."""
        return self._failures

    @property
    def breaker(self) -> Breaker:
        """As of the last call that changed something; `settle` first."""
        return self._breaker

    def note_start(self, now: float) -> None:
        """A process is started now. Call it no earlier than `due`; of an open breaker this is the one trial."""
        self.settle(now)
        self._up_since = None
        self.due = None
        if self._breaker is Breaker.OPEN:
            self._breaker = Breaker.HALF_OPEN

    def note_up(self, now: float) -> None:
        """The process came up; `stable_s` from now it has proved itself."""
        self._up_since = now

    def note_failure(self, now: float, draw: float) -> float:
        """The process ended, or could not be started at all. Returns when the next start is due.

        `draw` in [0, 1) lengthens the wait by up to 20 %.
        """
        self.settle(now)
        self._up_since = None
        self._failures += 1
        self.due = now + self._next_wait() * (1 + _JITTER * draw)
        return self.due

    def settle(self, now: float) -> None:
        """Forget the failures, and close the breaker, once the process has been up for `stable_s`. Idempotent."""
        if self._up_since is not None and now - self._up_since >= self._policy.stable_s:
            self.reset()

    def reset(self) -> None:
        """Forget every failure and start at once: an operator says that the cause is gone."""
        self._failures = 0
        self._wait_s = self._policy.first_s
        self._breaker = Breaker.CLOSED
        self.due = None

    def _next_wait(self) -> float:
        """Seconds without jitter; steps the backoff, or opens the breaker."""
        policy = self._policy
        if self._breaker is not Breaker.CLOSED or self._failures >= policy.storm_failures:
            self._breaker = Breaker.OPEN
            return policy.cool_down_s
        wait_s = min(self._wait_s, policy.max_s)
        self._wait_s = wait_s * policy.factor  # a product, not a power: it cannot overflow
        return wait_s
