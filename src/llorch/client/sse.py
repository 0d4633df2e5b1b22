"""Splitting a server-sent event stream into frames, however the network cuts it.

It knows the framing of the WHATWG specification (section 9.2.6 "Interpreting an event stream": three line endings,
comments, several data lines, a byte order mark) and nothing of what the frames mean.
"""

import re
from dataclasses import dataclass
from typing import Final

from llorch.client.errors import ProtocolFault

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024 + 4096
"""The contract bounds the data of a frame; what grows beyond it is no such stream."""

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of the stream.

    `id` is None when this frame carried none: a browser would keep the one before, a reader of tasks tells them apart.
    """

    event: str
    data: str
    id: str | None


class FrameParser:
    """Collects bytes and hands out the frames that are complete. What is incomplete at the end is no frame."""

    __slots__ = ("_after_cr", "_at_start", "_data", "_event", "_id", "_rest", "_size")

    def __init__(self) -> None:
        self._rest = b""
        self._at_start = True
        self._after_cr = False
        self._reset()

    def _reset(self) -> None:
        self._event = b""
        self._data: list[bytes] = []
        self._id: bytes | None = None
        self._size = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order.

        Raises ProtocolFault on a frame over MAX_FRAME_BYTES and on bytes that are not UTF-8.
        """
        frames = []
        for line in self._lines(data):
            if line:
                self._take(line)
            elif self._data:
                frames.append(self._frame())
            else:
                self._reset()
        if self._size + len(self._rest) > MAX_FRAME_BYTES:
            raise ProtocolFault("the stream sent a frame without an end")
        return frames

    def _lines(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes. A CR ends its line at once; an LF right after it belongs to it."""
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + data)
        if lines and self._at_start:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        return lines

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif name == b"event":
            self._event = value
        elif name == b"id" and b"\0" not in value:
            self._id = value

    def _frame(self) -> Frame:
        try:
            frame = Frame(
                self._event.decode() or "message",
                b"\n".join(self._data).decode(),
                None if self._id is None else self._id.decode(),
            )
        except UnicodeDecodeError as exc:
            raise ProtocolFault("the stream is not UTF-8") from exc
        self._reset()
        return frame
