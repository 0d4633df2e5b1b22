"""Lines of engines: where they end, how many are logged, and that no key is among them."""

import pytest
from structlog.testing import LogCapture

from llorch.poolmanager.log_lines import LAST_LINES, LINE_CHARS, EngineLog, LineCutter
from llorch.testing.clock import FakeClock
from tests.unit.poolmanager.supervised import make_log

KEY = "k" * 43


class Heard:
    def __init__(self, burst: int = 3, lines_per_s: float = 2.0) -> None:
        self.clock = FakeClock()
        self.capture = LogCapture()
        self.lines = EngineLog(make_log(self.capture), clock=self.clock.monotonic, burst=burst, lines_per_s=lines_per_s)

    @property
    def told(self) -> list[str]:
        return [str(entry.get("line", entry.get("count"))) for entry in self.capture.entries]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_however_the_bytes_arrive(size: int) -> None:
    data = "one\n\ntwo\r\n 10 %\r 20 %\r\nzwölf\ntail".encode()
    found: list[tuple[str, int]] = []
    cutter = LineCutter(lambda line, dropped: found.append((line, dropped)))
    for start in range(0, len(data), size):
        cutter.feed(data[start : start + size])
    cutter.flush()
    cutter.flush()
    assert found == [(line, 0) for line in ("one", "two", " 10 %", " 20 %", "zwölf", "tail")]


def test_line_that_never_ends_takes_bounded_memory_and_tells_what_is_missing() -> None:
    heard = Heard()
    cutter = LineCutter(lambda line, dropped: heard.lines.take("stderr", line, dropped))
    for _ in range(1000):
        cutter.feed(b"x" * 1000)
    assert len(cutter._held) <= 4 * LINE_CHARS
    cutter.feed(b"\nnext\n")
    assert heard.lines.last == (f"{'x' * LINE_CHARS}… ({1_000_000 - LINE_CHARS} more)", "next")


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    found: list[str] = []
    LineCutter(lambda line, _: found.append(line)).feed(b"\xff\xfe\n")
    assert found == ["\N{REPLACEMENT CHARACTER}" * 2]


def test_key_of_the_engine_is_blacked_out_wherever_it_stands() -> None:
    """No log holds a key."""
    heard = Heard(burst=10)
    heard.lines.begin(KEY)
    heard.lines.take("stdout", f"--api-key {KEY} and again {KEY}")
    heard.lines.take("stdout", "x" * (LINE_CHARS - 10) + KEY)
    assert KEY[:10] not in "".join([*heard.told, *heard.lines.last])
    assert heard.told[0] == "--api-key *** and again ***"


def test_flood_is_cut_off_counted_and_told_when_there_is_room_again() -> None:
    heard = Heard()
    for index in range(10):
        heard.lines.take("stderr", f"line {index}")
    assert heard.told == ["line 0", "line 1", "line 2"]
    heard.clock.advance(1.0)
    heard.lines.take("stderr", "late")
    assert heard.told[3:] == ["7", "late"]
    heard.clock.advance(60.0)
    for index in range(5):
        heard.lines.take("stderr", f"more {index}")
    assert heard.told[5:] == ["more 0", "more 1", "more 2"]
    heard.lines.tell_dropped()
    heard.lines.tell_dropped()
    assert heard.told[8:] == ["2"]


def test_last_lines_are_kept_although_they_are_not_logged() -> None:
    heard = Heard(burst=1)
    for index in range(100):
        heard.lines.take("stderr", f"line {index}")
    assert heard.lines.last == tuple(f"line {index}" for index in range(100 - LAST_LINES, 100))
    heard.lines.forget()
    assert heard.lines.last == ()


def test_streams_are_told_apart() -> None:
    heard = Heard()
    heard.lines.take("stdout", "a")
    assert heard.capture.entries == [{"event": "engine_log", "log_level": "info", "stream": "stdout", "line": "a"}]
