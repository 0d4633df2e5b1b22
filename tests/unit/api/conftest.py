"""A keyed and a keyless edge, each on a real server."""

from collections.abc import AsyncIterator
from functools import cache

import httpx
import pytest

from tests.unit.api.fakes import Edge, serving


class Client(httpx.AsyncClient):
    """An HTTP client that knows the edge behind the server it talks to."""

    edge: Edge
    port: int


@cache
def edge_of(*, is_keyless: bool) -> Edge:
    """One for all tests: reading the specifications takes longer than most of them."""
    return Edge(is_keyless=is_keyless)


async def _client(*, is_keyless: bool, key: str | None = None) -> AsyncIterator[Client]:
    edge = edge_of(is_keyless=is_keyless)
    edge.reset()
    headers = {} if key is None else edge.bearer(key)
    async with serving(edge.app) as port:
        async with Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
            client.edge, client.port = edge, port
            yield client


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Speaks with the key `admin`."""
    async for client in _client(is_keyless=False, key="admin"):
        yield client


@pytest.fixture
async def keyless() -> AsyncIterator[Client]:
    """Speaks without a key to an edge that has none."""
    async for client in _client(is_keyless=True):
        yield client
