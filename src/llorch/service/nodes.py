"""Hosts whose pool managers join over the network: who may join, who holds a node, and for how long.

Owns the leases and what is known of each host; what a node runs is `node_orders`. It refuses to know HTTP and tokens:
whoever calls has checked that the caller is the node that it says. Everything is synchronous, and time is the clock's,
but for `watch`, which ends leases when they are over.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

from llorch.errors import Conflict, Forbidden, InvalidParams, NotFound
from llorch.service.launching import Cause, HostFacts, LaunchOrder, LaunchReport, Manager
from llorch.service.node_orders import NodeOrders, NodeProcess, NodeState, RestartOrder
from llorch.service.ports import Clock

__all__ = [
    "NodeConfig",
    "NodeProcess",
    "NodeState",
    "NodeView",
    "Nodes",
    "Orders",
    "Registration",
    "RestartOrder",
]

HEARTBEATS_PER_LEASE: Final = 5
"""How often a manager is to renew its lease while it lasts: four heartbeats may be lost in a row."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A host whose manager may join. `sha256` is that of its token, `pools` are those whose replicas it may run.

    `networks` are address ranges (CIDR) that it may join from, and at whose addresses its engines may be reached.
    """

    node_id: str
    sha256: str
    pools: frozenset[str]
    networks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """A manager that joins. `boot_id` is drawn anew by each manager process, `address` is where its relays are reached.

    `reports` has every replica that the manager has an order for or a process of, here and in each heartbeat: there is
    no process of any other.
    """

    node_id: str
    boot_id: str
    manager_version: str
    address: str
    host: HostFacts
    reports: tuple[LaunchReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Orders:
    """Everything that a node is to run, and its lease. Times in seconds; what is absent from `wanted` is to end."""

    lease_id: str
    lease_s: float
    heartbeat_s: float
    wanted: tuple[LaunchOrder, ...]
    restarts: tuple[RestartOrder, ...]


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node now. `since`, in seconds since the Unix epoch, is when it came into its state; None: it never came.

    What the manager told stays as it was told last; None before it joined first.
    """

    node_id: str
    state: NodeState
    since: float | None
    boot_id: str | None
    manager_version: str | None
    address: str | None
    lease_remaining_s: float | None
    host: HostFacts | None
    replicas: tuple[NodeProcess, ...]


@dataclass(slots=True)
class _Lease:
    lease_id: str
    expires_at: float


@dataclass(slots=True)
class _Node:
    """What is known of one node. `config` is None when it is configured no more; `heard_at` is wall time."""

    config: NodeConfig | None
    orders: NodeOrders
    lease: _Lease | None = None
    newest: Registration | None = None
    host: HostFacts | None = None
    since: float | None = None
    heard_at: float = 0.0
    peer: str = ""


class Nodes:
    """All configured nodes.

    `version` is the service's own, `report` hears what becomes of orders, `on_state` which nodes come and go, `new_id`
    names leases. `report` may call managers back; what follows from that is told after what was already to be told.
    """

    def __init__(
        self,
        configs: Sequence[NodeConfig],
        *,
        version: str,
        clock: Clock,
        lease_s: float,
        report: Callable[[LaunchReport], None],
        new_id: Callable[[], str],
        on_state: Callable[[str, NodeState], None] = lambda _node_id, _state: None,
    ) -> None:
        self._version = version
        self._on_state = on_state
        self._clock = clock
        self._lease_s = lease_s
        self._report = report
        self._new_id = new_id
        self._news: deque[LaunchReport] = deque()
        self._is_telling = False
        self._leased = asyncio.Event()
        self._nodes = {config.node_id: self._node(config) for config in configs}

    # What managers ask

    def register(self, registration: Registration, peer: str) -> Orders:
        """Give the node to this manager, which called from the address `peer`, for as long as it renews its lease.

        A manager that comes back with its boot_id goes on with its processes; another one starts them anew. Raises
        NotFound for an unknown node, Forbidden for what the node may not do, InvalidParams for another version,
        Conflict while another manager holds the node.
        """
        now = self._now()
        node = self._find(registration.node_id)
        self._check_place(node, peer, registration.address)
        self._check_version(registration)
        self._check_reports(node, registration.reports)
        self._check_free(node, registration, now)
        is_anew = node.newest is not None and node.newest.boot_id != registration.boot_id
        self._enter(node, NodeState.JOINED)
        node.lease = _Lease(self._new_id(), now + self._lease_s)
        node.newest, node.peer = registration, peer
        self._hear(node, registration.host)
        node.orders.join(registration.reports, is_anew=is_anew)
        self._leased.set()
        return self._answer(node)

    def renew(
        self, node_id: str, lease_id: str, *, host: HostFacts, reports: Sequence[LaunchReport], peer: str
    ) -> Orders:
        """Prolong the lease, take the reports, and tell the orders of now.

        Raises NotFound for an unknown node, Conflict when the lease is over: the manager is to register again.
        Forbidden as `register` does.
        """
        now = self._now()
        node, lease = self._holder(node_id, lease_id)
        assert node.newest is not None, "leased to nobody"
        self._check_place(node, peer, node.newest.address)
        self._check_reports(node, reports)
        lease.expires_at = now + self._lease_s
        self._hear(node, host)
        node.orders.take(reports)
        return self._answer(node)

    def leave(self, node_id: str, lease_id: str) -> None:
        """The manager has ended its processes and goes. Raises NotFound and Conflict as `renew` does."""
        self._now()
        node, _ = self._holder(node_id, lease_id)
        node.lease = None
        self._enter(node, NodeState.ABSENT)
        node.orders.leave()
        self._tell_news()

    # What the service asks

    def manager(self, node_id: str) -> Manager:
        """The manager of that node, whether it is there or not. Raises NotFound for an unknown node."""
        self._find(node_id)
        return _NodeManager(self, node_id)

    def list(self) -> Sequence[NodeView]:
        """Every configured node, in the order of the configuration."""
        now = self._now()
        return [self._view(node, now) for node in self._nodes.values() if node.config is not None]

    def reconfigure(self, configs: Sequence[NodeConfig], *, lease_s: float | None = None) -> None:
        """Have these nodes from now on.

        The lease of a node that is gone, has another token or is outside its networks now ends at once; orders of pools
        that it may run no more are withheld. `lease_s` holds from the next renewal on.
        """
        self._now()
        if lease_s is not None:
            self._lease_s = lease_s
        before = self._nodes
        self._nodes = {config.node_id: self._change(before.get(config.node_id), config) for config in configs}
        for node_id, node in before.items():
            if node_id not in self._nodes:
                self._remove(node_id, node)
        self._tell_news()

    # Time

    def expire(self, now: float) -> None:
        """End the leases that are over at `now`, of the clock's monotonic time: their replicas are lost."""
        for node_id, node in self._nodes.items():
            if node.lease is not None and node.lease.expires_at <= now:
                self._silence(node, f"node {node_id} has been silent since {_written(node.heard_at)}")
        self._tell_news()

    def next_expiry(self) -> float | None:
        """When the next lease is over unless it is renewed; None while there is none."""
        return min((node.lease.expires_at for node in self._nodes.values() if node.lease is not None), default=None)

    async def watch(self) -> None:
        """End leases when they are over, for ever."""
        while True:
            due = self.next_expiry()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock.monotonic())):
                    await self._leased.wait()
            except TimeoutError:
                pass
            self._leased.clear()
            self.expire(self._clock.monotonic())

    # What _NodeManager asks

    def order(self, node_id: str, act: Callable[[NodeOrders], None]) -> None:
        """Change the orders of a node, and tell what follows from it."""
        self._now()
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node(None, self._orders(node_id, frozenset()))
        act(node.orders)
        self._forget(node_id, node)
        self._tell_news()

    def host(self, node_id: str) -> HostFacts:
        """The host of a node as last told; nothing while it was not."""
        node = self._nodes.get(node_id)
        return HostFacts() if node is None or node.host is None else node.host

    # Within: who may

    def _find(self, node_id: str) -> _Node:
        node = self._nodes.get(node_id)
        if node is None or node.config is None:
            raise NotFound(f"there is no node {node_id} in the configuration")
        return node

    def _holder(self, node_id: str, lease_id: str) -> tuple[_Node, _Lease]:
        node = self._find(node_id)
        if node.lease is None or node.lease.lease_id != lease_id:
            raise Conflict(f"the lease of node {node_id} is over; register again")
        return node, node.lease

    def _check_free(self, node: _Node, registration: Registration, now: float) -> None:
        lease, newest = node.lease, node.newest
        if lease is None or newest is None or newest.boot_id == registration.boot_id:
            return
        left_s = lease.expires_at - now
        raise Conflict(
            f"another pool manager, at {newest.address}, holds node {registration.node_id}; "
            f"unless it renews its lease, the node is free in {left_s:.1f} s"
        )

    def _check_version(self, registration: Registration) -> None:
        theirs, ours = registration.manager_version, self._version
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise InvalidParams(
                f"the pool manager of node {registration.node_id} is llorch {theirs}, this server is llorch {ours}: "
                f"major and minor version must be the same; install llorch {ours} on the node, or the server's equal "
                "here, and start the pool manager again"
            )

    @staticmethod
    def _check_place(node: _Node, peer: str, address: str) -> None:
        assert node.config is not None, "a node of the configuration"
        name = node.config.node_id
        if not _is_within(peer, node.config.networks):
            raise Forbidden(f"node {name} may not join from {peer}: that is outside its networks")
        if not _is_within(address, node.config.networks):
            raise Forbidden(
                f"engines of node {name} may not be at {address}: that is no IP address within its networks"
            )

    @staticmethod
    def _check_reports(node: _Node, reports: Sequence[LaunchReport]) -> None:
        assert node.config is not None, "a node of the configuration"
        for report in reports:
            if not node.orders.may_report(report):
                raise Forbidden(
                    f"node {node.config.node_id} may not run {report.replica_id}: its pool is not one of its"
                )
            if report.url is not None and not _is_within(_host_of(report.url), node.config.networks):
                raise Forbidden(
                    f"{report.replica_id} of node {node.config.node_id} is at {report.url}: outside its networks"
                )

    # Within: what happens

    def _now(self) -> float:
        """The time, with every lease ended that is over by then."""
        now = self._clock.monotonic()
        self.expire(now)
        return now

    def _node(self, config: NodeConfig) -> _Node:
        return _Node(config, self._orders(config.node_id, config.pools))

    def _orders(self, node_id: str, pools: frozenset[str]) -> NodeOrders:
        return NodeOrders(node_id, pools, tell=self._news.append, wall=self._clock.wall)

    def _hear(self, node: _Node, host: HostFacts) -> None:
        node.host, node.heard_at = host, self._clock.wall()

    def _enter(self, node: _Node, state: NodeState) -> None:
        if node.orders.state is not state:
            node.since = self._clock.wall()
            self._on_state(node.orders.node_id, state)

    def _silence(self, node: _Node, why: str) -> None:
        node.lease = None
        self._enter(node, NodeState.SILENT)
        node.orders.fall_silent(why)

    def _change(self, node: _Node | None, config: NodeConfig) -> _Node:
        if node is None:
            return self._node(config)
        before, node.config = node.config, config
        node.orders.permit(config.pools)
        if before is None:
            node.orders.expect()
        if node.lease is not None and not self._still_holds(node, before, config):
            self._silence(node, f"the configuration of node {config.node_id} has changed; its manager is to join again")
        return node

    @staticmethod
    def _still_holds(node: _Node, before: NodeConfig | None, now: NodeConfig) -> bool:
        assert node.newest is not None, "leased to nobody"
        places = (node.peer, node.newest.address)
        is_known = before is not None and before.sha256 == now.sha256
        return is_known and all(_is_within(place, now.networks) for place in places)

    def _remove(self, node_id: str, node: _Node) -> None:
        """It is configured no more. Its orders stay until they are released, should it come back."""
        if node.config is not None:
            node.config = node.lease = None
            self._enter(node, NodeState.ABSENT)
            node.orders.dismiss(f"node {node_id} is not in the configuration any more")
        self._nodes[node_id] = node
        self._forget(node_id, node)

    def _forget(self, node_id: str, node: _Node) -> None:
        if node.config is None and not node.orders.processes():
            del self._nodes[node_id]

    def _answer(self, node: _Node) -> Orders:
        """What the node is to run once everybody has heard what it told."""
        assert node.lease is not None, "answered without a lease"
        lease_id = node.lease.lease_id
        self._tell_news()
        heartbeat_s = self._lease_s / HEARTBEATS_PER_LEASE
        return Orders(lease_id, self._lease_s, heartbeat_s, node.orders.hand_out(), node.orders.restarts())

    def _tell_news(self) -> None:
        """In order, also when hearing it leads to more."""
        if self._is_telling:
            return
        self._is_telling = True
        try:
            while self._news:
                self._report(self._news.popleft())
        finally:
            self._is_telling = False

    def _view(self, node: _Node, now: float) -> NodeView:
        assert node.config is not None, "a node of the configuration"
        newest = node.newest
        return NodeView(
            node_id=node.config.node_id,
            state=node.orders.state,
            since=node.since,
            boot_id=newest.boot_id if newest else None,
            manager_version=newest.manager_version if newest else None,
            address=newest.address if newest else None,
            lease_remaining_s=node.lease.expires_at - now if node.lease else None,
            host=node.host,
            replicas=node.orders.processes(),
        )


class _NodeManager:
    """The manager of one node, as the service sees it."""

    def __init__(self, nodes: Nodes, node_id: str) -> None:
        self._nodes = nodes
        self._node_id = node_id

    def want(self, order: LaunchOrder) -> None:
        self._nodes.order(self._node_id, lambda orders: orders.want(order))

    def release(self, replica_id: str) -> None:
        self._nodes.order(self._node_id, lambda orders: orders.release(replica_id))

    def restart(self, replica_id: str, incarnation: int, cause: Cause) -> None:
        self._nodes.order(self._node_id, lambda orders: orders.restart(replica_id, incarnation, cause))

    @property
    def host(self) -> HostFacts:
        return self._nodes.host(self._node_id)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The IP address; one of IPv4 that is written as one of IPv6 is that of IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text, strict=False)


def _is_within(text: str, networks: Sequence[str]) -> bool:
    address = _address(text)
    return address is not None and any(address in _network(network) for network in networks)


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _written(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
