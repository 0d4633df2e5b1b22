"""A client of the data plane for journeys: plain HTTP, every answer checked, streams readable frame by frame."""

import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support.identities import Identity
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess
from tests.support.wire import Frame, FrameSplitter, check_whole, schema

FINAL = ("succeeded", "failed", "canceled")


class Follower:
    """One open stream. Frames are read as the test asks for them."""

    def __init__(self, http: httpx.Client, task_id: str, headers: Mapping[str, str]) -> None:
        self._stack = ExitStack()
        request = http.stream("GET", f"/v1/tasks/{task_id}/stream", headers=dict(headers))
        self.response = self._stack.enter_context(request)
        self._chunks = self.response.iter_raw()
        self._splitter = FrameSplitter()
        self._ready: deque[Frame] = deque()
        self.frames: list[Frame] = []
        if self.response.status_code != 200:
            self.response.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def next(self) -> Frame | None:
        """The next frame, or None at the end of the stream."""
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                assert self._splitter.rest == b"", f"the stream broke within {self._splitter.rest!r}"
                return None
            self._ready.extend(self._splitter.feed(chunk))
        frame = self._ready.popleft()
        self.frames.append(frame)
        return frame

    def until(self, event: str, count: int = 1) -> Frame:
        """Read until that many frames of this name came, and return the last. Raises AssertionError at the end."""
        while (frame := self.next()) is not None:
            count -= frame.event == event
            if count == 0:
                return frame
        raise AssertionError(f"the stream ended without {event!r}: {self.frames}")

    def to_end(self) -> list[Frame]:
        """Read to the end of the stream: all frames since the beginning."""
        while self.next() is not None:
            pass
        return self.frames

    def close(self) -> None:
        """Close the connection, as a client that goes away does."""
        self._stack.close()


class Caller:
    """One client of a service."""

    def __init__(self, service: LlorchProcess, who: Identity | None = None) -> None:
        self.http = service.client(who)

    def submit(self, fields: Mapping[str, Any]) -> httpx.Response:
        """POST /v1/tasks. What a task needs and `fields` does not have is filled in."""
        body = {"prompt": f"say {uuid.uuid4()}", "max_tokens": 4, **fields}
        return self.http.post("/v1/tasks", json=body)

    def accept(self, **fields: Any) -> dict[str, Any]:
        """Submit, expecting 202."""
        return accepted(self.submit(fields))

    def cancel(self, task_id: str) -> httpx.Response:
        return self.http.post(f"/v1/tasks/{task_id}/cancel")

    def look(self, task_id: str) -> dict[str, Any]:
        """GET /v1/tasks/{task_id}, expecting 200."""
        response = self.http.get(f"/v1/tasks/{task_id}")
        assert response.status_code == 200, response.text
        task: dict[str, Any] = response.json()
        schema("Task").validate(task)
        return task

    def follow(self, task_id: str, after: int | None = None) -> Follower:
        """Open the stream, whatever its status."""
        return Follower(self.http, task_id, {} if after is None else {"Last-Event-ID": str(after)})

    def read(self, task_id: str, after: int | None = None) -> list[Frame]:
        """The durable frames behind `after` to the end, expecting 200."""
        with self.follow(task_id, after) as stream:
            assert stream.response.status_code == 200, stream.response.text
            return check_whole(stream.to_end(), after or 0)

    def wait_state(self, task_id: str, *states: str, within_s: float = 10.0) -> dict[str, Any]:
        """The task, as soon as it is in one of these states."""

        def look() -> dict[str, Any] | None:
            task = self.look(task_id)
            return task if task["state"] in states else None

        return wait_for(look, f"task {task_id} is {' or '.join(states)}", within_s)

    def health(self, pool: str) -> dict[str, Any]:
        """GET /v1/pools/{pool}/health, expecting 200."""
        response = self.http.get(f"/v1/pools/{pool}/health")
        assert response.status_code == 200, response.text
        health: dict[str, Any] = response.json()
        schema("PoolHealth", "control").validate(health)
        return health

    def count_busy(self, pool: str) -> int:
        """Slots of a pool that llorch holds or waits for."""
        return sum(replica["slots_busy"] for replica in self.health(pool)["replicas"])

    def close(self) -> None:
        self.http.close()


def accepted(response: httpx.Response) -> dict[str, Any]:
    """The body of a 202."""
    assert response.status_code == 202, f"{response.status_code}: {response.text}"
    body: dict[str, Any] = response.json()
    schema("TaskAccepted").validate(body)
    return body
