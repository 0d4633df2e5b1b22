"""Splitting event streams."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.adapters import sse
from llorch.adapters.sse import EventSplitter
from llorch.errors import WorkerReset

STREAM = b'data: {"a":1}\n\n: ping\n\ndata:{"b":2}\n\nevent: x\ndata: {"c":3}\nid: 4\n\ndata: {"d":"\\n\\n"}\n\n'
EVENTS = [b'{"a":1}', b'{"b":2}', b'{"c":3}', b'{"d":"\\n\\n"}']


@given(st.lists(st.integers(0, len(STREAM))))
def test_events_do_not_depend_on_where_the_network_cuts(cuts: list[int]) -> None:
    splitter = EventSplitter()
    borders = [0, *sorted(cuts), len(STREAM)]
    found = [event for start, end in pairwise(borders) for event in splitter.feed(STREAM[start:end])]
    assert found == EVENTS


def test_event_is_handed_out_as_soon_as_it_is_complete() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [b"1"]
    assert splitter.feed(b"\n") == [b"2"]


def test_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    splitter = EventSplitter()
    for _ in range(10):
        splitter.feed(b"x" * 10)
    with pytest.raises(WorkerReset):
        splitter.feed(b"x")
