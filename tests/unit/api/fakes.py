"""In-memory use cases behind the edge, and a real HTTP server in front of it."""

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llorch.api.asgi import build_api
from llorch.api.auth import NODE_PREFIX, KeyRecord, Keys, new_key
from llorch.api.protocol import Protocol
from llorch.domain.policy import FullPolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Budgets, Cohort, Priority, TaskState, WaitReason
from llorch.errors import LlorchError, NotFound
from llorch.service.inventory import (
    ConfigChange,
    ConfigStatus,
    Fact,
    LastError,
    PoolChange,
    PoolView,
    ReplicaHealth,
    ReplicaSetView,
)
from llorch.service.launching import HostFacts, LaunchOrder, LaunchReport, Phase
from llorch.service.limits import Limits
from llorch.service.nodes import NodeConfig, NodeProcess, NodeState, NodeView, Orders, Registration
from llorch.service.routes import Route, Routes
from llorch.service.streams import Reader, TaskStream
from llorch.service.submission import Acceptance, Placement, SessionView, Submission, TaskView, Timeline

TASK = "6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a10"
SESSION = "0b9f5a6c-77de-4c51-8f0e-5a3c2e1d4b60"
DIGEST = "sha256:" + "b" * 64
NODE, OTHER_NODE = "gpu-host", "gpu-host-2"

ROUTE = Route(
    route_id="r",
    engine="llamacpp",
    model="smol",
    quant="Q8_0",
    ctx=2048,
    sampler_profile_version="v1",
    allow_cpu=True,
    features=frozenset({"prompt", "messages", "grammar"}),
)


def replica(
    replica_id: str = "small/0", *, state: ReplicaState = ReplicaState.READY, error_at: float | None = None
) -> ReplicaHealth:
    return ReplicaHealth(
        replica_id=replica_id,
        pool_id="small",
        state=state,
        slots=2,
        slots_busy=1,
        engine_version=Fact("b6500", "measured"),
        model_digest=Fact(None, "unverified"),
        is_exact=False,
        last_error=None if error_at is None else LastError("POOL_UNREADY", f"refused at {error_at}", error_at),
    )


def pool(*replicas: ReplicaHealth, notice: str | None = "CPU demonstration") -> PoolView:
    return PoolView(
        pool_id="small",
        route=ROUTE,
        allow_cpu=True,
        notice=notice,
        capacity={Priority.INTERACTIVE: 64, Priority.BATCH: 32},
        full_policy=dict.fromkeys(Priority, FullPolicy.REJECT),
        depth={Priority.INTERACTIVE: 3, Priority.BATCH: 0},
        is_draining=False,
        replicas=replicas,
    )


def task_view(state: TaskState = TaskState.RUNNING, **changes: object) -> TaskView:
    fields: dict[str, object] = {
        "task_id": TASK,
        "session_id": SESSION,
        "state": state,
        "workload": "completion",
        "priority": Priority.INTERACTIVE,
        "model_ref": "smol",
        "engine": "llamacpp",
        "strict": False,
        "seed": 42,
        "max_tokens": 16,
        "deadline_ms": None,
        "labels": {"app": "docs"},
        "correlation_id": "req-1",
        "timeline": Timeline(1763871900.123, 1763871900.363, None, None, 240, (WaitReason.SLOTS_BUSY,), 2),
        "placement": Placement("small", "small/0", 71, None, None),
        "queue_position": None,
        "predicted_start_ms": None,
        "output": None,
        "finish_reason": None,
        "usage": None,
        "fault": None,
    }
    return TaskView(**(fields | changes))  # type: ignore[arg-type]


class FakeTasks:
    """Accepts everything, remembers it, and has one stream per (tenant, task_id)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.submissions: list[Submission] = []
        self.correlation_ids: list[str] = []
        self.canceled: list[tuple[str, str]] = []
        self.listed: list[dict[str, object]] = []
        self.followed: list[int] = []
        self.streams: dict[tuple[str, str], TaskStream] = {}
        self.left = 0
        self.on_leave: Callable[[], None] = lambda: None
        self.failure: Exception | None = None
        self.budgets: Budgets | None = None

    async def submit(self, submission: Submission, correlation_id: str) -> Acceptance:
        if self.failure is not None:
            raise self.failure
        self.submissions.append(submission)
        self.correlation_ids.append(correlation_id)
        return Acceptance(submission.task_id, submission.session_id, TaskState.QUEUED, 3, budgets=self.budgets)

    async def cancel(self, tenant: str, task_id: str) -> None:
        self.canceled.append((tenant, task_id))

    def get(self, tenant: str, task_id: str) -> TaskView:
        if self.failure is not None:
            raise self.failure
        return task_view(task_id=task_id)

    def list(
        self, tenant: str, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> tuple[Sequence[TaskView], str | None]:
        self.listed.append(
            {"tenant": tenant, "state": state, "session_id": session_id, "limit": limit, "cursor": cursor}
        )
        return [task_view()], "AAAAAAAAAA8"

    def follow(self, tenant: str, task_id: str, after: int) -> Reader | None:
        self.followed.append(after)
        stream = self.streams.get((tenant, task_id))
        if stream is None:
            raise NotFound
        if stream.is_closed and after == stream.last_id:
            return None
        return stream.join(after, self._leave)

    def _leave(self) -> None:
        self.left += 1
        self.on_leave()


class FakeSessions:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.deleted: list[tuple[str, str]] = []

    def get(self, tenant: str, session_id: str) -> SessionView:
        return SessionView(session_id=session_id, ttl_ms_remaining=1000, turns=2, turns_max=8)

    async def delete(self, tenant: str, session_id: str) -> None:
        self.deleted.append((tenant, session_id))


class FakePools:
    def __init__(self) -> None:
        self.routes = Routes([ROUTE])
        self.reset()

    def reset(self) -> None:
        self.pools: Sequence[PoolView] = (pool(replica()),)

    def list(self) -> Sequence[PoolView]:
        return self.pools

    def get(self, pool_id: str) -> PoolView:
        for view in self.pools:
            if view.pool_id == pool_id:
                return view
        raise NotFound

    def replica_sets(self) -> Sequence[ReplicaSetView]:
        return [ReplicaSetView(ROUTE, Cohort("b6500", DIGEST, exact=True), self.pools[0].replicas, 3)]

    def count_ready(self) -> int:
        return sum(r.state is ReplicaState.READY for view in self.pools for r in view.replicas)


class FakeChanges:
    """Begins every change at once, and remembers the deadline that it was given."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.begun: list[tuple[str, str, float | None]] = []
        self.failure: LlorchError | None = None

    def drain(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        return self._begin("drain", pool_id, deadline_s)

    def reload(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        return self._begin("reload", pool_id, deadline_s)

    def _begin(self, kind: str, pool_id: str, deadline_s: float | None) -> PoolChange:
        if self.failure is not None:
            raise self.failure
        self.begun.append((kind, pool_id, deadline_s))
        return PoolChange(kind, "running", 1763871900.0, replicas_total=1, running=1)


class FakeConfigurations:
    """A configuration of revision 1 whose changes go on for ever."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.begun: list[str] = []
        self.failure: LlorchError | None = None
        self.change: ConfigChange | None = None

    def status(self) -> ConfigStatus:
        return ConfigStatus(1, 1763871900.0, can_revert=False, change=self.change)

    async def reload(self) -> ConfigStatus:
        return self._begin("reload")

    async def revert(self) -> ConfigStatus:
        return self._begin("revert")

    def _begin(self, kind: str) -> ConfigStatus:
        if self.failure is not None:
            raise self.failure
        self.begun.append(kind)
        self.change = ConfigChange("running", 1763871901.0, changed=("pools.small.slots",))
        return self.status()


LEASE = "6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a77"
ORDERS = Orders(
    LEASE, 10.0, 2.0, (LaunchOrder("small/0", "small", "llamacpp", "llamacpp", "m", None, None, 64, 1),), ()
)


class FakeNodes:
    """Lets every node join, and remembers what it told."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.registrations: list[tuple[Registration, str]] = []
        self.renewals: list[tuple[str, str, HostFacts, Sequence[LaunchReport], str]] = []
        self.left: list[tuple[str, str]] = []
        self.failure: LlorchError | None = None

    def register(self, registration: Registration, peer: str) -> Orders:
        self._fail()
        self.registrations.append((registration, peer))
        return ORDERS

    def renew(
        self, node_id: str, lease_id: str, *, host: HostFacts, reports: Sequence[LaunchReport], peer: str
    ) -> Orders:
        self._fail()
        self.renewals.append((node_id, lease_id, host, reports, peer))
        return ORDERS

    def leave(self, node_id: str, lease_id: str) -> None:
        self._fail()
        self.left.append((node_id, lease_id))

    def list(self) -> Sequence[NodeView]:
        return [node_view(), node_view("never", state=NodeState.ABSENT)]

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def node_view(node_id: str = NODE, *, state: NodeState = NodeState.JOINED) -> NodeView:
    """A node as it is while it is joined, or before it ever was."""
    if state is not NodeState.JOINED:
        return NodeView(node_id, state, None, None, None, None, None, None, ())
    processes = (NodeProcess("small/0", Phase.UP, 3),)
    return NodeView(node_id, state, 1763871900.0, "boot", "1.0.0", "http://10.0.0.7", 7.5, HostFacts(), processes)


class Edge:
    """A whole edge over fakes, with the keys `admin`, `data`, `control` and `batch` (no interactive) unless keyless.

    The nodes NODE and OTHER_NODE have the tokens of their names.
    """

    def __init__(self, *, is_keyless: bool = False) -> None:
        self.tasks, self.sessions, self.pools = FakeTasks(), FakeSessions(), FakePools()
        self.changes, self.configurations, self.nodes = FakeChanges(), FakeConfigurations(), FakeNodes()
        self.is_shutting_down = False
        self.keys: dict[str, str] = {}
        self.key_records = () if is_keyless else self._make_keys()
        self.node_records = self._make_tokens()
        self.configured = Keys(self.key_records, self.node_records)
        self.app = build_api(
            tasks=self.tasks,
            sessions=self.sessions,
            pools=self.pools,
            changes=self.changes,
            configurations=self.configurations,
            nodes=self.nodes,
            limits=Limits(body_bytes=4096, header_bytes=2048),
            metrics_text=lambda: b"tasks_enqueued_total 1.0\n",
            keys=self.configured,
            is_shutting_down=lambda: self.is_shutting_down,
        )

    def reset(self) -> None:
        """As if nothing had happened yet."""
        self.tasks.reset()
        self.sessions.reset()
        self.pools.reset()
        self.changes.reset()
        self.configurations.reset()
        self.nodes.reset()
        self.configured.replace(self.key_records, self.node_records)
        self.is_shutting_down = False

    def bearer(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def _make_keys(self) -> Sequence[KeyRecord]:
        wanted = [("admin", {"admin"}), ("data", {"data"}), ("control", {"control"}), ("batch", {"data"})]
        records = []
        for name, scopes in wanted:
            self.keys[name], sha256 = new_key()
            priorities = frozenset({Priority.BATCH}) if name == "batch" else frozenset(Priority)
            records.append(KeyRecord(name, sha256, f"tenant-{name}", frozenset(scopes), priorities))
        return records

    def _make_tokens(self) -> Sequence[NodeConfig]:
        records = []
        for name in (NODE, OTHER_NODE):
            self.keys[name], sha256 = new_key(NODE_PREFIX)
            records.append(NodeConfig(name, sha256, frozenset({"small"}), ()))
        return records


@asynccontextmanager
async def serving(app: ASGIApp, *, connections: int | None = None) -> AsyncIterator[int]:
    """The app on a real uvicorn at a free port of 127.0.0.1, in this event loop."""
    protocol: Any = partial(Protocol, header_bytes=8192, connections=connections)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="on", access_log=False, log_config=None)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup(sockets=[listener])
        try:
            yield listener.getsockname()[1]
        finally:
            await server.shutdown(sockets=[listener])
