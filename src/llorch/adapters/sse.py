"""Splitting a server-sent event stream into the data of its events, over the borders of what the network delivers.

It knows the framing that engines use (lines that end with LF, one `data:` line per event); what the data mean is
the adapter's business.
"""

from typing import Final

from llorch.errors import WorkerReset

MAX_EVENT_BYTES: Final = 32 * 1024 * 1024
"""A longer event is not one: the engine's stream is broken."""


_LF: Final = 0x0A


class EventSplitter:
    """Collects bytes and hands out the data of every event that is complete."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed_one(self, data: bytes) -> bytes | None:
        """The data of the event that `data` is, when it is just one and nothing was left over; else None."""
        if not self._rest and data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2 and data[-1] == _LF:
            return data[6:-2]
        return None

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events completed by `data`, in order; comments and other fields are left out.

        Raises WorkerReset when an event grows over MAX_EVENT_BYTES.
        """
        if self._rest:
            data = self._rest + data
        if data.endswith(b"\n\n"):
            self._rest = b""
            parts = data[:-2].split(b"\n\n")
        else:
            *parts, self._rest = data.split(b"\n\n")
            if len(self._rest) > MAX_EVENT_BYTES:
                raise WorkerReset("The engine sent an event without an end.")
        return [found for part in parts if (found := event_data(part)) is not None]


def event_data(event: bytes) -> bytes | None:
    """The data of one event; None when it has none, such as a comment that keeps the connection alive."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            return line[6:] if line.startswith(b"data: ") else line[5:]
    return None
