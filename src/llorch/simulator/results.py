"""What one run of a simulation amounts to: counts, waits, shares, goodput, and how true the predictions were.

Pure arithmetic on an Outcome; every number is by the definitions in the docstrings here. Times in seconds of virtual
time. "Span" is the time until the last arrival, the whole run where all arrive at once; rates are of what happened in
it, per second, so that what an endless queue does when nothing comes any more is not taken for speed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

from llorch.domain.task import Priority
from llorch.simulator.outcome import FATES, Fate, Outcome
from llorch.simulator.workload import LEVELS

CALIBRATION_BINS = 5


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds from arrival to the first start, of tasks that started; NaN when there are none."""

    count: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """The tasks of a tenant or a priority. `share`: of all weighted tokens, by tenant, in the whole run.

    `contended_share` the same while every tenant had a task waiting; NaN when that never was. `fair_share` is what
    weighted fairness between priorities and then between tenants gives when all of them wait.
    """

    name: str
    tasks: int
    finished: int
    in_time: int
    waits: Waits
    weight: float = math.nan
    share: float = math.nan
    contended_share: float = math.nan
    fair_share: float = math.nan


@dataclass(frozen=True, slots=True)
class Bin:
    """Tasks whose told chance was about `told` in the mean; this part of them was in time."""

    tasks: int
    told: float
    happened: float


@dataclass(frozen=True, slots=True)
class Honesty:
    """Told against true. Errors are of the start time, of tasks that waited at least the mean service time.

    `reference_error_s`: of a predictor that knows the true mean rate: (tasks ahead + 1) times mean service over slots.
    `brier` is of the told chances, `brier_base` that of telling everybody the base rate.
    """

    starts: int
    median_error_s: float
    reference_error_s: float
    chances: int
    brier: float
    brier_base: float
    bins: list[Bin]


@dataclass(frozen=True, slots=True)
class Results:
    """One policy on one workload. `goodput`: tasks that finished in time, or finished and had no deadline.

    `tokens_per_s` counts prompt and output tokens served within the span. `deadline_hit_ratio` is of all tasks with a
    deadline, refused ones included. Jain's index is of weighted tokens over fair share, by tenant, while all had tasks
    waiting; `jain_is_contended` is False where that never was, and it is then of the whole run.
    """

    policy: str
    tasks: int
    span_s: float
    end_s: float
    fates: dict[str, int]
    reasons: dict[str, int]
    goodput: int
    goodput_per_s: float
    tokens_per_s: float
    output_tokens_per_s: float
    utilisation: float
    deadlines: int
    deadline_hit_ratio: float
    jain: float
    jain_is_contended: bool
    contended_s: float
    retries: int
    preemptions: int
    waits: Waits
    tenants: list[Group]
    priorities: list[Group]
    honesty: Honesty

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not a number is null."""
        tree: dict[str, Any] = _plain(asdict(self))
        return tree


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is judged by. Tenants without a weight have 1. `mean_service_s` is the true mean of all tasks."""

    weights: Mapping[str, float]
    level_weights: Mapping[Priority, float]
    slots: int
    mean_service_s: float


def results_of(policy: str, outcome: Outcome, setting: Setting) -> Results:
    """Sum a run up."""
    work = outcome.workload
    span = _span(outcome)
    with_deadline = [index for index, deadline in enumerate(work.deadline_s) if not math.isnan(deadline)]
    in_time = [outcome.is_in_time(index) for index in range(len(work))]
    tenants = _tenants(outcome, setting, in_time)
    is_contended = outcome.contended_s > 0 and sum(outcome.contended) > 0
    served = outcome.contended if is_contended else outcome.cost
    return Results(
        policy=policy,
        tasks=len(work),
        span_s=span,
        end_s=outcome.end_s,
        fates={text: outcome.fate.count(fate) for fate, text in FATES.items() if outcome.fate.count(fate)},
        reasons=dict(sorted(outcome.reasons.items())),
        goodput=sum(in_time),
        goodput_per_s=_ratio(sum(was and at <= span for was, at in zip(in_time, outcome.ended_at, strict=True)), span),
        tokens_per_s=_ratio(outcome.tokens_in_span, span),
        output_tokens_per_s=_ratio(outcome.output_in_span, span),
        utilisation=_ratio(outcome.busy_s, setting.slots * outcome.end_s),
        deadlines=len(with_deadline),
        deadline_hit_ratio=_ratio(sum(in_time[index] for index in with_deadline), len(with_deadline)),
        jain=jain_index([cost / group.fair_share for cost, group in zip(served, tenants, strict=True) if group.tasks]),
        jain_is_contended=is_contended,
        contended_s=outcome.contended_s,
        retries=outcome.retries,
        preemptions=outcome.preemptions,
        waits=_waits(outcome, range(len(work))),
        tenants=tenants,
        priorities=_priorities(outcome, in_time),
        honesty=_honesty(outcome, in_time, setting),
    )


def jain_index(amounts: Sequence[float]) -> float:
    """(Σx)² / (n Σx²): 1 when all are equal, 1/n when one has all; NaN of nothing (Jain, Chiu, Hawe 1984)."""
    squares = sum(amount * amount for amount in amounts)
    return _ratio(sum(amounts) ** 2, len(amounts) * squares)


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of the sorted values does not exceed; NaN of nothing."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def _span(outcome: Outcome) -> float:
    arrivals = outcome.workload.arrival_s
    return arrivals[-1] if arrivals and arrivals[-1] > 0 else outcome.end_s


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _waits(outcome: Outcome, indices: Iterable[int]) -> Waits:
    started, arrival = outcome.started_at, outcome.workload.arrival_s
    waits = sorted(started[index] - arrival[index] for index in indices if not math.isnan(started[index]))
    return Waits(
        count=len(waits),
        mean_s=_ratio(math.fsum(waits), len(waits)),
        p50_s=quantile(waits, 0.50),
        p95_s=quantile(waits, 0.95),
        p99_s=quantile(waits, 0.99),
    )


def _tenants(outcome: Outcome, setting: Setting, in_time: Sequence[bool]) -> list[Group]:
    names = outcome.workload.tenants
    of: list[list[int]] = [[] for _ in names]
    for index, tenant in enumerate(outcome.workload.tenant):
        of[tenant].append(index)
    weight = [setting.weights.get(name, 1.0) for name in names]
    fair = _fair_shares(outcome, weight, setting.level_weights)
    return [
        Group(
            name=name,
            tasks=len(of[number]),
            finished=sum(outcome.fate[index] == Fate.FINISHED for index in of[number]),
            in_time=sum(in_time[index] for index in of[number]),
            waits=_waits(outcome, of[number]),
            weight=weight[number],
            share=_ratio(outcome.cost[number], sum(outcome.cost)),
            contended_share=_ratio(outcome.contended[number], sum(outcome.contended)),
            fair_share=fair[number],
        )
        for number, name in enumerate(names)
    ]


def _fair_shares(outcome: Outcome, weight: Sequence[float], level_weights: Mapping[Priority, float]) -> list[float]:
    """A tenant's part of each level that it has tasks in, times that level's part of all levels with tasks."""
    flows = set(zip(outcome.workload.level, outcome.workload.tenant, strict=True))
    levels = {level: sum(weight[tenant] for of, tenant in flows if of == level) for level, _ in flows}
    total = sum(level_weights[LEVELS[level]] for level in levels)
    fair = [0.0] * len(weight)
    for level, tenant in sorted(flows):
        fair[tenant] += level_weights[LEVELS[level]] / total * weight[tenant] / levels[level]
    return fair


def _priorities(outcome: Outcome, in_time: Sequence[bool]) -> list[Group]:
    groups: list[Group] = []
    for number, level in enumerate(LEVELS):
        indices = [index for index, of in enumerate(outcome.workload.level) if of == number]
        if indices:
            groups.append(_priority(outcome, level, indices, in_time))
    return groups


def _priority(outcome: Outcome, level: Priority, indices: Sequence[int], in_time: Sequence[bool]) -> Group:
    return Group(
        name=level.value,
        tasks=len(indices),
        finished=sum(outcome.fate[index] == Fate.FINISHED for index in indices),
        in_time=sum(in_time[index] for index in indices),
        waits=_waits(outcome, indices),
    )


def _honesty(outcome: Outcome, in_time: Sequence[bool], setting: Setting) -> Honesty:
    errors, reference = _start_errors(outcome, setting.slots, setting.mean_service_s)
    chances = [
        (chance, in_time[index])
        for index, chance in enumerate(outcome.told.on_time)
        if not math.isnan(chance) and outcome.has_ended(index)
    ]
    base = _ratio(sum(was for _, was in chances), len(chances))
    return Honesty(
        starts=len(errors),
        median_error_s=quantile(errors, 0.5),
        reference_error_s=quantile(reference, 0.5),
        chances=len(chances),
        brier=_ratio(math.fsum((chance - was) ** 2 for chance, was in chances), len(chances)),
        brier_base=base * (1 - base),
        bins=_bins(chances),
    )


def _start_errors(outcome: Outcome, slots: int, mean_service_s: float) -> tuple[list[float], list[float]]:
    """Sorted absolute errors, ours and of the reference, of the same tasks."""
    told, arrival = outcome.told, outcome.workload.arrival_s
    errors: list[float] = []
    reference: list[float] = []
    for index, started in enumerate(outcome.started_at):
        wait = started - arrival[index]
        if wait >= mean_service_s and not math.isnan(told.wait_s[index]):
            errors.append(abs(told.wait_s[index] - wait))
            reference.append(abs((told.ahead[index] + 1) * mean_service_s / slots - wait))
    return sorted(errors), sorted(reference)


def _bins(chances: Sequence[tuple[float, bool]]) -> list[Bin]:
    """Equally many tasks in each, by what they were told; those that were told the same stay in order of arrival."""
    ordered = sorted(chances, key=itemgetter(0))
    edges = [len(ordered) * part // CALIBRATION_BINS for part in range(CALIBRATION_BINS + 1)]
    parts = [ordered[low:high] for low, high in pairwise(edges) if high > low]
    return [
        Bin(len(part), sum(told for told, _ in part) / len(part), sum(was for _, was in part) / len(part))
        for part in parts
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
