"""The asynchronous client: one method for each operation of the contract, and `generate` for the usual case."""

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Final, Self
from urllib.parse import quote

from pydantic import ValidationError

from llorch.client.errors import ClientError, InvalidRequest
from llorch.client.events import Accepted, End, ErrorEvent, Event, read
from llorch.client.patience import Draw
from llorch.client.stream import Follower
from llorch.client.transport import Notify, Timeouts, Transport
from llorch_contract.models import (
    Capabilities,
    ConfigStatus,
    NodeList,
    PoolChange,
    PoolHealth,
    PoolList,
    ReplicaSetList,
    Session,
    Task,
    TaskAccepted,
    TaskList,
    TaskRequest,
    TaskState,
)

DEFAULT_URL: Final = "http://127.0.0.1:8080"
_FAREWELL_S: Final = 5.0
"""How long the cancel of an abandoned task may take."""


class AsyncClient:
    """A client of one llorch server, for one event loop; `async with` closes its connections.

    Every method raises ApiError when the server answers with an error, Unreachable when it does not answer, and
    ProtocolFault when what answers does not keep the contract. A refusal (429, 503) is waited for as the server
    advises, plus a random part, up to `patience_s` seconds in all for a call. A broken stream is resumed; `resumes` is
    how many failures in a row without progress it survives.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        key: str | None = None,
        *,
        patience_s: float = 30.0,
        resumes: int = 5,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
        draw: Draw = random.random,
        notify: Notify | None = None,
    ) -> None:
        self._transport = Transport(base_url, key, timeouts=timeouts, patience_s=patience_s, draw=draw, notify=notify)
        self._resumes = resumes
        self._draw = draw
        self._farewells: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections, after the cancels of tasks that were abandoned."""
        for _ in range(3):  # a generator that was just dropped is closed by the loop, two rounds later
            await asyncio.sleep(0)
        if self._farewells:
            await asyncio.wait(self._farewells)
        await self._transport.aclose()

    async def submit(self, request: TaskRequest | None = None, /, **fields: Any) -> TaskAccepted:
        """Submit a task, given as a TaskRequest or as its fields.

        A task without a task_id gets one here, so that a submission whose answer was lost is repeated and not doubled.
        Raises InvalidRequest as well.
        """
        return await self._submit(_identified(request, fields))

    async def _submit(self, request: TaskRequest) -> TaskAccepted:
        body = request.model_dump_json(exclude_unset=True)
        return read(TaskAccepted, (await self._transport.call("POST", "/v1/tasks", body=body)).content)

    async def get_task(self, task_id: str) -> Task:
        """The task as it is now."""
        return read(Task, (await self._transport.call("GET", _task_path(task_id))).content)

    async def list_tasks(
        self,
        *,
        state: TaskState | None = None,
        session_id: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> TaskList:
        """A page of one's own tasks, newest first. `limit` is 1 to 200, `cursor` the next_cursor of the page before."""
        given = {"state": state and state.value, "session_id": session_id, "limit": limit, "cursor": cursor}
        params = {name: value for name, value in given.items() if value is not None}
        return read(TaskList, (await self._transport.call("GET", "/v1/tasks", params=params)).content)

    async def cancel(self, task_id: str) -> None:
        """Cancel a task, queued or running. A task that has ended keeps its outcome."""
        await self._transport.call("POST", f"{_task_path(task_id)}/cancel")

    def stream(self, task_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
        """The events of a task, from the durable frame after the id `after` to the terminal one.

        Broken connections are resumed: every durable event comes once and in order. Empty when `after` is the terminal
        frame. Raises StreamLost as well, with the cursor to go on from.
        """
        path = f"{_task_path(task_id)}/stream"
        return Follower(self._transport, path, task_id, after, resumes=self._resumes, draw=self._draw).events()

    async def generate(
        self, request: TaskRequest | None = None, /, **fields: Any
    ) -> AsyncGenerator[Accepted | Event, None]:
        """Submit a task and follow it: Accepted, then the events of its stream.

        A consumer that stops early (`aclose`, a `break` out of the loop, cancellation) cancels the task.
        """
        request = _identified(request, fields)
        task_id = str(request.task_id)
        events = self.stream(task_id)
        is_over = False
        try:
            yield Accepted(await self._submit(request))
            async for event in events:
                is_over = isinstance(event, End | ErrorEvent)
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            if not is_over:
                await self._say_farewell(task_id)
            raise
        finally:
            await events.aclose()

    async def _say_farewell(self, task_id: str) -> None:
        """Cancel an abandoned task as well as that can be done: nobody is left to be told of a failure."""
        done = asyncio.get_running_loop().create_future()
        self._farewells.add(done)
        try:
            with suppress(ClientError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_S):
                    await self.cancel(task_id)
        finally:
            self._farewells.discard(done)
            done.set_result(None)

    async def get_session(self, session_id: str) -> Session:
        """The session as it is now."""
        return read(Session, (await self._transport.call("GET", _session_path(session_id))).content)

    async def delete_session(self, session_id: str) -> None:
        """Evict a session. Not sent again when the connection breaks: a 404 could not tell gone from never there."""
        await self._transport.call("DELETE", _session_path(session_id), is_repeatable=False)

    async def list_pools(self) -> PoolList:
        """Every configured pool."""
        return read(PoolList, (await self._transport.call("GET", "/v1/pools")).content)

    async def get_pool_health(self, pool_id: str) -> PoolHealth:
        """The health of a pool and of its replicas."""
        return read(
            PoolHealth, (await self._transport.call("GET", f"/v1/pools/{quote(pool_id, safe='')}/health")).content
        )

    async def drain_pool(self, pool_id: str, deadline_ms: int | None = None) -> PoolChange:
        """Begin to drain a pool; running tasks have `deadline_ms`, by default what the pool says. Never sent twice."""
        return await self._change_pool(pool_id, "drain", deadline_ms)

    async def reload_pool(self, pool_id: str, deadline_ms: int | None = None) -> PoolChange:
        """Begin to replace the engines of a pool, in the same way."""
        return await self._change_pool(pool_id, "reload", deadline_ms)

    async def _change_pool(self, pool_id: str, kind: str, deadline_ms: int | None) -> PoolChange:
        path = f"/v1/pools/{quote(pool_id, safe='')}/{kind}"
        body = "{}" if deadline_ms is None else f'{{"deadline_ms": {deadline_ms}}}'
        return read(PoolChange, (await self._transport.call("POST", path, body=body, is_repeatable=False)).content)

    async def get_config(self) -> ConfigStatus:
        """Which configuration is in force, and what became of the latest change."""
        return read(ConfigStatus, (await self._transport.call("GET", "/v1/config")).content)

    async def reload_config(self) -> ConfigStatus:
        """Begin to apply the configuration file as it is now. Never sent twice."""
        return await self._change_config("reload")

    async def revert_config(self) -> ConfigStatus:
        """Begin to go back to the previous configuration. Never sent twice."""
        return await self._change_config("revert")

    async def _change_config(self, kind: str) -> ConfigStatus:
        answer = await self._transport.call("POST", f"/v1/config/{kind}", is_repeatable=False)
        return read(ConfigStatus, answer.content)

    async def list_nodes(self) -> NodeList:
        """Every configured node."""
        return read(NodeList, (await self._transport.call("GET", "/v1/nodes")).content)

    async def list_replica_sets(self) -> ReplicaSetList:
        """Which replicas agree, and their load."""
        return read(ReplicaSetList, (await self._transport.call("GET", "/v1/replica-sets")).content)

    async def get_capabilities(self) -> Capabilities:
        """What the server can do."""
        return read(Capabilities, (await self._transport.call("GET", "/v1/capabilities")).content)


def _identified(request: TaskRequest | None, fields: dict[str, Any]) -> TaskRequest:
    """The request with a task_id, validated. Raises InvalidRequest."""
    if request is not None and fields:
        raise InvalidRequest("give a TaskRequest or the fields of one, not both")
    given = fields if request is None else request.model_dump(exclude_unset=True)
    try:
        return TaskRequest.model_validate({"task_id": str(uuid.uuid4()), **given})
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{place}: {first['msg']}" if place else first["msg"]) from exc


def _task_path(task_id: str) -> str:
    return f"/v1/tasks/{quote(task_id, safe='')}"


def _session_path(session_id: str) -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}"
