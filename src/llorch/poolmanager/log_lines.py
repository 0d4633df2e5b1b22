"""What an engine writes: cut into lines, logged under its replica's name at a bounded rate, the last lines kept.

Its key is blacked out everywhere. What the lines mean is not known here.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Final

from structlog.typing import FilteringBoundLogger

BURST: Final = 100
"""Lines that are logged at once, of one replica."""
LINES_PER_S: Final = 20.0
"""Lines that are logged in the long run, of one replica."""
LAST_LINES: Final = 20
LINE_CHARS: Final = 2000
"""What is kept of one line."""

_RAW_BYTES: Final = 4 * LINE_CHARS
"""What of a line is looked at: a key that began within what is kept must be whole."""
_BREAK: Final = re.compile(rb"[\r\n]+")  # progress bars go back and write over themselves

OnLine = Callable[[str, int], None]
"""Takes a line, and how many bytes at its end were cut off."""


class LineCutter:
    """Bytes in, lines out, of one stream. Holds no more than a bounded part of a line that never ends."""

    def __init__(self, on_line: OnLine) -> None:
        self._on_line = on_line
        self._held = b""
        self._dropped = 0

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        *ended, rest = _BREAK.split(data)
        for piece in ended:
            self._hold(piece)
            self.flush()
        self._hold(rest)

    def flush(self) -> None:
        """The line ends here."""
        held, dropped = self._held, self._dropped
        self._held, self._dropped = b"", 0
        if held:
            self._on_line(held.decode("utf-8", "replace").rstrip(), dropped)

    def _hold(self, piece: bytes) -> None:
        room = _RAW_BYTES - len(self._held)
        self._held += piece[:room]
        self._dropped += max(0, len(piece) - room)


class EngineLog:
    """The lines of one replica, over all its processes. `clock` in seconds; it never goes back."""

    def __init__(
        self,
        log: FilteringBoundLogger,
        *,
        clock: Callable[[], float],
        burst: int = BURST,
        lines_per_s: float = LINES_PER_S,
    ) -> None:
        self._log = log
        self._clock = clock
        self._burst = burst
        self._lines_per_s = lines_per_s
        self._room = float(burst)
        self._looked_at = clock()
        self._untold = 0
        self._secret = ""
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def last(self) -> tuple[str, ...]:
        """The last lines since `begin` or `forget`, without the key."""
        return tuple(self._last)

    def begin(self, secret: str) -> None:
        """A new process starts, with this key."""
        self._secret = secret
        self._last.clear()

    def forget(self) -> None:
        """What was written until now explains nothing that comes."""
        self._last.clear()

    def take(self, stream: str, line: str, dropped: int = 0) -> None:
        """A line of the process: keep it, and log it if there is room. `dropped` bytes of it are not there."""
        text = self._clean(line, dropped)
        self._last.append(text)
        if not self._has_room():
            self._untold += 1
            return
        self.tell_dropped()
        self._room -= 1
        self._log.info("engine_log", stream=stream, line=text)

    def tell_dropped(self) -> None:
        """Log how many lines were not, if any."""
        if self._untold:
            self._log.warning("engine_log_dropped", count=self._untold)
            self._untold = 0

    def _clean(self, line: str, dropped: int) -> str:
        text = line.replace(self._secret, "***") if self._secret else line
        cut = max(0, len(text) - LINE_CHARS) + dropped
        return f"{text[:LINE_CHARS]}… ({cut} more)" if cut else text

    def _has_room(self) -> bool:
        now = self._clock()
        self._room = min(float(self._burst), self._room + (now - self._looked_at) * self._lines_per_s)
        self._looked_at = now
        return self._room >= 1
