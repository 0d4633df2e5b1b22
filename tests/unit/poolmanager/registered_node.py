"""An agent and the server's own registry in one loop, with processes that do what the test says."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import structlog
from structlog.testing import LogCapture

from llorch.api.problems import status_of
from llorch.client.errors import ApiError, ClientError
from llorch.errors import LlorchError
from llorch.poolmanager.agent import DEBOUNCE_S, Agent, NodeIdentity
from llorch.service.frames import problem
from llorch.service.launching import HostFacts, LaunchOrder, LaunchReport, Phase
from llorch.service.nodes import NodeConfig, Nodes, NodeState, NodeView, Orders, Registration
from llorch.testing.clock import running_clock
from llorch.testing.manager import FakeManager
from llorch_contract.models import Problem

LEASE_S = 10.0
HEARTBEAT_S = 2.0
NODE = NodeConfig("gpu-2", "a" * 64, frozenset({"small"}), ("127.0.0.0/8", "::1/128"))
PEER = "127.0.0.1"
IDENTITY = NodeIdentity("gpu-2", "boot-1", "0.4.1", PEER, PEER)
Answer = TypeVar("Answer")
HOST = HostFacts(ram_total_bytes=64, ram_available_bytes=32)
HANG_S = 600.0
"""Virtual seconds after which nothing more comes out of a socket; many, for time may skip ahead of the kernel."""
CERTIFICATE = Path(__file__).parents[1] / "adapters" / "localhost.pem"


def order(replica_id: str = "small/0", *, generation: int = 0) -> LaunchOrder:
    return LaunchOrder(
        replica_id=replica_id, pool_id=replica_id.partition("/")[0], engine="llamacpp", launcher="llamacpp", model="m",
        model_path="/m.gguf", model_digest=None, ctx=512, slots=1, generation=generation,
    )  # fmt: skip


def refusal(error: LlorchError) -> ApiError:
    """The error as the client of a node has it from the server."""
    return ApiError(int(status_of(error)), Problem.model_validate(problem(error, "c")))


class Engines(FakeManager):
    """A supervisor that was entered and left. Its processes are at `url` where that is set."""

    def __init__(self, report: Callable[[LaunchReport], None], url: str | None) -> None:
        self.is_open = False
        self.lingers = False
        """Processes that are to end take their time."""
        super().__init__(lambda told: report(told if told.url is None or url is None else replace(told, url=url)))
        self.host = HOST

    async def __aenter__(self) -> Self:
        self.is_open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_open = False

    def release(self, replica_id: str) -> None:
        if self.lingers:
            self._tell(replace(self._reports[replica_id], phase=Phase.STOPPING))
        else:
            super().release(replica_id)


@dataclass
class Call:
    """What the server was asked, and when."""

    step: str
    at: float
    reports: tuple[LaunchReport, ...] = ()


class Server:
    """The registry of a server, as it is reached over the wire. With `fault` set every call ends in it."""

    def __init__(self) -> None:
        ids = count(1)
        self.clock = running_clock()
        self.fault: ClientError | None = None
        self.is_hanging = False
        self.calls: list[Call] = []
        self.registrations: list[Registration] = []
        self.heard: list[LaunchReport] = []
        self.nodes = Nodes(
            [NODE], version="0.4.1", clock=self.clock, lease_s=LEASE_S, report=self.heard.append,
            new_id=lambda: f"lease-{next(ids)}",
        )  # fmt: skip
        self.manager = self.nodes.manager("gpu-2")

    # Home

    async def register(self, registration: Registration) -> Orders:
        self.registrations.append(registration)
        return await self._answer("register", lambda: self.nodes.register(registration, PEER), registration.reports)

    async def renew(self, node_id: str, lease_id: str, *, host: HostFacts, reports: tuple[LaunchReport, ...]) -> Orders:
        return await self._answer(
            "renew", lambda: self.nodes.renew(node_id, lease_id, host=host, reports=reports, peer=PEER), reports
        )

    async def leave(self, node_id: str, lease_id: str) -> None:
        await self._answer("leave", lambda: self.nodes.leave(node_id, lease_id))

    async def _answer(self, step: str, act: Callable[[], Answer], reports: tuple[LaunchReport, ...] = ()) -> Answer:
        self.calls.append(Call(step, self.clock.monotonic(), reports))
        if self.is_hanging:
            await asyncio.sleep(1000.0)
        if self.fault is not None:
            raise self.fault
        try:
            return act()
        except LlorchError as error:
            raise refusal(error) from error

    # What a test sees

    def view(self) -> NodeView:
        return self.nodes.list()[0]

    def last(self) -> LaunchReport:
        return self.heard[-1]

    def steps(self) -> list[str]:
        return [call.step for call in self.calls]

    def waits(self) -> list[float]:
        """Seconds between the calls."""
        return [round(after.at - before.at, 6) for before, after in pairwise(self.calls)]


@dataclass
class Node:
    """An agent that runs."""

    server: Server
    identity: NodeIdentity = IDENTITY
    engine_url: str | None = None
    tls: ssl.SSLContext | None = None
    logs: LogCapture = field(default_factory=LogCapture)

    def __post_init__(self) -> None:
        log = structlog.wrap_logger(structlog.PrintLogger(), processors=[self.logs])
        self.agent = Agent(self.identity, home=self.server, supervise=self._supervise, log=log, tls=self.tls)
        self.task = asyncio.get_running_loop().create_task(self.agent.run())

    def _supervise(self, report: Callable[[LaunchReport], None]) -> Engines:
        self.engines = Engines(report, self.engine_url)
        return self.engines

    async def end(self) -> None:
        """As a signal ends it; nothing when it has ended."""
        if not self.task.done():
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task

    def logged(self) -> list[str]:
        return [entry["event"] for entry in self.logs.entries]


@asynccontextmanager
async def joined(server: Server, **settings: Any) -> AsyncIterator[Node]:
    """A node that has joined, and brought up what it was told to run."""
    node = Node(server, **settings)
    try:
        await asyncio.sleep(2 * DEBOUNCE_S)
        assert server.view().state is NodeState.JOINED
        yield node
    finally:
        await node.end()


async def connect(url: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(str(url))
    return await asyncio.open_connection(address.hostname, address.port)


async def is_reset(url: str | None) -> bool:
    """Whether a new connection to there is reset, or refused."""
    try:
        reader, writer = await connect(url)
    except ConnectionRefusedError:
        return True
    with suppress(OSError):
        writer.write(b"?")
        try:
            async with asyncio.timeout(HANG_S):
                return await reader.read(1) == b""
        finally:
            writer.transport.abort()
    return True


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """The URL of an engine that says again what it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1024):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
