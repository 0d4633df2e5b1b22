"""What the benchmark says: tables on stdout, progress on stderr, everything as JSON in out/bench.json."""

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Row:
    """One contender or variant and its numbers by column."""

    name: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """A number that must not exceed its limit."""

    name: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Table:
    """What one scenario measured. `raw` are the rounds behind the medians."""

    title: str
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    raw: Sequence[dict[str, Any]] = field(default_factory=list)


def log(line: str) -> None:
    sys.stderr.write(f"bench: {line}\n")


def show(tables: Sequence[Table]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        columns = list(dict.fromkeys(column for row in table.rows for column in row.values))
        grid = RichTable("", title=table.title, title_justify="left")
        for column in columns:
            grid.add_column(column, justify="right")
        for row in table.rows:
            grid.add_row(row.name, *(_format(row.values.get(column)) for column in columns))
        console.print(grid)
        for bar in table.bars:
            verdict = "met" if bar.is_met else "NOT MET"
            console.print(f"{bar.name}: {bar.value:.3g}, at most {bar.limit:.3g}: {verdict}", highlight=False)
        for note in table.notes:
            console.print(note, highlight=False)
        console.print()


def write(tables: Sequence[Table], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "tables": [asdict(table) for table in tables],
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _format(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
