"""The event loop: arrivals, tokens, ends, outages and ticks in the order of virtual time, each handed to a desk.

A desk decides what runs where; the scheduler behind `ours`, or one of the simple queues in `baselines`. At one time,
what runs comes first, then arrivals, then ticks.
"""

import gc
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from llorch.simulator.outcome import Outcome
from llorch.simulator.replicas import Floor, Outage, Run, engines_of
from llorch.simulator.spec import Spec
from llorch.simulator.workload import Workload

Progress = Callable[[int, float], None]
"""Told now and then how many tasks have ended, and the virtual time in seconds."""

_PROGRESS_EVENTS = 1 << 14


class Desk(Protocol):
    """Whoever decides. It never blocks, starts and aborts runs on the floor and tells the outcome what it decides.

    `wakeup` is when it wants a `tick`, at most; None while it wants none.
    """

    wakeup: float | None

    def arrive(self, index: int, now: float) -> None:
        """A task of the workload is submitted."""

    def first_token(self, run: Run, now: float) -> None:
        """The run has its first token."""

    def tokens(self, run: Run, count: int, now: float) -> None:
        """The run has `count` more tokens since the last such call."""

    def ended(self, run: Run, now: float) -> None:
        """The run's engine has let go of the slot; the run says whether it was aborted or lost."""

    def change_replica(self, replica: int, now: float, *, is_ready: bool) -> None:
        """The replica broke down, or is back. Runs that broke off with it have ended before."""

    def tick(self, now: float) -> None:
        """The time of `wakeup` has come."""


DeskFactory = Callable[[Spec, Workload, Floor, Outcome], Desk]


def simulate(spec: Spec, workload: Workload, make_desk: DeskFactory, progress: Progress | None = None) -> Outcome:
    """Play the workload to its end, when every task has ended or nothing would ever happen any more."""
    costs = spec.queue.token_cost
    outcome = Outcome(workload, prompt_cost=costs.prompt, output_cost=costs.output)
    floor = Floor(engines_of(spec.replicas), batches=spec.token_batches, seed=spec.seed)
    desk = make_desk(spec, workload, floor, outcome)
    with _garbage_left_alone():
        _play(workload, floor, desk, outcome, progress)
    outcome.busy_s = floor.busy_s
    return outcome


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """No collection of cycles while the loop runs: what it drops has none, and each walk over a million tasks costs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _play(workload: Workload, floor: Floor, desk: Desk, outcome: Outcome, progress: Progress | None) -> None:
    arrivals, count = workload.arrival_s, len(workload)
    at = events = 0
    now = 0.0
    while outcome.open or floor.runs:
        run_at = floor.next_at()
        wakeup = desk.wakeup
        if at < count and (run_at is None or arrivals[at] < run_at) and (wakeup is None or arrivals[at] <= wakeup):
            now = arrivals[at]
            desk.arrive(at, now)
            at += 1
        elif run_at is not None and (wakeup is None or run_at <= wakeup):
            now = run_at
            _step(floor, desk, outcome)
        elif wakeup is not None:
            now = max(now, wakeup)
            desk.tick(now)
        else:
            return
        events += 1
        if progress is not None and not events % _PROGRESS_EVENTS:
            progress(count - outcome.open, now)


def _step(floor: Floor, desk: Desk, outcome: Outcome) -> None:
    """The next thing happens on the floor."""
    now, _, what = heapq.heappop(floor.heap)
    if isinstance(what, Outage):
        for run in floor.flip(what, now):
            _end(floor, desk, outcome, run, now)
        desk.change_replica(what.replica, now, is_ready=not what.is_down)
    elif what.is_aborted:
        _end(floor, desk, outcome, what, now)
    elif not what.has_first:
        what.has_first = True
        floor.plan_batch(what)
        desk.first_token(what, now)
        outcome.first_token(what.index, what.context, now)
    elif what.told + what.batch < what.goal:
        _report(desk, outcome, what, now)
        floor.plan_batch(what)
    else:
        _end(floor, desk, outcome, what, now)


def _end(floor: Floor, desk: Desk, outcome: Outcome, run: Run, now: float) -> None:
    """A run is over; what it had produced since its last report is reported first."""
    _report(desk, outcome, run, now)
    floor.end(run, now)
    desk.ended(run, now)


def _report(desk: Desk, outcome: Outcome, run: Run, now: float) -> None:
    count = run.batch
    if count:
        run.batch = 0
        run.told += count
        outcome.produce(run.index, count, now)
        desk.tokens(run, count, now)
