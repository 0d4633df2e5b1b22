"""Measures the bars of the queue and prints them in one table: `python -m tests.prove [number …]`.

Exit codes: 0 every bar is met, 1 one is not, or could not be measured.
"""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.prove.report import Figure, not_measured, progress, show, write
from tests.support.processes import ROOT

BARS: Final = {
    1: ("fairness", "shares in tokens on a live server"),
    2: ("full_queue", "a light tenant beside one that keeps the queue full"),
    3: ("goodput", "goodput at 1.5 times overload"),
    4: ("honesty", "predicted starts and on-time probabilities"),
    5: ("cost", "scheduler CPU per task, and the token path"),
    6: ("scale", "a million tasks over ten thousand replicas"),
    7: ("leaks", "reservations after every kind of death"),
}
"""Bar number: the module that measures it, and what that is."""
COST: Final = 5


def measure(number: int, bench: Path | None) -> list[Figure]:
    """The figures of one bar. Whatever goes wrong is a bar that is not met, with its reason."""
    module, what = BARS[number]
    progress(f"bar {number}: {what}")
    begun = time.monotonic()
    try:
        run: Callable[..., list[Figure]] = importlib.import_module(f"tests.prove.{module}").measure
        return run(number, bench) if number == COST else run(number)
    except Exception as exc:  # noqa: BLE001 (the other bars are still worth measuring)
        traceback.print_exc()
        return [not_measured(number, what, f"{type(exc).__name__}: {str(exc).partition(chr(10))[0][:200]}")]
    finally:
        progress(f"bar {number} took {time.monotonic() - begun:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__)
    parser.add_argument("bars", nargs="*", type=int, metavar="number", help=f"any of {', '.join(map(str, BARS))}")
    parser.add_argument("--bench", type=Path, help="what `python -m bench` wrote just now; else bar 5 runs part of it")
    options = parser.parse_args(arguments)
    if unknown := set(options.bars) - set(BARS):
        parser.error(f"no bar {', '.join(map(str, sorted(unknown)))}")
    figures = [figure for number in options.bars or BARS for figure in measure(number, options.bench)]
    write(figures, ROOT / "out" / "prove.json")
    show(figures)
    return 0 if all(figure.is_met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
