"""The synchronous client: the asynchronous one on a private event loop in a thread of its own, nothing else."""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, Self, TypeVar

from llorch.client.aio import DEFAULT_URL, AsyncClient
from llorch.client.events import Accepted, Event
from llorch.client.patience import Draw
from llorch.client.transport import Notify, Timeouts
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

T = TypeVar("T")


class Client:
    """A client of one llorch server for code without an event loop; `with` closes it.

    Methods and errors are AsyncClient's.
    Streams are plain generators: closing one early, or leaving its loop, has the effect that it has there. Threads may
    share a client.
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
        self._client = AsyncClient(
            base_url, key, patience_s=patience_s, resumes=resumes, timeouts=timeouts, draw=draw, notify=notify
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llorch-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        try:
            self._run(self._client.aclose())
            self._run(self._loop.shutdown_asyncgens())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """The outcome of `call`, which an interrupt (Ctrl-C) of this thread cancels."""
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _iterate(self, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        turn = asyncio.Lock()  # an interrupted step is still on its way out when the close comes

        async def step() -> tuple[T] | None:
            async with turn:
                try:
                    return (await anext(events),)
                except StopAsyncIteration:
                    return None

        async def close() -> None:
            async with turn:
                await events.aclose()

        try:
            while (item := self._run(step())) is not None:
                yield item[0]
        finally:
            self._run(close())

    def submit(self, request: TaskRequest | None = None, /, **fields: Any) -> TaskAccepted:
        return self._run(self._client.submit(request, **fields))

    def get_task(self, task_id: str) -> Task:
        return self._run(self._client.get_task(task_id))

    def list_tasks(
        self,
        *,
        state: TaskState | None = None,
        session_id: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> TaskList:
        return self._run(self._client.list_tasks(state=state, session_id=session_id, limit=limit, cursor=cursor))

    def cancel(self, task_id: str) -> None:
        self._run(self._client.cancel(task_id))

    def stream(self, task_id: str, after: int = 0) -> Generator[Event, None, None]:
        return self._iterate(self._client.stream(task_id, after))

    def generate(self, request: TaskRequest | None = None, /, **fields: Any) -> Generator[Accepted | Event, None, None]:
        return self._iterate(self._client.generate(request, **fields))

    def get_session(self, session_id: str) -> Session:
        return self._run(self._client.get_session(session_id))

    def delete_session(self, session_id: str) -> None:
        self._run(self._client.delete_session(session_id))

    def list_pools(self) -> PoolList:
        return self._run(self._client.list_pools())

    def get_pool_health(self, pool_id: str) -> PoolHealth:
        return self._run(self._client.get_pool_health(pool_id))

    def drain_pool(self, pool_id: str, deadline_ms: int | None = None) -> PoolChange:
        return self._run(self._client.drain_pool(pool_id, deadline_ms))

    def reload_pool(self, pool_id: str, deadline_ms: int | None = None) -> PoolChange:
        return self._run(self._client.reload_pool(pool_id, deadline_ms))

    def get_config(self) -> ConfigStatus:
        return self._run(self._client.get_config())

    def reload_config(self) -> ConfigStatus:
        return self._run(self._client.reload_config())

    def revert_config(self) -> ConfigStatus:
        return self._run(self._client.revert_config())

    def list_nodes(self) -> NodeList:
        return self._run(self._client.list_nodes())

    def list_replica_sets(self) -> ReplicaSetList:
        return self._run(self._client.list_replica_sets())

    def get_capabilities(self) -> Capabilities:
        return self._run(self._client.get_capabilities())
