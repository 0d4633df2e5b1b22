"""`llorch submit` as a process of its own: on a terminal, interrupted, and with its output cut off."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llorch.cli import show
from llorch.cli.exits import Exit
from tests.unit.client.scripted_server import (
    CANCELED,
    ScriptedServer,
    accepted,
    frame,
    problem,
    stream,
    transcript,
)

SUBMIT = (sys.executable, "-m", "llorch", "submit", "--model", "tiny", "Hi")
QUEUED = frame(None, "queued", {"queue_position": 3, "predicted_start_ms": 1500, "reason": "slots_busy"})
HEIGHT, WIDTH = 4, 80
_PARTS = re.compile(r"\x1b\[\d*m|\x1b\[K|\x1b\[[AB]|\x1b[78D]|.", re.DOTALL)


class Screen:
    """A terminal of a few lines that knows the sequences that llorch may use, and fails on others."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0
        self._saved = (0, 0)
        self.seen: list[str] = []

    def feed(self, text: str) -> None:
        for part in _PARTS.findall(text):
            self._apply(part)
            self.seen.extend(line for line in self.lines if line not in self.seen)

    def _apply(self, part: str) -> None:
        match part:
            case "\n" | "\x1bD":
                self._down()
            case "\r":
                self.column = 0
            case "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            case "\x1b[A":
                self.row = max(self.row - 1, len(self.lines) - HEIGHT, 0)
            case "\x1b[B":
                self.row = min(self.row + 1, len(self.lines) - 1)
            case "\x1b7":
                self._saved = (self.row, self.column)
            case "\x1b8":
                self.row, self.column = self._saved
            case _ if not part.startswith("\x1b["):
                assert part.isprintable(), repr(part)
                self._put(part)

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    def _put(self, character: str) -> None:
        if self.column == WIDTH:
            self._down()
            self.column = 0
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1


def _environment(server: ScriptedServer, width: int = WIDTH) -> dict[str, str]:
    return {**os.environ, "LLORCH_URL": server.url, "TERM": "xterm", "COLUMNS": str(width)}


@contextmanager
def _terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def _read_all(terminal: int) -> str:
    """What was written until the other end closed."""
    data = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not piece:
            break
        data += piece
    return data.decode()


def _serve(server: ScriptedServer, *pieces: bytes, is_held: bool = False) -> None:
    server.on("POST", "/v1/tasks", accepted(3))
    server.on_any_stream(stream(*pieces, is_held=is_held))


def _cancels(server: ScriptedServer) -> int:
    return sum(request.path.endswith("/cancel") for request in server.requests)


def test_on_a_terminal_the_answer_grows_above_a_live_line(server: ScriptedServer) -> None:
    texts = ["One\n", "two ", "\x1b[2Jthree\n\n", "x" * 100, "\nfive\n", "six\n", "end"]
    _serve(server, QUEUED, *transcript(*texts))
    with _terminal() as (ours, theirs):
        process = subprocess.Popen(SUBMIT, env=_environment(server), stdout=theirs, stderr=theirs)
        os.close(theirs)
        screen = Screen()
        screen.feed(_read_all(ours))
        assert process.wait(10) == 0
    *answer, summary, rest = [line.rstrip() for line in screen.lines]
    assert answer == ["One", "two \N{REPLACEMENT CHARACTER}[2Jthree", "", "x" * 80, "x" * 20, "five", "six", "end"]
    assert summary.startswith("2 tokens · ")
    assert summary.endswith("waited 3 ms · stop")
    assert rest == ""
    assert "queued · position 3 · start unknown" in screen.seen
    assert "queued · position 3 · start in about 1.5 s · slots_busy" in screen.seen
    assert "running on small/0 · waited 3 ms" in screen.seen
    assert any(re.fullmatch(r"7 tokens · \d+\.\d tokens/s", line) for line in screen.seen)


def test_waiting_is_told_as_the_server_tells_it(server: ScriptedServer) -> None:
    """ORCH-3269, ORCH-2047: place, predicted start, reason, the chance of the deadline, budgets, and making room."""
    first, *rest = transcript("a", "b")
    chance = frame(None, "metrics", {"queue_depth": 4, "on_time_probability": 0.93})
    later = frame(None, "queued", {"queue_position": 0, "predicted_start_ms": None, "reason": "quota"})
    budgets = frame(None, "metrics", {"budgets": {"tokens": 90, "time_ms": 1500, "cost": 0.25}})
    preempted = frame(None, "metrics", {"queue_depth": 1, "preempted": True, "resumable": True})
    goes_on = frame(None, "metrics", {"preempted": False, "affinity": "hit", "kv_warmth": True})
    _serve(server, QUEUED, chance, later, budgets, first, rest[0], preempted, later, goes_on, *rest[1:])
    with _terminal() as (ours, theirs):
        process = subprocess.Popen(
            SUBMIT, env=_environment(server, width=120), stdout=subprocess.DEVNULL, stderr=theirs
        )
        os.close(theirs)
        shown = _read_all(ours)
        assert process.wait(10) == 0
    told = ["start in about 1.5 s · slots_busy", "slots_busy · in time: 93%", "position 0 · start unknown · quota",
            "quota · in time: 93% · budget left: 90 tokens, 1.5 s, cost 0.25", "running on small/0",
            "preempted by more urgent work · goes on later", "preempted · position 0 · start unknown · quota",
            "running again · 1 tokens so far", "2 tokens · "]  # fmt: skip
    places = [shown.find(words) for words in told]
    assert -1 not in places, (told[places.index(-1)], shown)
    assert places == sorted(places), shown


def test_only_a_terminal_on_stderr_gets_the_live_line_and_the_answer_stays_exact(server: ScriptedServer) -> None:
    _serve(server, QUEUED, *transcript("a\x1b[2J", "b\n"))
    with _terminal() as (ours, theirs):
        process = subprocess.Popen(SUBMIT, env=_environment(server), stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = _read_all(ours)
        out, _ = process.communicate(timeout=10)
    assert out == b"a\x1b[2Jb\n"
    assert "queued · position 3" in shown
    assert "2 tokens" in shown
    assert "\x1b[2J" not in shown


def test_the_wait_after_a_refusal_is_shown(server: ScriptedServer) -> None:
    full = problem(429, "ADMISSION_REJECT", "the queue is full", retriable=True, X_Backoff_Ms="1")
    server.on("POST", "/v1/tasks", full)
    _serve(server, *transcript("a"))
    with _terminal() as (ours, theirs):
        process = subprocess.Popen(SUBMIT, env=_environment(server), stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        shown = _read_all(ours)
        assert process.wait(10) == 0
    assert "ADMISSION_REJECT: the queue is full · next try in 0." in shown


def test_ctrl_c_cancels_the_task_and_exits_130(server: ScriptedServer) -> None:
    _serve(server, *transcript("a", "b")[:2], is_held=True)
    server.on_any_cancel(CANCELED)
    process = subprocess.Popen(SUBMIT, env=_environment(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"a"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (Exit.INTERRUPTED, b"\n", b"")
    assert _cancels(server) == 1


def test_an_answer_that_nobody_reads_any_more_cancels_the_task(server: ScriptedServer) -> None:
    _serve(server, *transcript("a", *["b" * 70_000] * 4)[:6], is_held=True)
    server.on_any_cancel(CANCELED)
    process = subprocess.Popen(SUBMIT, env=_environment(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(10) == Exit.CUT_OFF
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert _cancels(server) == 1


@pytest.mark.parametrize(
    ("chance", "told"),
    [(0, "under 1%"), (0.0099, "under 1%"), (0.5, "50%"), (0.99, "99%"), (0.9951, "over 99%"), (1, "over 99%")],
)
def test_a_chance_is_never_told_as_certain(chance: float, told: str) -> None:
    assert show._percent(chance) == told
