"""The composition root: the only module that names concrete classes.

`Service` is made of a configuration; `serve` runs it until a signal, `run_pool_manager` a host of engines that joins.
"""

import asyncio
import gc
import os
import resource
import signal
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import uvloop
from structlog.typing import FilteringBoundLogger

from llorch import __version__, config
from llorch.adapters.http import Timeouts
from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.api.asgi import build_api
from llorch.api.auth import Keys
from llorch.api.server import Address, Server
from llorch.client import NodeClient
from llorch.config_diff import difference
from llorch.deployment import deployment_of
from llorch.domain.events import ShutdownRequested
from llorch.domain.ledger import Ledger
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Cohort, Priority, TaskKey
from llorch.errors import ConfigError, InvalidParams, LaunchError, LlorchError
from llorch.gauges import LOCAL_NODE, host_gauges, route_gauges
from llorch.launch.gguf import trained_context
from llorch.launch.llamacpp import installed_version
from llorch.launch.model_file import DEMO_MODEL_NAME, DEMO_MODEL_SHA256, find_demo_model
from llorch.live import EngineReporter, Live
from llorch.poolmanager.agent import Agent, NodeIdentity
from llorch.poolmanager.devices import NvmlDevices
from llorch.poolmanager.supervisor import Supervisor
from llorch.service.changes import Changes
from llorch.service.configurations import Candidate, Configurations, Deployment
from llorch.service.dispatcher import Dispatcher
from llorch.service.inventory import SloSnapshot
from llorch.service.launching import LaunchReport, Manager
from llorch.service.nodes import Nodes
from llorch.service.pools import Pools
from llorch.service.probes import ReplicaConfig
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
    node_configs,
    quotas,
    retention,
    route_scopes,
    session_limits,
)
from llorch.stores.memory import MemoryJournal
from llorch.telemetry import Sample, Telemetry
from llorch.telemetry_log import set_up as set_up_logging
from llorch.telemetry_slo import WINDOW_S
from llorch_contract.metrics import FAMILIES

RELEASE_S = 5.0
"""After the grace of a shutdown: how long engines have to let go of what was broken off, in seconds."""

SPARE_FILES = 256
"""Open files beside connections: logs, sockets that listen, probes."""

DEMO_POOL, DEMO_CTX = "demo", 2048

SECRET_CHARS = 12
"""Values of an engine's environment this long may be secrets, and are kept out of log lines; shorter ones are words."""


class SystemClock:
    """The machine's clock."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class Service:
    """A whole service: `api` answers HTTP once `lifespan` runs; `drain` ends it in order.

    `path` is the configuration file that a reload reads again; None where there is none.
    """

    def __init__(self, settings: config.Settings, log: FilteringBoundLogger, path: Path | None = None) -> None:
        self.settings = settings
        self.log = log
        self._path = path
        clock, streams = SystemClock(), settings.streams
        deployment = deployment_of(settings)
        ledger = Ledger(session_limits(settings), quotas(settings), default_quota(settings))
        schedulers = {name: Scheduler(policy, ledger) for name, policy in deployment.policies.items()}
        self._clock = clock
        self.telemetry = Telemetry(FAMILIES, route_scopes(settings), log, self._describe)
        self._reporter = EngineReporter(self.telemetry, log)
        self.supervisor = Supervisor(
            owner=_owner(settings, path), devices=NvmlDevices(), report=self._take_launch, log=log
        )
        self.nodes = Nodes(
            node_configs(settings),
            version=__version__,
            clock=clock,
            lease_s=settings.node_lease_s,
            report=self._take_launch,
            new_id=lambda: str(uuid4()),
            on_state=self._reporter.on_node,
        )
        self.pools = Pools(
            routes=Routes(deployment.routes.values()),
            pools=list(deployment.pools.values()),
            replicas=deployment.replicas,
            schedulers=schedulers,
            clock=clock,
            connect=_connect,
            managers=self._manager_of,
            on_launch=self._reporter.on_launch,
            on_test=self._reporter.on_test,
            slo_of=self._slo_of,
        )
        self.changes = Changes(self.pools, self._reporter.on_change)
        self.dispatcher = Dispatcher(
            schedulers=schedulers,
            ledger=ledger,
            records=Records(retention(settings)),
            journal=MemoryJournal(),
            runner=Runner(self.pools.engine),
            telemetry=self.telemetry,
            clock=clock,
            on_suspect=self.pools.suspect,
            on_end=self.pools.note_end,
            on_move=self.changes.note_moved,
        )
        keys = Keys(key_records(settings), node_configs(settings))
        self.configurations = Configurations(
            deployment,
            read=self._read,
            pools=self.pools,
            changes=self.changes,
            live=Live(
                dispatcher=self.dispatcher,
                ledger=ledger,
                pools=self.pools,
                nodes=self.nodes,
                keys=keys,
                telemetry=self.telemetry,
                log=log,
            ),
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
            changes=self.changes,
            configurations=self.configurations,
            nodes=self.nodes,
            limits=limits,
            keys=keys,
            metrics_text=lambda: self.telemetry.render(self._samples()),
            lifespan=self.lifespan,
            observe=self.telemetry.observe_request,
            is_shutting_down=lambda: self.pools.is_draining,
        )

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Everything that runs beside requests, for as long as the server does. Engines stop last."""
        loop = asyncio.get_running_loop()
        async with self.supervisor, asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self.pools.watch(self.dispatcher.post)),
                group.create_task(self.readers.beat()),
                group.create_task(self.nodes.watch()),
            ]
            self.pools.announce(self.dispatcher.post)
            loop.add_signal_handler(signal.SIGHUP, lambda: group.create_task(self._reload()))
            try:
                yield
            finally:
                loop.remove_signal_handler(signal.SIGHUP)
                await self._stop_changing()
                for each in loops:
                    each.cancel()
                await self.dispatcher.aclose()
                await self.pools.aclose()

    async def drain(self) -> None:
        """Refuse what is new, end what waits, give what runs its grace; return when every task has ended."""
        self.pools.is_draining = True
        await self._stop_changing()
        self.dispatcher.post_to_all(ShutdownRequested(self.settings.server.shutdown_grace_s))
        try:
            async with asyncio.timeout(self.settings.server.shutdown_grace_s + RELEASE_S):
                await self.dispatcher.wait_idle()
        except TimeoutError:
            self.log.warning("drain_incomplete", notice="some engines are still busy; they are cut off now")

    def hurry(self) -> None:
        """End the grace of a drain: what still runs gets its last frame now."""
        self.dispatcher.post_to_all(ShutdownRequested(0.0))

    async def _stop_changing(self) -> None:
        await self.configurations.aclose()
        await self.changes.aclose()

    async def _reload(self) -> None:
        """SIGHUP: whoever sent it reads the outcome in the log."""
        try:
            await self.configurations.reload()
        except LlorchError as error:
            self.log.warning("config_reload_refused", code=error.code, reason=error.message)

    async def _read(self, current: Deployment) -> Candidate:
        """The configuration as it is on disk now, and how it differs from the one in force."""
        if self._path is None:
            raise InvalidParams("there is no configuration file to read again")
        try:
            new = await asyncio.to_thread(config.load, self._path, os.environ, inspect_model=trained_context)
        except ConfigError as error:
            raise InvalidParams(error.message, details=error.details) from error
        assert isinstance(current.source, config.Settings)
        differs = difference(current.source, new)
        return Candidate(deployment_of(new), differs.changed, differs.needs_restart)

    def _take_launch(self, report: LaunchReport) -> None:
        self.pools.take_launch(report)

    def _manager_of(self, node: str | None) -> Manager:
        return self.supervisor if node is None else self.nodes.manager(node)

    def _slo_of(self, route_id: str, cohort: Cohort) -> tuple[SloSnapshot, ...]:
        now = self._clock.monotonic()
        windows = [(priority, self.telemetry.slo(route_id, cohort, priority, now)) for priority in Priority]
        return tuple(
            SloSnapshot(priority, w.tasks, w.first_token_p95_s, w.total_p95_s, w.error_ratio, WINDOW_S)
            for priority, w in windows
            if w is not None
        )

    def _describe(self, key: TaskKey) -> dict[str, str]:
        """What log lines about a task say of it, beside its id."""
        record = self.dispatcher.find(key)
        if record is None:
            return {}
        return {"correlation_id": record.correlation_id, "session_id": record.submission.session_id}

    def _samples(self) -> Iterator[Sample]:
        """The gauges, read at the scrape."""
        nodes, local = self.nodes.list(), self.supervisor.host
        self._reporter.count_resets({LOCAL_NODE: local, **{n.node_id: n.host for n in nodes if n.host is not None}})
        yield Sample("open_streams", (), len(self.readers))
        yield from route_gauges(self.pools, self.dispatcher.schedulers)
        yield from host_gauges(local, nodes)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How a host joins. `address` is where the server reaches its engines, `listen` where they are offered.

    The files are in PEM, `cert_file` and `key_file` both or neither.
    """

    url: str
    token: str
    node_id: str
    address: str
    listen: str
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    log_format: str = "json"


def run_pool_manager(options: NodeOptions) -> None:
    """Keep the engines of this host alive for a server, until SIGTERM or SIGINT.

    Raises LaunchError when the server refuses this node for good, or a certificate cannot be used.
    """
    log = set_up_logging("info", options.log_format, secrets=[options.token])
    uvloop.run(_run_agent(options, log))


async def _run_agent(options: NodeOptions, log: FilteringBoundLogger) -> None:
    identity = NodeIdentity(options.node_id, str(uuid4()), __version__, options.address, options.listen)
    home = NodeClient(options.url, options.token, ca_file=options.ca_file)
    agent = Agent(
        identity,
        home=home,
        supervise=lambda report: Supervisor(
            owner=f"node:{options.node_id}", devices=NvmlDevices(), report=report, log=log
        ),
        log=log,
        tls=_server_tls(options),
    )
    run = asyncio.create_task(agent.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, run.cancel)
    try:
        with suppress(asyncio.CancelledError):
            await run
    finally:
        await home.aclose()


def _server_tls(options: NodeOptions) -> ssl.SSLContext | None:
    if options.cert_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.cert_file, options.key_file)
    except OSError as error:
        raise LaunchError(f"{options.cert_file}, {options.key_file}: cannot be used: {error}") from error
    return context


def serve(path: Path | None) -> None:
    """Run the service until SIGTERM or SIGINT; without a configuration file, a demonstration of it.

    Raises ConfigError for a configuration that cannot be used, LaunchError when the demonstration has no engine.
    """
    settings = config.load(path, os.environ, inspect_model=trained_context)
    if path is not None and not settings.pools:
        raise ConfigError(f"{path}: pools: at least one pool is needed; without a file a demonstration is served")
    log = set_up_logging(settings.log.level.value, settings.log.format.value, secrets=_secrets(settings))
    _raise_file_limit(settings, log)
    _calm_collector()
    uvloop.run(_serve(settings, log, path))


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


async def _serve(settings: config.Settings, log: FilteringBoundLogger, path: Path | None) -> None:
    if settings.pools:
        await _serve_until_signal(Service(settings, log, path))
        return
    installed_version()  # the demonstration ends here with the remedy when there is no engine
    model = await find_demo_model()
    log.warning("cpu_demonstration", notice=CPU_NOTICE, model=str(model), allow_cpu=True)
    await _serve_until_signal(Service(_demo_settings(settings, model), log))


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


def _secrets(settings: config.Settings) -> list[str]:
    """What must never be in a log line, whoever quotes it."""
    replicas = [replica for pool in settings.pools for replica in pool.replicas]
    keys = [replica.api_key.get_secret_value() for replica in replicas if replica.api_key is not None]
    return keys + [
        word for r in replicas if r.managed is not None for word in r.managed.env.values() if len(word) >= SECRET_CHARS
    ]


def _owner(settings: config.Settings, path: Path | None) -> str:
    """By what the engines of this service are known again when it was killed."""
    return str(path.resolve()) if path is not None else f"demonstration:{settings.server.port}"


def _demo_settings(settings: config.Settings, model: Path) -> config.Settings:
    pool = {
        "id": DEMO_POOL,
        "engine": "llamacpp",
        "model": DEMO_MODEL_NAME.lower(),
        "quant": "q4_1",
        "ctx": DEMO_CTX,
        "allow_cpu": True,
        "model_path": str(model),
        "model_digest": f"sha256:{DEMO_MODEL_SHA256}",
        "replicas": [{"slots": 1, "managed": {"launcher": "llamacpp"}}],
    }
    return settings.model_copy(update={"pools": [config.Pool.model_validate(pool)]})


def _connect(replica: ReplicaConfig, url: str, api_key: str | None) -> LlamaCppEngine:
    timeouts = replica.timeouts
    return LlamaCppEngine(
        url,
        api_key=api_key,
        timeouts=Timeouts(connect_s=timeouts.connect_s, first_byte_s=timeouts.first_byte_s, idle_s=timeouts.idle_s),
        ssl_context=ssl.create_default_context(cafile=replica.ca_file) if url.startswith("https:") else None,
    )
