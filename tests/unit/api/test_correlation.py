"""The correlation id comes back on every response that has headers (ORCH-2014)."""

import re
from typing import Any

import httpx

from llorch.api.exchange import SCOPE_KEY
from llorch.service.streams import TaskStream
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import TASK, Edge, serving


async def test_given_id_is_on_every_kind_of_response(client: Client) -> None:
    stream = client.edge.tasks.streams["tenant-admin", TASK] = TaskStream()
    stream.close("end", {})
    requests = [
        (200, "GET", "/healthz", None),
        (200, "GET", "/metrics", None),
        (200, "GET", f"/v1/tasks/{TASK}/stream", None),
        (202, "POST", "/v1/tasks", b'{"model_ref":"smol","prompt":"x"}'),
        (204, "POST", f"/v1/tasks/{TASK}/cancel", None),
        (400, "POST", "/v1/tasks", b"{"),
        (404, "GET", "/nope", None),
        (405, "PUT", "/v1/tasks", None),
        (413, "POST", "/v1/tasks", b"x" * 5000),
    ]
    for status, method, path, body in requests:
        headers = {"X-Correlation-Id": f"req-{status}", "Content-Type": "application/json"}
        response = await client.request(method, path, content=body, headers=headers)
        assert (response.status_code, response.headers["x-correlation-id"]) == (status, f"req-{status}")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_made_id_is_new_each_time(client: Client) -> None:
    ids = {(await client.get("/healthz")).headers["x-correlation-id"] for _ in range(5)}
    assert len(ids) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", made) for made in ids)


async def test_id_of_another_form_is_refused_and_not_echoed(client: Client) -> None:
    for bad in ("a b", "x" * 129, "<script>", ""):
        response = await client.get("/healthz", headers={"X-Correlation-Id": bad})
        assert response.status_code == 400, bad
        assert response.headers["x-correlation-id"] != bad
        assert "script" not in response.text


async def test_id_reaches_the_use_case(client: Client) -> None:
    headers = {"X-Correlation-Id": "req-9"}
    await client.post("/v1/tasks", json={"model_ref": "smol", "prompt": "x"}, headers=headers)
    assert client.edge.tasks.correlation_ids == ["req-9"]


async def test_request_that_is_over_is_not_held_by_its_own_scope() -> None:
    edge = Edge(is_keyless=True)
    over: list[tuple[bool, bool]] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        await edge.app(scope, receive, send)
        if scope["type"] == "http":
            over.append((SCOPE_KEY in scope, "extensions" in scope))

    async with serving(watched) as port, httpx.AsyncClient(trust_env=False) as client:
        for path in ("healthz", "nope"):
            await client.get(f"http://127.0.0.1:{port}/{path}")
    assert over == [(False, False)] * 2
