"""Async tests of the service run on a loop whose time is virtual: nothing waits, and a hang is an error."""

from collections.abc import Mapping

import pytest

from llorch.testing.clock import VirtualTimeLoop, loop_factories


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, type[VirtualTimeLoop]]:
    return loop_factories()
