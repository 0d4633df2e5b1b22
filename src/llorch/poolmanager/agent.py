"""The pool manager of a node: joins a server, runs what that wants run, and fences itself when it cannot be heard.

Owns the lease and a relay in front of each engine. Processes are the supervisor's; the wire is the home's. The server
decides what is run here: nothing of it is configured on this host.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from ssl import SSLContext
from typing import Protocol
from urllib.parse import urlsplit

from structlog.typing import FilteringBoundLogger

from llorch.client.errors import ApiError, ClientError
from llorch.errors import LaunchError
from llorch.poolmanager.relay import Relay
from llorch.poolmanager.shielding import to_the_end
from llorch.service.launching import HostFacts, LaunchReport, Manager, Phase
from llorch.service.nodes import Orders, Registration

FIRST_RETRY_S, LAST_RETRY_S = 0.25, 2.0
"""Between tries to join or to renew: doubled from the first to the last."""

SAFETY = 0.8
"""The part of a lease after which the node counts it as over: connections are cut before the server gives it up."""

DEBOUNCE_S = 0.05
"""News of processes wait this long for more, and are told before the next heartbeat is due."""

LEAVE_S = 3.0
"""How long a farewell may take."""

_FATAL = frozenset({400, 401, 403, 404, 422})
"""Statuses with which the server says that this node, or this version, may not join at all."""


class Home(Protocol):
    """The server that the node joins. Everything raises ClientErrors only and is bounded in time."""

    async def register(self, registration: Registration) -> Orders:
        """Join, or come back."""
        ...

    async def renew(self, node_id: str, lease_id: str, *, host: HostFacts, reports: tuple[LaunchReport, ...]) -> Orders:
        """Renew the lease; an ApiError of 409 when it is over."""
        ...

    async def leave(self, node_id: str, lease_id: str) -> None:
        """Give the node back."""
        ...


class Keeper(Manager, AbstractAsyncContextManager["Keeper"], Protocol):
    """A supervisor: a manager that ends its processes when it is left."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who joins. `boot_id` is drawn anew by each process; relays bind `listen` and are reached at `address`."""

    node_id: str
    boot_id: str
    version: str
    address: str
    listen: str


class Agent:
    """Runs a node until it is cancelled. `supervise` makes the supervisor, whose reports go where it is told.

    Raises LaunchError when the server says that this node may never join, or when `listen` is no address of this host.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        *,
        home: Home,
        supervise: Callable[[Callable[[LaunchReport], None]], Keeper],
        log: FilteringBoundLogger,
        tls: SSLContext | None = None,
    ) -> None:
        self._identity = identity
        self._home = home
        self._supervise = supervise
        self._log = log
        self._tls = tls
        self._relays: dict[str, Relay] = {}
        self._reports: dict[str, LaunchReport] = {}
        self._news = asyncio.Event()
        self._lease: Orders | None = None
        self._fence: asyncio.TimerHandle | None = None
        self._is_cut = False

    async def run(self) -> None:
        """Join, renew, obey; at the end say farewell and end every engine."""
        async with self._supervise(self._take) as keeper:
            try:
                while True:
                    orders = await self._join(keeper)
                    await self._hold(keeper, orders)
            finally:
                await to_the_end(self._leave())

    # The lease

    async def _join(self, keeper: Keeper) -> Orders:
        """Try until the server takes the node."""
        identity, retry_s = self._identity, FIRST_RETRY_S
        while True:
            registration = Registration(
                identity.node_id, identity.boot_id, identity.version, identity.address, keeper.host, self._told()
            )
            sent_at = asyncio.get_running_loop().time()
            try:
                orders = await self._home.register(registration)
            except ClientError as error:
                if isinstance(error, ApiError) and error.status in _FATAL:
                    raise LaunchError(f"The server refuses this node: {error}") from error
                self._log.warning("node_not_joined", node=identity.node_id, reason=str(error), retry_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                self._log.info("node_joined", node=identity.node_id, lease_s=orders.lease_s)
                await self._obey(keeper, orders, sent_at)
                return orders

    async def _hold(self, keeper: Keeper, orders: Orders) -> None:
        """Renew until the server says that the lease is over."""
        retry_s: float | None = None
        while True:
            if retry_s is None:
                await self._wait_news(orders.heartbeat_s)
            else:
                await asyncio.sleep(retry_s)
            sent_at = asyncio.get_running_loop().time()
            try:
                orders = await self._home.renew(
                    self._identity.node_id, orders.lease_id, host=keeper.host, reports=self._told()
                )
            except ApiError as error:
                if error.status < 500:
                    self._log.warning("lease_lost", node=self._identity.node_id, reason=str(error))
                    return
                self._log.warning("heartbeat_failed", node=self._identity.node_id, reason=str(error))
            except ClientError as error:
                self._log.warning("heartbeat_failed", node=self._identity.node_id, reason=str(error))
            else:
                retry_s = None
                await self._obey(keeper, orders, sent_at)
                continue
            retry_s = FIRST_RETRY_S if retry_s is None else min(2 * retry_s, LAST_RETRY_S)

    async def _wait_news(self, heartbeat_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(heartbeat_s):
                await self._news.wait()
                await asyncio.sleep(DEBOUNCE_S)
        self._news.clear()

    async def _leave(self) -> None:
        if self._fence is not None:
            self._fence.cancel()
        if self._lease is not None:
            with suppress(ClientError, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self._home.leave(self._identity.node_id, self._lease.lease_id)
        for relay in self._relays.values():
            await relay.aclose()

    # Obeying

    async def _obey(self, keeper: Keeper, orders: Orders, sent_at: float) -> None:
        """Hold the lease as long as the server counts it at the least, and run what is wanted."""
        self._lease = orders
        self._set_fence(sent_at + SAFETY * orders.lease_s)
        wanted = {order.replica_id for order in orders.wanted}
        for order in orders.wanted:
            if order.replica_id not in self._relays:
                self._relays[order.replica_id] = await self._open_relay()
            keeper.want(order)
        for replica_id in [known for known in self._relays if known not in wanted]:
            keeper.release(replica_id)
        for restart in orders.restarts:
            keeper.restart(restart.replica_id, restart.incarnation, restart.cause)
        for replica_id in [known for known in self._reports if known not in wanted]:
            if self._reports[replica_id].phase is Phase.STOPPED:
                await self._forget(replica_id)

    async def _open_relay(self) -> Relay:
        relay, listen = Relay(tls=self._tls), self._identity.listen
        try:
            await relay.listen(listen)
        except OSError as error:
            raise LaunchError(f"Engines cannot be offered at {listen}: {error.strerror or error}") from error
        return relay

    async def _forget(self, replica_id: str) -> None:
        """The server has heard that it is gone."""
        del self._reports[replica_id]
        if (relay := self._relays.pop(replica_id, None)) is not None:
            await relay.aclose()

    def _set_fence(self, at: float) -> None:
        if self._fence is not None:
            self._fence.cancel()
        self._fence = asyncio.get_running_loop().call_at(at, self._cut)
        if self._is_cut:
            self._is_cut = False
            self._log.info("fence_lifted", node=self._identity.node_id)
            for relay in self._relays.values():
                relay.mend()

    def _cut(self) -> None:
        """Nobody hears this node any more, so what its engines do for the server is done for nobody."""
        self._is_cut = True
        self._log.warning("fenced", node=self._identity.node_id, notice="no word from the server; connections are cut")
        for relay in self._relays.values():
            relay.cut()

    # Reports

    def _take(self, report: LaunchReport) -> None:
        """The supervisor tells what became of a process."""
        self._reports[report.replica_id] = report
        relay = self._relays.get(report.replica_id)
        if relay is not None:
            if report.url is not None and report.phase in (Phase.LOADING, Phase.UP):
                parts = urlsplit(report.url)
                relay.point_at(parts.hostname, parts.port or 80)
            else:
                relay.point_at(None)
        self._news.set()

    def _told(self) -> tuple[LaunchReport, ...]:
        """The reports as the server may use them: with the relay's address in place of the engine's."""
        return tuple(self._outward(report) for report in self._reports.values())

    def _outward(self, report: LaunchReport) -> LaunchReport:
        relay = self._relays.get(report.replica_id)
        if relay is None or report.url is None:
            return replace(report, url=None)
        host = self._identity.address
        host = f"[{host}]" if ":" in host else host
        return replace(report, url=f"{relay.scheme}://{host}:{relay.port}")
