"""A service whose replicas are managed: engines come up as a FakeManager says, and give their tokens one by one."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.policy import QueuePolicy, RoutePolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Priority
from llorch.service.changes import Changes
from llorch.service.configurations import Candidate, Configurations, Deployment
from llorch.service.dispatcher import Dispatcher
from llorch.service.inventory import ConfigChange, PoolChange
from llorch.service.launching import LaunchOrder, LaunchReport, Supervision
from llorch.service.limits import Limits
from llorch.service.pools import Pools
from llorch.service.probes import Pool, ReplicaConfig
from llorch.service.records import Record, Records, Retention
from llorch.service.routes import Routes
from llorch.service.runner import Runner
from llorch.service.streams import OpenReaders
from llorch.service.tasks import Tasks
from llorch.testing.clock import running_clock
from llorch.testing.engine import PacedEnginePort
from llorch.testing.journal import FakeJournal
from llorch.testing.manager import FakeManager
from tests.unit.service.house import CTX, TENANT, RecordingTelemetry, parse, route, submission

CAPACITY = 100


def pool(pool_id: str = "a", model: str = "m", **fields: Any) -> Pool:
    return Pool(pool_id, route(f"llamacpp/{model}", **fields), drain_s=5.0)


def managed(of: Pool, name: str = "0", *, slots: int = 1, **order: Any) -> ReplicaConfig:
    """A managed replica of this pool; `order` says what differs from the usual."""
    replica_id = f"{of.pool_id}/{name}"
    order = {"model_path": "/models/m.gguf", "allow_cpu": True, "supervision": Supervision(start_s=20.0), **order}
    launch = LaunchOrder(
        replica_id=replica_id, pool_id=of.pool_id, engine="llamacpp", launcher="llamacpp", model=of.route.model,
        model_digest=None, ctx=CTX, slots=slots, **order,
    )  # fmt: skip
    return ReplicaConfig(replica_id, of, None, slots, order=launch, must_test=True, self_test_s=5.0)


def policy(capacity: int = CAPACITY) -> RoutePolicy:
    return RoutePolicy(QueuePolicy(dict.fromkeys(Priority, capacity)))


def deployment(*replicas: ReplicaConfig, policies: dict[str, RoutePolicy] | None = None) -> Deployment:
    """Of these replicas, their pools and routes."""
    pools = {config.pool.pool_id: config.pool for config in replicas}
    routes = {each.route.route_id: policy() for each in pools.values()}
    return Deployment(pools, replicas, {**routes, **(policies or {})})


class Estate:
    """Make it inside a running virtual loop, and use it in `async with`. `file` is what a reload reads."""

    def __init__(self, *replicas: ReplicaConfig, token_s: float = 0.1) -> None:
        clock = running_clock()
        self.token_s = token_s
        self.engines: dict[str, PacedEnginePort] = {}
        self.made: dict[str, list[PacedEnginePort]] = {}
        start = deployment(*replicas)
        self.file: Deployment | Exception = start
        self.needs_restart: tuple[str, ...] = ()
        self.ledger = Ledger()
        self.schedulers = {name: Scheduler(each, self.ledger) for name, each in start.policies.items()}
        self.manager = FakeManager(self._take_launch)
        self.told: list[PoolChange] = []
        self.pools = Pools(
            routes=Routes(start.routes.values()),
            pools=list(start.pools.values()),
            replicas=start.replicas,
            schedulers=self.schedulers,
            clock=clock,
            connect=self._connect,
            managers=lambda _node: self.manager,
        )
        self.changes = Changes(self.pools, lambda _pool, change: self.told.append(change))
        self.telemetry = RecordingTelemetry()
        self.records = Records(Retention())
        self.dispatcher = Dispatcher(
            schedulers=self.schedulers,
            ledger=self.ledger,
            records=self.records,
            journal=FakeJournal(),
            runner=Runner(self.pools.engine),
            telemetry=self.telemetry,
            clock=clock,
            on_suspect=self.pools.suspect,
            on_end=self.pools.note_end,
            on_move=self.changes.note_moved,
        )
        self.tasks = Tasks(
            dispatcher=self.dispatcher,
            pools=self.pools,
            limits=Limits(),
            readers=OpenReaders(heartbeat_s=15.0),
            telemetry=self.telemetry,
            clock=clock,
        )
        self.outcomes: list[tuple[str, ConfigChange]] = []
        self.finished: list[Deployment] = []
        self.configurations = Configurations(start, read=self._read, pools=self.pools, changes=self.changes, live=self)
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self.pools.watch(self.dispatcher.post))
        self.pools.announce(self.dispatcher.post)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.configurations.aclose()
        await self.changes.aclose()
        await self.dispatcher.aclose()
        assert self._watching is not None
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        for scheduler in self.schedulers.values():
            scheduler.check_invariants()

    # Configurations' Live

    def prepare(self, current: Deployment, new: Deployment) -> None:
        pass

    def finish(self, deployment: Deployment) -> None:
        self.finished.append(deployment)

    def open_route(self, route_id: str, policy: RoutePolicy) -> None:
        self.dispatcher.open_route(route_id, Scheduler(policy, self.ledger))

    def close_route(self, route_id: str) -> None:
        assert self.dispatcher.close_route(route_id)

    def commit(self, deployment: Deployment) -> None:
        self.pools.routes = Routes(deployment.routes.values())
        for route_id, each in deployment.policies.items():
            self.dispatcher.post(route_id, ev.ConfigChanged(each))

    def observe(self, outcome: str, change: ConfigChange) -> None:
        self.outcomes.append((outcome, change))

    # What tests do and see

    async def _read(self, current: Deployment) -> Candidate:
        if isinstance(self.file, Exception):
            raise self.file
        return Candidate(self.file, ("pools",), self.needs_restart)

    def _take_launch(self, report: LaunchReport) -> None:
        self.pools.take_launch(report)

    def _connect(self, config: ReplicaConfig, url: str, api_key: str | None) -> PacedEnginePort:
        slots = config.order.slots if config.order is not None else config.slots
        engine = PacedEnginePort(slots=slots, ctx=config.pool.route.ctx, token_s=self.token_s)
        engine.facts = replace(engine.facts, model_digest=None)
        self.engines[config.replica_id] = engine
        self.made.setdefault(config.replica_id, []).append(engine)
        return engine

    def states(self) -> dict[str, str]:
        """Every replica that there is, and its state."""
        return {health.replica_id: health.state.value for view in self.pools.list() for health in view.replicas}

    async def ready(self, *replica_ids: str) -> None:
        """Return when exactly these are there, and Ready."""
        wanted = dict.fromkeys(replica_ids, ReplicaState.READY.value)
        await until(lambda: self.states() == wanted)

    async def changed(self, pool_id: str = "a") -> PoolChange:
        """The pool's change, once it is over."""
        await until(lambda: (change := self.pools.change(pool_id)) is not None and change.state != "running")
        change = self.pools.change(pool_id)
        assert change is not None
        return change

    async def configured(self) -> ConfigChange:
        """The change of the configuration, once it is over."""
        status = self.configurations.status
        await until(lambda: (change := status().change) is not None and change.state != "running")
        change = status().change
        assert change is not None
        return change

    async def submit(self, *task_ids: str, **fields: Any) -> None:
        for task_id in task_ids:
            await self.tasks.submit(submission(task_id, **fields), "correlation")

    def record(self, task_id: str) -> Record:
        return self.records.get((TENANT, task_id))

    async def ended(self, task_ids: Sequence[str]) -> None:
        """Return when all of these have ended."""
        for task_id in task_ids:
            await self.ended_alone(task_id)
        await self.dispatcher.wait_idle()

    async def ended_alone(self, task_id: str) -> None:
        """Return when this one has its terminal frame."""
        await until(lambda: self.record(task_id).stream.is_closed)

    def frames(self, task_id: str) -> list[tuple[str, Any]]:
        """The durable frames of a task so far."""
        return [parse(frame) for frame in self.record(task_id).stream.frames]

    def text(self, task_id: str) -> str:
        return "".join(data["t"] for event, data in self.frames(task_id) if event == "token")


async def until(condition: Callable[[], bool], within_s: float = 600.0) -> None:
    """Return when it holds; time is virtual, and a look costs nothing."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (what is looked at tells nobody)
            await asyncio.sleep(0.05)
