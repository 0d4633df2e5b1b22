"""The same results as a picture. The one module that needs matplotlib, which is in the extra `simulate`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llorch.errors import ConfigError
from llorch.simulator.report import Heading
from llorch.simulator.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TENANTS = 12
_BESIDE: Final[dict[str, Any]] = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
_COLORS = ("#1b6ca8", "#e08e45", "#6a9f58", "#a05195", "#8c8c8c", "#c44e52")


def check_can_plot() -> None:
    """Raise ConfigError where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: install the extra, `llorch[simulate]`") from error
    mpl.use("Agg")


def plot(heading: Heading, results: Sequence[Results], file: Path) -> None:
    """Write a PNG. Raises ConfigError when the file cannot be written or matplotlib is missing."""
    check_can_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(
        f"{heading.title or 'simulation'} · seed {heading.seed} · {heading.tasks:,} tasks, {heading.slots:,} slots"
    )
    [[fates, waits], [shares, honesty]] = figure.subplots(2, 2)
    _plot_fates(fates, results)
    _plot_waits(waits, results)
    _plot_shares(shares, results)
    _plot_honesty(honesty, results)
    try:
        figure.savefig(file, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def _plot_fates(axes: "Axes", results: Sequence[Results]) -> None:
    """Every task once: in time, finished late, and the other ends."""
    names = [one.policy for one in results]
    others = list(dict.fromkeys(fate for one in results for fate in one.fates if fate != "finished"))
    parts = [("in time", [one.goodput for one in results])]
    parts.append(("finished late", [one.fates.get("finished", 0) - one.goodput for one in results]))
    parts += [(fate, [one.fates.get(fate, 0) for one in results]) for fate in others]
    bottom = [0] * len(results)
    colors = ("#2f7d4f", "#c9b458", "#b0b0b0", "#d98b6a", "#8073ac", "#c44e52", "#5a5a5a", "#303030")
    for (label, counts), color in zip(parts, colors, strict=False):
        if any(counts):
            axes.bar(names, counts, bottom=bottom, label=label, color=color)
        bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    axes.set_title("What became of the tasks")
    axes.set_ylabel("tasks")
    axes.legend(**_BESIDE)
    axes.tick_params(axis="x", labelrotation=20)


def _plot_waits(axes: "Axes", results: Sequence[Results]) -> None:
    """Quantiles of the wait, by priority, on a logarithmic scale."""
    quantiles = ("p50", "p95", "p99")
    names = [f"{group.name} {part}" for group in results[0].priorities for part in quantiles]
    values = [
        (
            one.policy,
            [wait for group in one.priorities for wait in (group.waits.p50_s, group.waits.p95_s, group.waits.p99_s)],
        )
        for one in results
    ]
    _bars(axes, names, values)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_title("Wait until the first start")
    axes.set_ylabel("seconds (logarithmic above 0.01)")


def _plot_shares(axes: "Axes", results: Sequence[Results]) -> None:
    """What each tenant got of the weighted tokens, beside its fair share."""
    tenants = results[0].tenants[:_MOST_TENANTS]
    is_contended = all(one.jain_is_contended for one in results)
    values = [
        (one.policy, [group.contended_share if is_contended else group.share for group in one.tenants[:_MOST_TENANTS]])
        for one in results
    ]
    _bars(axes, [group.name for group in tenants], values)
    for at, group in enumerate(tenants):
        axes.plot((at - 0.45, at + 0.45), (group.fair_share,) * 2, color="black", linestyle=":", linewidth=1.5)
    more = len(results[0].tenants) - len(tenants)
    when = "while all tenants wait" if is_contended else "in the whole run"
    axes.set_title(
        f"Share of weighted tokens {when}; dotted: by weight" + (f" (and {more:,} more)" if more > 0 else "")
    )


def _plot_honesty(axes: "Axes", results: Sequence[Results]) -> None:
    """Told chances against what happened; where nobody was told any, what is a part of 1."""
    told = [one for one in results if one.honesty.bins]
    if told:
        axes.plot((0, 1), (0, 1), color="black", linestyle=":", linewidth=1)
        for one, color in zip(told, _COLORS, strict=False):
            bins = one.honesty.bins
            axes.plot(
                [part.told for part in bins],
                [part.happened for part in bins],
                marker="o",
                label=one.policy,
                color=color,
            )
        axes.set_title("Chance to be on time")
        axes.set_xlabel("told at acceptance")
        axes.set_ylabel("happened")
        axes.legend(**_BESIDE)
        return
    names = ["Jain's index", "deadlines met", "slots busy", "tasks in time"]
    values = [
        (one.policy, [one.jain, one.deadline_hit_ratio, one.utilisation, one.goodput / one.tasks]) for one in results
    ]
    _bars(axes, names, values)
    axes.set_title("Fairness, goodput, use (1 is all)")


def _bars(axes: "Axes", names: Sequence[str], values: Sequence[tuple[str, Sequence[float]]]) -> None:
    width = 0.8 / len(values)
    for at, ((label, heights), color) in enumerate(zip(values, _COLORS, strict=False)):
        places = [place - 0.4 + (at + 0.5) * width for place in range(len(names))]
        axes.bar(places, [0.0 if math.isnan(height) else height for height in heights], width, label=label, color=color)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize="small")
    axes.legend(**_BESIDE)
