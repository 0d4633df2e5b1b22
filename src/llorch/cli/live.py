"""Writing to a terminal: an answer on stdout as it grows, one live line on stderr that comes and goes, tables.

Knows streams and escape sequences, nothing of tasks. Text from the server is cleaned of control characters before a
terminal sees it: neither a model nor a label shall steer it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, TextIO

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console

WIDE: Final = 240
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ROOM_BELOW: Final = "\x1bD\x1b[A"
"""Index and cursor up: makes sure that a line is below, and keeps the column, which a newline would not."""
_SAVE_AND_GO_BELOW: Final = "\x1b7\x1b[B\r"
_BACK: Final = "\x1b8"
_ERASE_LINE: Final = "\r\x1b[K"
_ERASE_BELOW: Final = "\x1b7\x1b[B\r\x1b[K\x1b8"


class LiveLine:
    """One line on stderr, where stderr is a terminal; elsewhere nothing.

    Where the answer goes to the same terminal the line stands below it, and is taken away before the answer grows.
    """

    def __init__(self, console: Console, *, is_answer_here: bool) -> None:
        self._file: TextIO | None = sys.stderr if console.is_terminal and not console.is_dumb_terminal else None
        self._width = console.width
        self._is_answer_here = is_answer_here
        self._is_below = False
        self._is_shown = False

    def make_way(self) -> None:
        """The answer grows now."""
        if self._is_answer_here:
            self.hide()
            self._is_below = True

    def show(self, text: str) -> None:
        if self._file is None:
            return
        line = f"\x1b[2m{text if cell_len(text) < self._width else set_cell_size(text, self._width - 1)}\x1b[m\x1b[K"
        self._write(f"{_ROOM_BELOW}{_SAVE_AND_GO_BELOW}{line}{_BACK}" if self._is_below else f"\r{line}")
        self._is_shown = True

    def hide(self) -> None:
        if self._is_shown:
            self._write(_ERASE_BELOW if self._is_below else _ERASE_LINE)
            self._is_shown = False

    def leave(self, text: str) -> None:
        """Take the live line away and leave `text` as a last word, on a line of its own."""
        self.hide()
        if self._file is not None:
            self._write(f"\x1b[2m{text}\x1b[m\n")

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()


def clean(text: str) -> str:
    """`text` without control characters, but for tabs and newlines."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def table_console() -> Console:
    """A console on stdout for tables; wide where no terminal bounds it, so that nothing is cut in a pipe."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def print_json(objects: Iterable[Any]) -> None:
    """Each object, of bodies of the contract, as a line of JSON on stdout."""
    for item in objects:
        click.echo(json.dumps(item, default=lambda body: body.model_dump(mode="json"), ensure_ascii=False))


class Answer:
    """What the model says, on stdout. Exact, unless stdout is a terminal."""

    def __init__(self, write: Callable[[str], None], *, is_terminal: bool) -> None:
        self._write = write
        self._is_terminal = is_terminal
        self._last = "\n"

    def add(self, text: str) -> None:
        if text:
            self._write(clean(text) if self._is_terminal else text)
            self._last = text[-1]

    def end(self) -> None:
        """End the last line."""
        if self._last != "\n":
            self._write("\n")
            self._last = "\n"
