"""How the edge is put together, and that it fails at the start and not at the first request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog

from llorch.api.asgi import build_api, serve_operations
from llorch.api.auth import Keys
from llorch.api.compiled import CompiledOperation
from llorch.api.correlation import Correlation
from llorch.api.exchange import exchange_of
from llorch.api.problems import Problems
from llorch.service.limits import Limits
from llorch_contract.routes import ROUTES
from tests.unit.api.fakes import (
    Edge,
    FakeChanges,
    FakeConfigurations,
    FakeNodes,
    FakePools,
    FakeSessions,
    FakeTasks,
    serving,
)


async def test_lifespan_is_entered_at_the_start_and_left_at_the_end() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        events.append("start")
        yield
        events.append("stop")

    app = build_api(
        tasks=FakeTasks(),
        sessions=FakeSessions(),
        pools=FakePools(),
        changes=FakeChanges(),
        configurations=FakeConfigurations(),
        nodes=FakeNodes(),
        limits=Limits(),
        metrics_text=lambda: b"",
        keys=Keys(),
        lifespan=lifespan,
    )
    async with serving(app):
        assert events == ["start"]
    assert events == ["start", "stop"]


def test_operation_without_a_handler_fails_the_build() -> None:
    class Partial:
        async def list_tasks(self) -> None: ...

    partial: Any = Partial()
    with pytest.raises(AttributeError, match="create_task"):
        serve_operations(partial, limits=Limits(), keys=Keys())


async def test_work_per_operation_is_done_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = CompiledOperation.__init__

    def spy(self: CompiledOperation, route: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(route.operation_id)
        compile_one(self, route, *args, **kwargs)

    monkeypatch.setattr(CompiledOperation, "__init__", spy)
    async with serving(Edge(is_keyless=True).app) as port:
        assert sorted(compiled) == sorted(route.operation_id for route in ROUTES)
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/healthz")).status_code == 200
        assert len(compiled) == len(ROUTES)


async def test_failure_after_the_response_began_is_logged_and_sends_no_second_one() -> None:
    async def breaks_off(scope: Any, _receive: Any, _send: Any) -> None:
        await exchange_of(scope).start(200)
        raise RuntimeError("boom")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    with structlog.testing.capture_logs() as logs:
        await Correlation(Problems(breaks_off))({"type": "http", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert [line["event"] for line in logs] == ["request_failed"]


async def test_websockets_are_turned_away() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await Edge(is_keyless=True).app({"type": "websocket", "headers": [], "path": "/v1/tasks"}, receive, send)
    assert sent == [{"type": "websocket.close"}]
