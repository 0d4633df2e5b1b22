"""How a task that is followed is shown: its events as lines of JSON, or its answer with a live line."""

import json
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import click
from rich.console import Console

from llorch.cli.live import Answer, LiveLine, clean
from llorch.cli.words import budgets_left
from llorch.client import (
    Accepted,
    ClientError,
    DurableEvent,
    End,
    Event,
    Metrics,
    MetricsFrame,
    Queued,
    Started,
    Token,
    known,
)


class Show(Protocol):
    """Shows a task as it goes."""

    def wait(self, seconds: float, reason: ClientError) -> None:
        """The client waits before its next try."""

    def event(self, event: Accepted | Event) -> None:
        """Something happened."""

    def close(self) -> None:
        """Nothing more will happen."""


class ShowLines:
    """One JSON object a line on stdout: {"event", "id" (durable events), "data"}."""

    def wait(self, seconds: float, reason: ClientError) -> None:
        del seconds, reason

    def event(self, event: Accepted | Event) -> None:
        line: dict[str, Any] = {"event": event.name}
        if isinstance(event, DurableEvent):
            line["id"] = event.id
        line["data"] = event.frame.model_dump(mode="json", exclude_unset=True)
        click.echo(json.dumps(line, ensure_ascii=False))

    def close(self) -> None:
        pass


class ShowAnswer:
    """The answer on stdout, a live line on stderr."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        is_terminal = sys.stdout.isatty()
        self._answer = Answer(_write_exactly, is_terminal=is_terminal)
        self._line = LiveLine(Console(stderr=True), is_answer_here=is_terminal)
        self._clock = clock
        self._tokens = 0
        self._first_at = 0.0
        self._place = ""
        self._chance = ""
        self._budgets = ""

    def wait(self, seconds: float, reason: ClientError) -> None:
        self._line.show(f"{clean(str(reason))} · next try in {seconds:.1f} s")

    def event(self, event: Accepted | Event) -> None:
        match event:
            case Token():
                self._token(event.text)
            case Accepted(frame=frame):
                self._budgets = budgets_left(known(frame.budgets))
                self._wait(frame.queue_position, frame.predicted_start_ms)
            case Queued(frame=frame):
                self._wait(frame.queue_position, frame.predicted_start_ms, frame.reason.value)
            case Metrics(frame=frame):
                self._measured(frame)
            case Started(frame=frame):
                self._place, affinity = "", known(frame.affinity)
                where = "" if affinity is None else f" · affinity {affinity.value}"
                self._line.show(f"running on {frame.replica_id} · waited {frame.waited_ms} ms{where}{self._budgets}")
            case End(frame=frame):
                self.close()
                ended = f"waited {frame.waited_ms} ms · {frame.finish_reason.value}"
                self._line.leave(f"{frame.tokens_out} tokens{self._rate()} · {ended}")
            case _:
                pass

    def _wait(self, position: int, predicted_start_ms: int | None, reason: str = "") -> None:
        """Where the task waits. One that has tokens already has made room for others."""
        start = "start unknown" if predicted_start_ms is None else f"start in about {predicted_start_ms / 1000:.1f} s"
        words = ["preempted" if self._tokens else "queued", f"position {position}", start, reason]
        self._place = " · ".join(word for word in words if word)
        self._show_place()

    def _show_place(self) -> None:
        self._line.show(self._place + self._chance + self._budgets)

    def _measured(self, frame: MetricsFrame) -> None:
        budgets, chance = known(frame.budgets), known(frame.on_time_probability)
        if budgets is not None:
            self._budgets = budgets_left(budgets)
        if chance is not None:
            self._chance = f" · in time: {_percent(chance)}"
        match known(frame.preempted):
            case True:
                resumable = " · goes on later" if known(frame.resumable) else ""
                self._line.show(f"preempted by more urgent work{resumable}")
            case False:
                self._place = ""
                self._line.show(f"running again · {self._tokens} tokens so far")
            case None if self._place:
                self._show_place()

    def _token(self, text: str) -> None:
        now = self._clock()
        self._tokens += 1
        if self._tokens == 1:
            self._first_at = now
        self._line.make_way()
        self._answer.add(text)
        self._line.show(f"{self._tokens} tokens{self._rate()}")

    def _rate(self) -> str:
        elapsed_s = self._clock() - self._first_at
        return f" · {(self._tokens - 1) / elapsed_s:.1f} tokens/s" if self._tokens > 1 and elapsed_s > 0 else ""

    def close(self) -> None:
        self._line.hide()
        self._answer.end()


def _write_exactly(text: str) -> None:
    """Write to stdout at once. `color` keeps what click takes for colors and would leave out of a pipe."""
    click.echo(text, nl=False, color=True)


def _percent(chance: float) -> str:
    """A chance in whole percent, of which neither none nor all is sure."""
    return "under 1%" if chance < 0.01 else "over 99%" if chance > 0.99 else f"{chance:.0%}"
