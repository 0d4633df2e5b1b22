"""The relay runs on uvloop in production and must not depend on it: its tests run on both loops. Those of the agent
have virtual time.
"""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from llorch.testing.clock import VirtualTimeLoop


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What pytest-asyncio makes the loop of each test with."""
    if item.path.name == "test_relay.py":
        return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
    if item.path.name == "test_agent.py":
        return {"virtual": VirtualTimeLoop}
    return {"asyncio": asyncio.new_event_loop}
