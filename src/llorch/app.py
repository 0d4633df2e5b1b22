"""The composition root: the only module that names concrete classes.

`build` makes a service of a configuration; `serve` runs it until a signal.
"""

import asyncio
import gc
import os
import resource
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop
from structlog.typing import FilteringBoundLogger

from llorch import config
from llorch.adapters.http import Timeouts
from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.api.asgi import build_api
from llorch.api.server import Address, Server
from llorch.domain.events import ShutdownRequested
from llorch.domain.ledger import Ledger
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Priority, TaskKey
from llorch.errors import ConfigError, LaunchError
from llorch.launch.llamacpp import EngineProcess
from llorch.launch.model_file import DEMO_MODEL_NAME, find_demo_model
from llorch.service.dispatcher import Dispatcher
from llorch.service.inventory import Fact
from llorch.service.pools import Pools
from llorch.service.probes import UNVERIFIED, Pool, ReplicaConfig
from llorch.service.records import Records
from llorch.service.routes import Routes
from llorch.service.runner import Runner
from llorch.service.sessions import Sessions
from llorch.service.streams import OpenReaders
from llorch.service.tasks import Tasks
from llorch.settings import (
    CPU_NOTICE,
    client_limits,
    default_quota,
    key_records,
    quotas,
    retention,
    route_id_of,
    route_policy,
    route_scopes,
    service_pool,
    session_limits,
)
from llorch.stores.memory import MemoryJournal
from llorch.telemetry import Sample, Telemetry
from llorch.telemetry_log import set_up as set_up_logging
from llorch_contract.metrics import FAMILIES

RELEASE_S = 5.0
"""After the grace of a shutdown: how long engines have to let go of what was broken off, in seconds."""

SPARE_FILES = 256
"""Open files beside connections: logs, sockets that listen, probes."""

DEMO_POOL, DEMO_CTX = "demo", 2048


class SystemClock:
    """The machine's clock."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class Service:
    """A whole service: `api` answers HTTP once `lifespan` runs; `drain` ends it in order."""

    def __init__(
        self, settings: config.Settings, log: FilteringBoundLogger, measured: Sequence[EngineProcess] = ()
    ) -> None:
        self.settings = settings
        self.log = log
        clock, streams = SystemClock(), settings.streams
        pools = [service_pool(settings, pool) for pool in settings.pools]
        replicas = list(_replicas(settings, pools, measured))
        routes = {pool.route.route_id: pool.route for pool in pools}
        ledger = Ledger(session_limits(settings), quotas(settings), default_quota(settings))
        policies = {route_id_of(pool): route_policy(settings, pool) for pool in settings.pools}
        schedulers = {name: Scheduler(policy, ledger) for name, policy in policies.items()}
        self.pools = Pools(
            routes=Routes(routes.values()), pools=pools, replicas=replicas, schedulers=schedulers, clock=clock
        )
        self.telemetry = Telemetry(FAMILIES, route_scopes(settings), log, self._describe)
        self.dispatcher = Dispatcher(
            schedulers=schedulers,
            ledger=ledger,
            records=Records(retention(settings)),
            journal=MemoryJournal(),
            runner=Runner({replica.replica_id: replica.engine for replica in replicas}),
            telemetry=self.telemetry,
            clock=clock,
            on_suspect=self.pools.suspect,
        )
        limits = client_limits(settings)
        self.readers = OpenReaders(streams.heartbeat_s)
        self.api = build_api(
            tasks=Tasks(
                dispatcher=self.dispatcher,
                pools=self.pools,
                limits=limits,
                readers=self.readers,
                telemetry=self.telemetry,
                clock=clock,
            ),
            sessions=Sessions(self.dispatcher),
            pools=self.pools,
            limits=limits,
            keys=key_records(settings),
            metrics_text=lambda: self.telemetry.render(self._samples()),
            lifespan=self.lifespan,
            observe=self.telemetry.observe_request,
            is_shutting_down=lambda: self.pools.is_draining,
        )

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Everything that runs beside requests, for as long as the server does."""
        self.pools.announce(self.dispatcher.post)
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self.pools.watch(self.dispatcher.post)),
                group.create_task(self.readers.beat()),
            ]
            try:
                yield
            finally:
                for loop in loops:
                    loop.cancel()
                await self.dispatcher.aclose()
                await self.pools.aclose()

    async def drain(self) -> None:
        """Refuse what is new, end what waits, give what runs its grace; return when every task has ended."""
        self.pools.is_draining = True
        self.dispatcher.post_to_all(ShutdownRequested(self.settings.server.shutdown_grace_s))
        try:
            async with asyncio.timeout(self.settings.server.shutdown_grace_s + RELEASE_S):
                await self.dispatcher.wait_idle()
        except TimeoutError:
            self.log.warning("drain_incomplete", notice="some engines are still busy; they are cut off now")

    def hurry(self) -> None:
        """End the grace of a drain: what still runs gets its last frame now."""
        self.dispatcher.post_to_all(ShutdownRequested(0.0))

    def _describe(self, key: TaskKey) -> dict[str, str]:
        """What log lines about a task say of it, beside its id."""
        record = self.dispatcher.find(key)
        if record is None:
            return {}
        return {"correlation_id": record.correlation_id, "session_id": record.submission.session_id}

    def _samples(self) -> Iterator[Sample]:
        """The gauges, read at the scrape."""
        yield Sample("open_streams", (), len(self.readers))
        for route_id, scheduler in self.dispatcher.schedulers.items():
            route = self.pools.routes.get(route_id)
            for priority in Priority:
                queue = (route.engine, route.model, priority.value)
                yield Sample("queue_depth", queue, scheduler.queue.depth(priority))
        for pool in self.pools.list():
            yield Sample("pool_allow_cpu", (pool.pool_id,), int(pool.allow_cpu))
            for replica in pool.replicas:
                version = replica.engine_version.value or "unverified"
                labels = (pool.route.engine, version, pool.pool_id, replica.replica_id)
                yield Sample("replica_ready", labels, int(replica.state.value == "ready"))
                yield Sample("slots", labels, replica.slots)
                yield Sample("slots_busy", labels, replica.slots_busy)


def serve(path: Path | None) -> None:
    """Run the service until SIGTERM or SIGINT; without a configuration file, a demonstration of it.

    Raises ConfigError for a configuration that cannot be used, LaunchError when an engine could not be started.
    """
    settings = config.load(path, os.environ)
    if path is not None and not settings.pools:
        raise ConfigError(f"{path}: pools: at least one pool is needed; without a file a demonstration is served")
    log = set_up_logging(settings.log.level.value, settings.log.format.value, secrets=_secrets(settings))
    _raise_file_limit(settings, log)
    _calm_collector()
    uvloop.run(_serve(settings, log))


def _raise_file_limit(settings: config.Settings, log: FilteringBoundLogger) -> None:
    """Allow as many open files as there may be connections of clients and to engines, or say that it cannot be."""
    slots = sum(replica.slots for pool in settings.pools for replica in pool.replicas)
    wanted = settings.server.limits.connections + slots + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and soft < wanted:
        allowed = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            notice = f"{wanted} open files are needed when all connections are in use; this process may have {allowed}"
            log.warning("file_limit", notice=notice)


def _calm_collector() -> None:
    """Keep the garbage collector from walking over what lives as long as the process, and let it run seldom.

    Tasks and streams are freed by their reference counts; what is left to collect is little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)


async def _serve(settings: config.Settings, log: FilteringBoundLogger) -> None:
    if settings.pools:
        await _serve_until_signal(Service(settings, log))
        return
    model = await find_demo_model()
    async with EngineProcess(model, slots=1, ctx=DEMO_CTX, alias=DEMO_MODEL_NAME.lower()) as engine:
        service = Service(_demo_settings(settings, engine), log, [engine])
        log.warning("cpu_demonstration", notice=CPU_NOTICE, model=str(model), pid=engine.pid, allow_cpu=True)
        watch = asyncio.create_task(_watch_engine(service, engine))
        try:
            await _serve_until_signal(service)
        finally:
            watch.cancel()


async def _serve_until_signal(service: Service) -> None:
    server = service.settings.server
    address = Address(
        host=server.host,
        port=server.port,
        cert=server.tls.cert if server.tls else None,
        key=server.tls.key if server.tls else None,
        header_bytes=server.limits.header_bytes,
        connections=server.limits.connections,
    )
    if not service.settings.keys:
        service.log.warning("keyless", notice="no API keys: loopback only, and everybody there is the tenant local")
    scheme = "https" if server.tls else "http"
    service.log.info("serving", url=f"{scheme}://{server.host}:{server.port}")
    await Server(service.api, address, service.drain, service.hurry).serve()


async def _watch_engine(service: Service, engine: EngineProcess) -> None:
    """An engine that dies does not come back: say so, and end what waited for it."""
    status = await engine.wait()
    error = LaunchError(f"the engine ended with status {status}; its last words: {engine.last_log[-500:]}")
    service.pools.fail(f"{DEMO_POOL}/0", error, service.dispatcher.post)


def _secrets(settings: config.Settings) -> list[str]:
    """What must never be in a log line, whoever quotes it."""
    return [r.api_key.get_secret_value() for pool in settings.pools for r in pool.replicas if r.api_key is not None]


def _demo_settings(settings: config.Settings, engine: EngineProcess) -> config.Settings:
    pool = {
        "id": DEMO_POOL,
        "engine": "llamacpp",
        "model": DEMO_MODEL_NAME.lower(),
        "quant": "q4_1",
        "ctx": DEMO_CTX,
        "allow_cpu": True,
        "replicas": [{"url": engine.url, "slots": 1, "api_key": engine.api_key}],
    }
    return settings.model_copy(update={"pools": [config.Pool.model_validate(pool)]})


def _replicas(
    settings: config.Settings, pools: Sequence[Pool], measured: Sequence[EngineProcess]
) -> Iterator[ReplicaConfig]:
    launched = {engine.url: engine for engine in measured}
    for pool, configured in zip(pools, settings.pools, strict=True):
        for number, replica in enumerate(configured.replicas):
            version, digest = _stated(configured.engine_version), _stated(configured.model_digest)
            if (engine := launched.get(replica.url)) is not None:
                version = Fact(engine.engine_version, "measured")
                digest = Fact(f"sha256:{engine.model_digest}", "measured")
            yield ReplicaConfig(
                replica_id=f"{pool.pool_id}/{replica.id or number}",
                pool=pool,
                engine=_engine(configured, replica),
                slots=replica.slots,
                engine_version=version,
                model_digest=digest,
            )


def _stated(value: str | None) -> Fact:
    return UNVERIFIED if value is None else Fact(value, "stated")


def _engine(pool: config.Pool, replica: config.Replica) -> LlamaCppEngine:
    timeouts = pool.timeouts
    return LlamaCppEngine(
        replica.url,
        api_key=replica.api_key.get_secret_value() if replica.api_key else None,
        timeouts=Timeouts(connect_s=timeouts.connect_s, first_byte_s=timeouts.first_byte_s, idle_s=timeouts.idle_s),
        ssl_context=ssl.create_default_context() if replica.url.startswith("https:") else None,
    )
