"""Bar 4: how true the predicted starts and the chances to be in time are, in the simulator."""

import heapq
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from llorch.simulator.compare import POLICIES
from llorch.simulator.generators import mean_service_s, workload_of
from llorch.simulator.outcome import Outcome
from llorch.simulator.run import simulate
from llorch.simulator.spec import Spec, load_spec
from llorch.simulator.workload import Workload
from tests.prove.goodput import WORKLOADS
from tests.prove.report import Figure, at_least, at_most, progress

TENANTS: Final = 5
MOST_ERROR: Final = 1.3
BINS: Final = 5
LEAST_IN_BIN: Final = 200
MOST_GAP: Final = 0.10
MEAN_DEADLINE: Final = 3.0
"""Of the deadlines, in mean service times."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What one run showed. `error_ratio`: median absolute error over that of the informed FCFS predictor.

    `smallest_bin` in tasks, `worst_gap` between told and happened in any bin, `brier_ratio` over the base rate's.
    """

    name: str
    error_ratio: float
    smallest_bin: int
    worst_gap: float
    brier_ratio: float


def measure(number: int) -> list[Figure]:
    """Every workload at a steady load, as one tenant's and as several tenants'."""
    truths = []
    for file in sorted(WORKLOADS.glob("poisson_load_*.yaml")):
        alone = load_spec(file)
        truths.append(_run(f"{file.stem}, one tenant", alone))
        truths.append(_run(f"{file.stem}, {TENANTS} tenants", _shared(alone)))
    errors = [
        at_most(number, f"{truth.name}: error of predicted start / informed FCFS", truth.error_ratio, MOST_ERROR)
        for truth in truths
    ]
    worst = max(truths, key=lambda truth: truth.worst_gap)
    vague = max(truths, key=lambda truth: truth.brier_ratio)
    return [
        *errors,
        at_least(
            number,
            "on_time_probability: tasks in the smallest bin",
            min(truth.smallest_bin for truth in truths),
            LEAST_IN_BIN,
        ),
        at_most(number, f"worst bin off what happened, in points: {worst.name}", 100 * worst.worst_gap, 100 * MOST_GAP),
        at_most(number, f"Brier score / the base rate's, worst: {vague.name}", vague.brier_ratio, 1.0),
    ]


def _shared(spec: Spec) -> Spec:
    """The same traffic, sent by several tenants alike."""
    [(name, tenant)] = spec.tenants.items()
    return spec.model_copy(update={"tenants": {name: tenant.model_copy(update={"count": TENANTS})}})


def _run(name: str, spec: Spec) -> Truth:
    error, reference, starts = _errors(spec)
    chances = _chances(spec)
    bins = _bins(chances)
    base = sum(was for _, was in chances) / len(chances) if chances else math.nan
    brier = sum((told - was) ** 2 for told, was in chances) / len(chances) if chances else math.nan
    progress(
        f"{name}: {starts} starts, median error {error:.3f} s, informed FCFS {reference:.3f} s; "
        f"{len(chances)} chances, Brier {brier:.4f} of {base * (1 - base):.4f}, "
        + " ".join(f"{told:.2f}→{was:.2f}" for _, told, was in bins)
    )
    return Truth(
        name=name,
        error_ratio=error / reference,
        smallest_bin=min((tasks for tasks, _, _ in bins), default=0),
        worst_gap=max((abs(told - was) for _, told, was in bins), default=math.inf),
        brier_ratio=brier / (base * (1 - base)) if 0 < base < 1 else math.inf,
    )


def _errors(spec: Spec) -> tuple[float, float, int]:
    """Median absolute errors, ours and the reference's, and of how many starts. Without deadlines the load stays."""
    workload = workload_of(spec)
    for index in range(len(workload)):
        workload.deadline_s[index] = math.nan
    outcome = simulate(spec, workload, POLICIES["ours"])
    service_s = mean_service_s(spec, workload)
    slots = sum(group.count * group.slots for group in spec.replicas)
    error, starts = _told_error(workload, outcome, service_s)
    return error, _informed_error(workload, outcome, service_s, slots), starts


def _chances(spec: Spec) -> list[tuple[float, bool]]:
    """What every admitted task with a deadline was told, and whether it was in time.

    The deadlines are drawn anew, from nearly none to many service times: chances spread wider than with the file's.
    """
    workload = workload_of(spec)
    service_s, draw = mean_service_s(spec, workload), random.Random(spec.seed)
    for index, deadline in enumerate(workload.deadline_s):
        if not math.isnan(deadline):
            workload.deadline_s[index] = service_s * (0.1 + draw.expovariate(1 / MEAN_DEADLINE))
    outcome = simulate(spec, workload, POLICIES["ours"])
    return [
        (told, outcome.is_in_time(index))
        for index, told in enumerate(outcome.told.on_time)
        if not math.isnan(told) and outcome.has_ended(index)
    ]


def _bins(chances: Sequence[tuple[float, bool]]) -> list[tuple[int, float, float]]:
    """Equally many tasks in each, by what they were told: tasks, mean chance told, part that was in time."""
    ordered = sorted(chances)
    edges = [len(ordered) * each // BINS for each in range(BINS + 1)]
    parts = [ordered[low:high] for low, high in pairwise(edges) if high > low]
    return [
        (len(part), sum(told for told, _ in part) / len(part), sum(was for _, was in part) / len(part))
        for part in parts
    ]


def _told_error(workload: Workload, outcome: Outcome, service_s: float) -> tuple[float, int]:
    """Median absolute error of what tasks were told that waited at least a mean service time, and how many those are.

    One that was told nothing counts as if it had been told a start at once.
    """
    errors = []
    for index, started in enumerate(outcome.started_at):
        wait = started - workload.arrival_s[index]
        if wait >= service_s:
            told = outcome.told.wait_s[index]
            errors.append(abs((0.0 if math.isnan(told) else told) - wait))
    return statistics.median(errors), len(errors)


def _informed_error(workload: Workload, outcome: Outcome, service_s: float, slots: int) -> float:
    """The same, in the same run, of who takes the queue for first come, first served and knows the true mean rate.

    With all slots busy one comes free every service_s / slots; who finds n waiting needs n + 1 of those.
    """
    waiting: list[float] = []
    errors = []
    for index, started in enumerate(outcome.started_at):
        arrival = workload.arrival_s[index]
        while waiting and waiting[0] <= arrival:
            heapq.heappop(waiting)
        if math.isnan(started):
            continue
        if started - arrival >= service_s:
            errors.append(abs((len(waiting) + 1) * service_s / slots - (started - arrival)))
        heapq.heappush(waiting, started)
    return statistics.median(errors)
