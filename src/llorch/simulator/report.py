"""Results side by side as text and as JSON.

The same simulation gives the same bytes: there is no wall-clock time in either. Times are seconds of virtual time.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llorch.simulator.results import Group, Results

_MOST_TENANTS = 12


@dataclass(frozen=True, slots=True)
class Heading:
    """What was simulated."""

    title: str
    seed: int
    tasks: int
    tenants: int
    replicas: int
    slots: int
    load: float | None
    mean_service_s: float


def as_json(heading: Heading, results: Sequence[Results]) -> str:
    """One JSON object; what is not a number is null."""
    tree = {
        "title": heading.title,
        "seed": heading.seed,
        "tasks": heading.tasks,
        "replicas": heading.replicas,
        "slots": heading.slots,
        "offered_load": heading.load,
        "mean_service_s": heading.mean_service_s,
        "policies": [one.as_json() for one in results],
    }
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False)


def as_text(heading: Heading, results: Sequence[Results]) -> str:
    """Tables with a column for each policy."""
    blocks = [_heading(heading), _main_table(results), _fates(results)]
    blocks += [_groups("by priority", results, lambda one: one.priorities), _shares(results)]
    blocks += [_honesty(one) for one in results if one.honesty.starts or one.honesty.chances]
    return "\n\n".join(block for block in blocks if block)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; the first is set left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, never in exponents; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, min(6, places))}f}"


def percent(value: float) -> str:
    """With one decimal; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1%}"


def _heading(heading: Heading) -> str:
    load = "all at once" if heading.load is None else f"offered load {heading.load:.3f}"
    return (
        f"{heading.title or 'simulation'} · seed {heading.seed}\n"
        f"{heading.tasks:,} tasks of {heading.tenants:,} tenants · {heading.replicas:,} replicas, {heading.slots:,} "
        f"slots · {load} · mean service {number(heading.mean_service_s)} s\n"
        "Times are seconds of virtual time; rates are of the time until the last arrival."
    )


def _main_table(results: Sequence[Results]) -> str:
    rows: list[tuple[str, Callable[[Results], str]]] = [
        ("goodput, tasks in time", lambda one: f"{one.goodput:,}"),
        ("goodput, tasks/s", lambda one: number(one.goodput_per_s)),
        ("deadlines met", lambda one: percent(one.deadline_hit_ratio)),
        ("throughput, tokens/s", lambda one: number(one.tokens_per_s)),
        ("throughput, output tokens/s", lambda one: number(one.output_tokens_per_s)),
        ("slots busy until the end", lambda one: percent(one.utilisation)),
        ("Jain's index of tenants", lambda one: number(one.jain) + ("" if one.jain_is_contended else " *")),
        ("all tenants waiting, s", lambda one: number(one.contended_s)),
        ("wait, mean s", lambda one: number(one.waits.mean_s)),
        ("wait, p50 s", lambda one: number(one.waits.p50_s)),
        ("wait, p95 s", lambda one: number(one.waits.p95_s)),
        ("wait, p99 s", lambda one: number(one.waits.p99_s)),
        ("retries", lambda one: f"{one.retries:,}"),
        ("preemptions", lambda one: f"{one.preemptions:,}"),
        ("last end, s", lambda one: number(one.end_s)),
    ]
    lines = [["", *(one.policy for one in results)]]
    lines += [[name, *(show(one) for one in results)] for name, show in rows]
    note = (
        ""
        if all(one.jain_is_contended for one in results)
        else "\n* of the whole run: never had all tenants a task waiting"
    )
    return table(lines) + note


def _fates(results: Sequence[Results]) -> str:
    fates = list(dict.fromkeys(fate for one in results for fate in one.fates))
    reasons = sorted({reason for one in results for reason in one.reasons})
    lines = [["tasks", *(one.policy for one in results)]]
    lines += [[fate, *(f"{one.fates.get(fate, 0):,}" for one in results)] for fate in fates]
    lines += [[f"  {reason}", *(f"{one.reasons.get(reason, 0):,}" for one in results)] for reason in reasons]
    return table(lines)


def _groups(title: str, results: Sequence[Results], groups: Callable[[Results], Sequence[Group]]) -> str:
    lines = [[title, *(one.policy for one in results)]]
    for at, group in enumerate(groups(results[0])):
        same = [groups(one)[at] for one in results]
        lines.append([f"{group.name}: in time of {group.tasks:,}", *(f"{one.in_time:,}" for one in same)])
        lines.append([f"{group.name}: wait p50 s", *(number(one.waits.p50_s) for one in same)])
        lines.append([f"{group.name}: wait p95 s", *(number(one.waits.p95_s) for one in same)])
    return table(lines)


def _shares(results: Sequence[Results]) -> str:
    """Shares of weighted tokens; of many tenants the first ones."""
    tenants = results[0].tenants
    if len(tenants) < 2:
        return ""
    title = "share of weighted tokens while all wait (in the whole run)"
    lines = [[title, "weight", "fair", *(one.policy for one in results)]]
    for at, tenant in enumerate(tenants[:_MOST_TENANTS]):
        shares = [f"{percent(one.tenants[at].contended_share)} ({percent(one.tenants[at].share)})" for one in results]
        lines.append([tenant.name, number(tenant.weight), percent(tenant.fair_share), *shares])
    more = len(tenants) - _MOST_TENANTS
    lines_of_waits = [["wait p95 s by tenant", "weight", "fair", *(one.policy for one in results)]]
    for at, tenant in enumerate(tenants[:_MOST_TENANTS]):
        waits = [number(one.tenants[at].waits.p95_s) for one in results]
        lines_of_waits.append([tenant.name, number(tenant.weight), "", *waits])
    rest = f"\n… and {more:,} more tenants (--json has all)" if more > 0 else ""
    return f"{table(lines)}{rest}\n\n{table(lines_of_waits)}{rest}"


def _honesty(one: Results) -> str:
    honesty = one.honesty
    parts: list[str] = []
    if honesty.starts:
        parts.append(
            f"{one.policy}: predicted start of {honesty.starts:,} tasks that waited a mean service time or more: "
            f"median error {number(honesty.median_error_s)} s; a predictor that knows the true mean rate: "
            f"{number(honesty.reference_error_s)} s"
        )
    if honesty.chances:
        bins = [["told chance to be on time", *(percent(part.told) for part in honesty.bins)]]
        bins += [["were on time", *(percent(part.happened) for part in honesty.bins)]]
        bins += [["tasks", *(f"{part.tasks:,}" for part in honesty.bins)]]
        score = f"Brier score {honesty.brier:.4f}, of the base rate {honesty.brier_base:.4f}"
        parts.append(f"{one.policy}: {score}\n{table(bins)}")
    return "\n\n".join(parts)
