"""Numbers and what is made of them: what a round cost a process, medians, percentiles, ratios."""

import asyncio
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from bench.processes import ServerProcess

_SAMPLE_S: Final = 0.1


@dataclass(slots=True)
class Cost:
    """What happened to a process between entering and leaving: use it with `async with`.

    `cpu_s` CPU seconds, `waited_s` seconds without a core, `rss_peak` and `rss_before` bytes of resident memory.
    """

    process: ServerProcess
    cpu_s: float = 0.0
    waited_s: float = 0.0
    rss_before: int = 0
    rss_peak: int = 0
    _sampler: "asyncio.Task[None] | None" = None

    async def __aenter__(self) -> Self:
        self.rss_before = self.rss_peak = self.process.rss_bytes()
        self._sampler = asyncio.create_task(self._sample())
        self.waited_s = -self.process.waited_s()
        self.cpu_s = -self.process.cpu_s()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
            with suppress(asyncio.CancelledError):
                await self._sampler
        if exc_type is None:
            self.cpu_s += self.process.cpu_s()
            self.waited_s += self.process.waited_s()
            self.rss_peak = max(self.rss_peak, self.process.rss_bytes())

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            self.rss_peak = max(self.rss_peak, self.process.rss_bytes())


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed; `share` from 0 to 1."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
