"""Which flow gets how much of the service, as a moving average of weighted tokens.

Owns the decay and the bound on how many flows are told apart. What a token weighs, and when tokens were made, is told.
"""

from collections.abc import Iterator
from math import exp

Flow = tuple[str, str]
"""(tenant, priority)."""

TIME_CONSTANT_S = 60.0
"""Tokens count by exp(-age / TIME_CONSTANT_S)."""

FADED = 1e-3
"""A flow that counts less than this many weighted tokens is forgotten when there is no room for another one."""

LEAST = 1e-6
"""A share below this is that of somebody who is gone."""

_SWEEP_S = 1.0


class Shares:
    """Decayed token counts by flow, of at most `limit` flows; those beyond it count together as `overflow`."""

    __slots__ = ("_counts", "_limit", "_overflow", "_swept_at")

    def __init__(self, limit: int, overflow: Flow) -> None:
        self._limit = limit
        self._overflow = overflow
        self._counts: dict[Flow, list[float]] = {}
        self._swept_at = float("-inf")

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, flow: Flow, amount: float, now: float) -> None:
        """Count weighted tokens; `now` in seconds that never run backwards."""
        count = self._counts.get(flow)
        if count is None:
            count = self._begin(flow, now)
        count[0] = count[0] * exp((count[1] - now) / TIME_CONSTANT_S) + amount
        count[1] = now

    def __iter__(self) -> Iterator[tuple[Flow, float]]:
        """Each flow and its share, down to LEAST; they add up to 1, and there is none before the first token."""
        newest = max((at for _, at in self._counts.values()), default=0.0)
        decayed = {flow: value * exp((at - newest) / TIME_CONSTANT_S) for flow, (value, at) in self._counts.items()}
        total = sum(decayed.values())
        if total > 0:
            for flow, value in decayed.items():
                if value >= LEAST * total:
                    yield flow, value / total

    def _begin(self, flow: Flow, now: float) -> list[float]:
        if len(self._counts) >= self._limit and not self._sweep(now):
            flow = self._overflow
        return self._counts.setdefault(flow, [0.0, now])

    def _sweep(self, now: float) -> bool:
        """Forget what has faded; True when that made room. Looks at all flows at most once a second."""
        if now - self._swept_at < _SWEEP_S:
            return False
        self._swept_at = now
        faded = [
            flow for flow, (value, at) in self._counts.items() if value * exp((at - now) / TIME_CONSTANT_S) < FADED
        ]
        for flow in faded:
            del self._counts[flow]
        return len(self._counts) < self._limit
