"""Time that moves only when it is told to, or when an event loop has nothing else to do.

Nothing here waits: a test of ten minutes takes as long as the work that happens in them.
"""

import asyncio
import selectors
from collections.abc import Mapping


class FakeClock:
    """A `service.ports.Clock` under the control of a test."""

    def __init__(self, now: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = now
        self._wall_offset = wall - now

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        return self._now

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        return self._now + self._wall_offset

    def advance(self, seconds: float) -> None:
        """Let `seconds` ≥ 0 pass. Timers of a VirtualTimeLoop with this clock fire when the loop runs next."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now += seconds


class Deadlock(RuntimeError):
    """Everything waits for something that nobody will do."""


class _Skipping(selectors.DefaultSelector):
    """Polls instead of blocking, and moves the clock by the time that it would have waited."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock("no timer is set, and nothing can become ready")
            self._clock.advance(max(0.0, timeout))
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of `clock`: it skips from timer to timer. For tests without real I/O.

    Raises Deadlock from the running call when nothing is left that could ever wake a task.
    """

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        super().__init__(_Skipping(self.clock))

    def time(self) -> float:
        """Seconds of the clock."""
        return self.clock.monotonic()


def loop_factories() -> Mapping[str, type[VirtualTimeLoop]]:
    """For the hook `pytest_asyncio_loop_factories`: every async test gets a virtual loop of its own."""
    return {"virtual": VirtualTimeLoop}


def running_clock() -> FakeClock:
    """The clock of the virtual loop that runs now."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop.clock
