"""Modelled replicas: how long a run takes, and the floor on which runs go their way as events in virtual time.

A slot's speed does not depend on what the other slots do; an engine whose batches slow each other down needs the speed
that it has when busy. Knows nothing of queues: it starts what it is told to start.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from llorch.simulator.spec import Replicas


@dataclass(frozen=True, slots=True)
class Engine:
    """Times of one replica, in seconds; None for `mtbf_s` never fails."""

    slots: int
    overhead_s: float
    prefill_s: float
    decode_s: float
    release_s: float = 0.0
    mtbf_s: float | None = None
    repair_s: float = 30.0

    def first_token_s(self, prompt_tokens: int) -> float:
        """From the start of a run to its first token."""
        return self.overhead_s + prompt_tokens * self.prefill_s + self.decode_s

    def service_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """From the start of a run to its last token."""
        return self.overhead_s + prompt_tokens * self.prefill_s + output_tokens * self.decode_s


def engine_of(group: Replicas) -> Engine:
    """The engine of every replica of a group."""
    return Engine(
        slots=group.slots,
        overhead_s=group.overhead_s,
        prefill_s=group.prefill_s_per_token,
        decode_s=group.decode_s_per_token,
        release_s=group.release_s,
        mtbf_s=group.mtbf_s,
        repair_s=group.repair_s,
    )


def engines_of(groups: Iterable[Replicas]) -> list[Engine]:
    """One engine a replica; those of a group are the same object."""
    return [engine for group in groups for engine in [engine_of(group)] * group.count]


class Run:
    """One run of a task in a slot. `goal`: tokens to generate after `context` tokens; `told`: those that were reported.

    `batch` are those of the next report, `due` is the number of the heap entry that is not overtaken.
    """

    __slots__ = (
        "attempt", "batch", "context", "due", "engine", "first_at", "goal", "has_first", "index", "is_aborted",
        "is_lost", "replica", "started_at", "told",
    )  # fmt: skip

    def __init__(
        self, index: int, attempt: int, replica: int, *, engine: Engine, now: float, context: int, goal: int
    ) -> None:
        self.index = index
        self.attempt = attempt
        self.replica = replica
        self.engine = engine
        self.context = context
        self.goal = goal
        self.started_at = now
        self.first_at = now + engine.first_token_s(context)
        self.told = 0
        self.batch = 0
        self.has_first = False
        self.is_aborted = False
        self.is_lost = False
        self.due = 0

    def break_off(self, now: float) -> None:
        """Generate nothing from now on."""
        done = int((now - self.first_at) / self.engine.decode_s + 1e-9) + 1 if self.has_first else 0
        self.goal = max(self.told, min(self.goal, done))
        self.batch = self.goal - self.told


class Outage:
    """A replica goes down, or comes back."""

    __slots__ = ("due", "is_down", "replica")

    def __init__(self, replica: int, *, is_down: bool) -> None:
        self.replica = replica
        self.is_down = is_down
        self.due = 0


class Floor:
    """The slots and what runs in them: a heap of what happens next, one entry a run.

    `busy_s` sums slot seconds. Whoever starts a run has seen to it that the replica has a free slot.
    """

    def __init__(self, engines: Sequence[Engine], *, batches: int, seed: int = 0) -> None:
        self.engines = engines
        self.slots = sum(engine.slots for engine in engines)
        self.runs: dict[int, Run] = {}
        self.heap: list[tuple[float, int, Run | Outage]] = []
        self.busy_s = 0.0
        self._batches = batches
        self._last = 0
        self._random = Random(f"outages {seed}")
        for replica, engine in enumerate(engines):
            if engine.mtbf_s is not None:
                self._push(self._random.expovariate(1 / engine.mtbf_s), Outage(replica, is_down=True))

    def start(self, index: int, attempt: int, replica: int, now: float, *, context: int, goal: int) -> None:
        """Run a task that has `goal` more tokens to generate after a context of so many."""
        engine = self.engines[replica]
        run = Run(index, attempt, replica, engine=engine, now=now, context=context, goal=goal)
        self.runs[attempt] = run
        self._push(run.first_at, run)

    def abort(self, attempt: int, now: float) -> None:
        """Tell a run to stop; it ends when its engine lets go. One that is over is left alone."""
        run = self.runs.get(attempt)
        if run is not None and not run.is_aborted and not run.is_lost:
            run.is_aborted = True
            run.break_off(now)
            self._push(now + run.engine.release_s, run)

    def plan_batch(self, run: Run) -> None:
        """The run's next report of tokens comes when a further share of them is there."""
        goal, told, batches = run.goal, run.told, self._batches
        step = told * batches // goal + 1
        upto = goal * step // batches
        while upto <= told:
            step += 1
            upto = goal * step // batches
        run.batch = upto - told
        self._push(run.first_at + (upto - 1) * run.engine.decode_s, run)

    def end(self, run: Run, now: float) -> None:
        """The run's slot is free."""
        del self.runs[run.attempt]
        self.busy_s += now - run.started_at

    def flip(self, outage: Outage, now: float) -> list[Run]:
        """Carry an outage out and plan what follows it; returns the runs that are lost with the replica."""
        engine = self.engines[outage.replica]
        assert engine.mtbf_s is not None
        wait_s = engine.repair_s if outage.is_down else self._random.expovariate(1 / engine.mtbf_s)
        self._push(now + wait_s, Outage(outage.replica, is_down=not outage.is_down))
        if not outage.is_down:
            return []
        lost = [run for run in self.runs.values() if run.replica == outage.replica]
        for run in lost:
            run.is_lost = True
            run.due = 0
            run.break_off(now)
        return lost

    def _push(self, at: float, what: Run | Outage) -> None:
        self._last += 1
        what.due = self._last
        heapq.heappush(self.heap, (at, self._last, what))

    def next_at(self) -> float | None:
        """When the next thing happens; None when nothing runs. Entries that were overtaken are dropped."""
        heap = self.heap
        while heap:
            at, number, what = heap[0]
            if what.due == number:
                return at
            heapq.heappop(heap)
        return None
