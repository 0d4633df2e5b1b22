"""What a bar is worth: its number, what was measured, the limit, the figure; all of them in one table.

It knows nothing of how a figure came about.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH = 150
"""Columns of the table where nobody watches."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure beside its bar."""

    number: int
    what: str
    bar: str
    figure: str
    is_met: bool


def at_least(number: int, what: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(number, what, f"≥ {_show(limit)}{unit}", f"{_show(value)}{unit}", value >= limit)


def at_most(number: int, what: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(number, what, f"≤ {_show(limit)}{unit}", f"{_show(value)}{unit}", value <= limit)


def not_measured(number: int, what: str, why: str) -> Figure:
    """A bar that could not be measured is not met."""
    return Figure(number, what, "", f"not measured: {why}", is_met=False)


def progress(line: str) -> None:
    """Tell, on stderr, how far it is."""
    sys.stderr.write(f"prove: {line}\n")
    sys.stderr.flush()


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    table = Table(title="Bars", title_justify="left")
    for heading in ("#", "what", "bar", "figure", ""):
        table.add_column(heading, justify="right" if heading in ("#", "bar") else "left")
    for each in figures:
        verdict = "met" if each.is_met else "UNMET"
        table.add_row(str(each.number), each.what, each.bar, each.figure, verdict)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def write(figures: Sequence[Figure], path: Path) -> None:
    """Keep the table as JSON, with what it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "figures": [asdict(figure) for figure in figures],
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
