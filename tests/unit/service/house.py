"""A whole service in one process, around engines, a journal and a clock that the test controls."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import QueuePolicy, RoutePolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Priority, TaskState
from llorch.service.dispatcher import Dispatcher
from llorch.service.limits import Limits
from llorch.service.pools import Pools
from llorch.service.probes import Pool, ReplicaConfig
from llorch.service.records import Record, Records, Retention
from llorch.service.routes import Route, Routes
from llorch.service.runner import Runner
from llorch.service.sessions import Sessions
from llorch.service.streams import OpenReaders, Reader
from llorch.service.submission import Acceptance, Submission
from llorch.service.tasks import Tasks
from llorch.telemetry import Telemetry
from llorch.testing.clock import running_clock
from llorch.testing.engine import FakeEnginePort
from llorch.testing.journal import FakeJournal

TENANT = "acme"
CTX = 4096


class RecordingTelemetry(Telemetry):
    """Keeps what it was told instead of counting and logging it."""

    def __init__(self) -> None:
        self.observed: list[tuple[str, ev.Event, tuple[ev.Command, ...]]] = []
        self.bugs: list[BaseException] = []
        self.replayed: list[tuple[int, int]] = []
        self.rejections: list[str] = []

    def observe(self, route_id: str, event: ev.Event, commands: Sequence[ev.Command], now: float) -> None:
        self.observed.append((route_id, event, tuple(commands)))

    def observe_usage(self, attempt_id: int, prompt_tokens: int) -> None:
        pass

    def observe_replay(self, attempt_id: int, tokens: int) -> None:
        self.replayed.append((attempt_id, tokens))

    def observe_rejection(self, engine: str | None, code: str, **told: Any) -> None:
        self.rejections.append(code)

    def report_bug(self, where: str, error: BaseException) -> None:
        self.bugs.append(error)

    def events(self, kind: type[ev.Event]) -> list[Any]:
        return [event for _, event, _ in self.observed if isinstance(event, kind)]


def route(route_id: str = "llamacpp/m", **fields: Any) -> Route:
    engine, model = route_id.split("/")
    given = {"quant": "q4", "ctx": CTX, "sampler_profile_version": "1", **fields}
    return Route(route_id=route_id, engine=engine, model=model, **given)


def submission(task_id: str = "t", *, tenant: str = TENANT, **fields: Any) -> Submission:
    """A small prompt that fits by its bytes; the digest follows from the fields."""
    given = {
        "session_id": f"session of {task_id}",
        "model_ref": "m",
        "max_tokens": 16,
        "prompt": "once upon a time",
        **fields,
    }
    digest = repr(sorted(given.items())).encode()
    return Submission(tenant=tenant, task_id=task_id, **{"digest": digest, **given})


class House:
    """Make it inside a running virtual loop, and use it in `async with`."""

    def __init__(
        self,
        *engines: FakeEnginePort,
        slots: int = 1,
        capacity: int = 100,
        turns: int = 1000,
        retention: Retention | None = None,
        limits: Limits | None = None,
        routes: Sequence[Route] | None = None,
        policy: RoutePolicy | None = None,
    ) -> None:
        self.clock = running_clock()
        self.engines = engines or (FakeEnginePort(slots=slots),)
        self.routes = routes or [route()]
        self.ledger = Ledger(SessionLimits(turns=turns))
        policy = policy or RoutePolicy(QueuePolicy(dict.fromkeys(Priority, capacity)))
        self.schedulers = {each.route_id: Scheduler(policy, self.ledger) for each in self.routes}
        pools = [Pool(each.route_id.replace("/", "-"), each) for each in self.routes]
        self.replicas = [
            ReplicaConfig(f"{pool.pool_id}/{number}", pool, engine, slots)
            for pool in pools
            for number, engine in enumerate(self.engines)
        ]
        self.pools = Pools(
            routes=Routes(self.routes),
            pools=pools,
            replicas=self.replicas,
            schedulers=self.schedulers,
            clock=self.clock,
        )
        self.telemetry = RecordingTelemetry()
        self.journal = FakeJournal()
        self.records = Records(retention or Retention())
        self.suspects: list[str] = []
        self.watching: asyncio.Task[None] | None = None
        self.dispatcher = Dispatcher(
            schedulers=self.schedulers,
            ledger=self.ledger,
            records=self.records,
            journal=self.journal,
            runner=Runner(self.pools.engine),
            telemetry=self.telemetry,
            clock=self.clock,
            on_suspect=self._suspect,
        )
        self.readers = OpenReaders(heartbeat_s=15.0)
        self.tasks = Tasks(
            dispatcher=self.dispatcher,
            pools=self.pools,
            limits=limits or Limits(),
            readers=self.readers,
            telemetry=self.telemetry,
            clock=self.clock,
        )
        self.sessions = Sessions(self.dispatcher)

    @property
    def engine(self) -> FakeEnginePort:
        return self.engines[0]

    @property
    def scheduler(self) -> Scheduler:
        return self.schedulers[self.routes[0].route_id]

    async def __aenter__(self) -> Self:
        self.pools.announce(self.dispatcher.post)
        for number in range(len(self.replicas)):
            self.tell(number, ReplicaState.READY)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.watching is not None:
            self.watching.cancel()
        for engine in self.engines:
            engine.releasing.open()
        self.journal.release()
        await self.dispatcher.aclose()
        for scheduler in self.schedulers.values():
            scheduler.check_invariants()

    def _suspect(self, replica_id: str) -> None:
        self.suspects.append(replica_id)
        self.pools.suspect(replica_id)

    def tell(self, number: int, state: ReplicaState) -> None:
        """Tell the scheduler of a replica without probing it."""
        config = self.replicas[number]
        known = self.pools._watched[config.replica_id].replica()
        self.dispatcher.post(config.pool.route.route_id, ev.ReplicaChanged(replace(known, state=state)))

    def obey(self, *commands: ev.Command) -> None:
        """Let the scheduler of the first route order this now."""
        handle = self.scheduler.handle
        self.scheduler.handle = lambda *_: list(commands)  # type: ignore[method-assign]
        self.dispatcher.post(self.routes[0].route_id, ev.Tick())
        self.scheduler.handle = handle  # type: ignore[method-assign]

    async def submit(self, task_id: str = "t", **fields: Any) -> Acceptance:
        return await self.tasks.submit(submission(task_id, **fields), "correlation")

    def record(self, task_id: str = "t", tenant: str = TENANT) -> Record:
        return self.records.get((tenant, task_id))

    def state(self, task_id: str = "t") -> TaskState:
        return self.record(task_id).admitted.state

    def read_all(self, task_id: str = "t") -> list[tuple[str, Any]]:
        """The durable frames so far, decoded."""
        return [parse(frame) for frame in self.record(task_id).stream.frames]

    def codes(self, task_id: str = "t") -> list[str]:
        """Names of the durable frames so far, and the code where there is one."""
        return [f"{event} {data['code']}" if "code" in data else event for event, data in self.read_all(task_id)]

    def ends(self) -> list[int]:
        """The attempts that were told to have ended."""
        return [event.attempt_id for event in self.telemetry.events(ev.AttemptEnded)]

    def follow(self, task_id: str = "t", after: int = 0) -> Reader:
        reader = self.tasks.follow(TENANT, task_id, after)
        assert reader is not None
        return reader


def parse(frame: bytes) -> tuple[str, Any]:
    """Event name and data of one frame."""
    fields = dict(line.split(": ", 1) for line in frame.decode().strip().split("\n"))
    return fields["event"], json.loads(fields["data"])


def parse_all(raw: bytes) -> list[tuple[str, Any]]:
    return [parse(frame) for frame in raw.split(b"\n\n") if frame and not frame.startswith(b":")]


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)
