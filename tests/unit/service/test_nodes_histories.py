"""Random histories of nodes: whoever comes, falls silent, goes or is told something, orders and leases hold."""

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from llorch.errors import Conflict
from llorch.service.launching import Cause, HostFacts, LaunchOrder, LaunchReport, Phase
from llorch.service.nodes import NodeConfig, Nodes, Orders, Registration
from llorch.testing.clock import FakeClock

LEASE_S = 10.0
POOLS = ("small", "large")
NODES = {"gpu-1": "10.0.0.1", "gpu-2": "10.0.0.2"}
REPLICAS = {f"{pool}/{i}": node for pool in POOLS for i, node in enumerate(NODES)}
"""Each replica has its node, as in a configuration."""

NODE, REPLICA = st.sampled_from(sorted(NODES)), st.sampled_from(sorted(REPLICAS))
PHASES = st.sampled_from([Phase.WAITING, Phase.STARTING, Phase.LOADING, Phase.UP, Phase.UP, Phase.UP])

SHORT = settings(
    max_examples=60, stateful_step_count=50, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(SHORT, max_examples=600, stateful_step_count=100)


@dataclass
class Host:
    """A manager process: what it was told to run, and how far each process is."""

    node_id: str
    boot_id: str
    lease_id: str = "none"
    counts: dict[str, int] = field(default_factory=dict)
    processes: dict[str, tuple[int, Phase]] = field(default_factory=dict)

    def obey(self, orders: Orders) -> None:
        self.lease_id = orders.lease_id
        wanted = {order.replica_id: order for order in orders.wanted}
        for replica_id in set(self.processes) - set(wanted):
            generation, phase = self.processes[replica_id]
            if phase is Phase.STOPPED:
                del self.processes[replica_id]
            else:
                self.processes[replica_id] = generation, Phase.STOPPED
        for replica_id, order in wanted.items():
            if self.processes.get(replica_id, (None, Phase.STOPPED))[0] != order.generation:
                self.processes[replica_id] = order.generation, Phase.WAITING
        for replica_id, incarnation, _ in orders.restarts:
            assert replica_id in wanted
            if self.counts.get(replica_id) == incarnation:
                self.move(replica_id, Phase.WAITING)

    def move(self, replica_id: str, phase: Phase) -> None:
        if replica_id not in self.processes or self.processes[replica_id][1] is Phase.STOPPED:
            return
        generation, before = self.processes[replica_id]
        if before is Phase.WAITING and phase is not Phase.WAITING:
            self.counts[replica_id] = self.counts.get(replica_id, 0) + 1
        self.processes[replica_id] = generation, phase

    def reports(self) -> tuple[LaunchReport, ...]:
        url = f"http://{NODES[self.node_id]}:4000"
        return tuple(
            LaunchReport(replica_id, generation, phase, self.counts.get(replica_id, 0), url=url)
            for replica_id, (generation, phase) in self.processes.items()
        )


class NodeHistories(RuleBasedStateMachine):
    """The model knows leases by the clock, orders by what was wanted and not released, and every word that was told."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.ids = count()
        self.leases: dict[str, float] = {}
        self.granting: str | None = None
        self.leaving: str | None = None
        self.orders: dict[str, LaunchOrder] = {}
        self.pools = {node_id: frozenset(POOLS) for node_id in NODES}
        self.last: dict[str, LaunchReport] = {}
        self.hosts = {node_id: Host(node_id, f"boot-{next(self.ids)}") for node_id in NODES}
        self.nodes = Nodes(
            self.configs(), version="1.2.3", clock=self.clock, lease_s=LEASE_S, report=self.hear,
            new_id=lambda: f"lease-{next(self.ids)}",
        )  # fmt: skip
        for replica_id in sorted(REPLICAS):
            self.want(replica_id, 0)

    def configs(self) -> list[NodeConfig]:
        return [NodeConfig(name, name, self.pools[name], (f"{NODES[name]}/32",)) for name in NODES]

    def is_leased(self, node_id: str) -> bool:
        return self.leases.get(node_id, 0.0) > self.clock.monotonic()

    def may_run(self, replica_id: str) -> bool:
        return replica_id.partition("/")[0] in self.pools[REPLICAS[replica_id]]

    def hear(self, report: LaunchReport) -> None:
        before, node_id = self.last.get(report.replica_id), REPLICAS[report.replica_id]
        if report.phase is Phase.UP:
            assert self.is_leased(node_id) or self.granting == node_id
            assert report.replica_id not in self.orders or self.may_run(report.replica_id)
        if before is not None:
            assert report.incarnation >= before.incarnation
        if report.phase is Phase.STOPPED and self.leaving != node_id:
            _, phase = self.hosts[node_id].processes.get(report.replica_id, (0, Phase.STOPPED))
            assert phase is Phase.STOPPED
        self.last[report.replica_id] = report

    def granted(self, host: Host, orders: Orders) -> None:
        """A manager that knows nothing else is told every order of its node, and no other."""
        told = {report.replica_id for report in host.reports()}
        self.leases[host.node_id] = self.clock.monotonic() + LEASE_S
        mine = {name: order for name, order in self.orders.items() if REPLICAS[name] == host.node_id}
        assert {order.replica_id: order for order in orders.wanted} == {
            n: o for n, o in mine.items() if self.may_run(n)
        }
        for replica_id, node_id in REPLICAS.items():
            if node_id == host.node_id and replica_id not in mine and replica_id not in told:
                assert replica_id not in self.last or self.last[replica_id].phase is Phase.STOPPED
        host.obey(orders)

    # What managers do

    @rule(node_id=NODE)
    def register(self, node_id: str) -> None:
        host, self.granting = self.hosts[node_id], node_id
        registration = Registration(node_id, host.boot_id, "1.2.9", NODES[node_id], HostFacts(), host.reports())
        try:
            self.granted(host, self.nodes.register(registration, NODES[node_id]))
        except Conflict:
            assert self.is_leased(node_id)
        self.granting = None

    @rule(node_id=NODE)
    def renew(self, node_id: str) -> None:
        host, could = self.hosts[node_id], self.is_leased(node_id)
        try:
            orders = self.nodes.renew(
                node_id, host.lease_id, host=HostFacts(), reports=host.reports(), peer=NODES[node_id]
            )
        except Conflict:
            return
        assert could
        self.granted(host, orders)

    @rule(node_id=NODE)
    def everything_comes_up(self, node_id: str) -> None:
        """A manager that gets through brings up all that it is told: what most of the time happens."""
        for _ in range(2):
            self.renew(node_id)
            if self.hosts[node_id].lease_id == "none" or not self.is_leased(node_id):
                self.register(node_id)
            for replica_id in list(self.hosts[node_id].processes):
                self.hosts[node_id].move(replica_id, Phase.UP)
        self.renew(node_id)

    @rule(node_id=NODE)
    def leave(self, node_id: str) -> None:
        host, self.leaving = self.hosts[node_id], node_id
        try:
            self.nodes.leave(node_id, host.lease_id)
        except Conflict:
            return
        finally:
            self.leaving = None
        assert self.is_leased(node_id)
        del self.leases[node_id]
        self.hosts[node_id] = Host(node_id, f"boot-{next(self.ids)}")

    @rule(node_id=NODE)
    def manager_is_killed(self, node_id: str) -> None:
        self.hosts[node_id] = Host(node_id, f"boot-{next(self.ids)}")

    @rule(replica_id=REPLICA, phase=PHASES)
    def process_changes(self, replica_id: str, phase: Phase) -> None:
        self.hosts[REPLICAS[replica_id]].move(replica_id, phase)

    # What the service does

    @rule(replica_id=REPLICA, generation=st.integers(0, 1))
    def want(self, replica_id: str, generation: int) -> None:
        order = LaunchOrder(
            replica_id=replica_id, pool_id=replica_id.partition("/")[0], engine="e", launcher="l", model="m",
            model_path=None, model_digest=None, ctx=1, slots=1, generation=generation,
        )  # fmt: skip
        self.orders[replica_id] = order
        self.nodes.manager(REPLICAS[replica_id]).want(order)

    @rule(replica_id=REPLICA)
    def release(self, replica_id: str) -> None:
        self.orders.pop(replica_id, None)
        self.nodes.manager(REPLICAS[replica_id]).release(replica_id)

    @rule(replica_id=REPLICA)
    def restart(self, replica_id: str) -> None:
        incarnation = self.last[replica_id].incarnation if replica_id in self.last else 1
        self.nodes.manager(REPLICAS[replica_id]).restart(replica_id, incarnation, Cause.SELF_TEST)

    @rule(node_id=NODE, pools=st.sets(st.sampled_from(POOLS)))
    def reconfigure(self, node_id: str, pools: set[str]) -> None:
        self.pools[node_id] = frozenset(pools)
        self.nodes.reconfigure(self.configs())

    # Time

    @rule(seconds=st.sampled_from([0.5, 2.0, 2.0, 2.0, LEASE_S - 2.0, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def no_replica_of_an_expired_lease_is_up(self) -> None:
        self.nodes.expire(self.clock.monotonic())
        for replica_id, report in self.last.items():
            if report.phase is Phase.UP:
                assert self.is_leased(REPLICAS[replica_id])
        leases = [self.leases[node_id] for node_id in NODES if self.is_leased(node_id)]
        assert self.nodes.next_expiry() == min(leases, default=None)


def test_histories_of_nodes_lose_no_order_and_believe_no_silent_node() -> None:
    """ORCH-2105."""
    run_state_machine_as_test(NodeHistories, settings=SHORT)


@pytest.mark.prove
def test_many_histories_of_nodes_lose_no_order_and_believe_no_silent_node() -> None:
    """ORCH-2105."""
    run_state_machine_as_test(NodeHistories, settings=LONG)
