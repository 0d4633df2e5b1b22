"""Nodes: who may join, what they are told to run, and what the service hears when they come, fall silent and go."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from llorch.errors import Conflict, Forbidden, InvalidParams, LlorchError, NotFound
from llorch.service.launching import Cause, HostFacts, LaunchOrder, LaunchReport, Phase
from llorch.service.nodes import NodeConfig, NodeProcess, Nodes, NodeState, NodeView, Orders, Registration
from llorch.testing.clock import FakeClock, running_clock

LEASE_S = 10.0
GPU_2 = NodeConfig("gpu-2", "a" * 64, frozenset({"small", "large"}), ("10.0.0.0/24", "fd00::/64"))
GPU_3 = NodeConfig("gpu-3", "b" * 64, frozenset({"small"}), ("10.0.1.0/24",))
HOST = HostFacts(ram_total_bytes=64, ram_available_bytes=32)
PEER = "10.0.0.2"


def order(replica_id: str = "small/0", *, generation: int = 0) -> LaunchOrder:
    return LaunchOrder(
        replica_id=replica_id, pool_id=replica_id.partition("/")[0], engine="llamacpp", launcher="llamacpp", model="m",
        model_path="/m.gguf", model_digest=None, ctx=512, slots=1, generation=generation,
    )  # fmt: skip


def up(replica_id: str = "small/0", *, incarnation: int = 1, generation: int = 0) -> LaunchReport:
    url = f"http://{PEER}:40001"
    return LaunchReport(replica_id, generation, Phase.UP, incarnation, pid=7, url=url, api_key="k")


@dataclass
class House:
    """Nodes under a clock that the test moves, and everything that the service heard."""

    clock: FakeClock = field(default_factory=FakeClock)
    heard: list[LaunchReport] = field(default_factory=list)
    on_heard: Callable[[LaunchReport], None] | None = None

    def __post_init__(self) -> None:
        ids = count(1)
        self.nodes = Nodes(
            [GPU_2, GPU_3], version="0.4.1", clock=self.clock, lease_s=LEASE_S, report=self.hear,
            new_id=lambda: f"lease-{next(ids)}",
        )  # fmt: skip
        self.manager = self.nodes.manager("gpu-2")

    def hear(self, report: LaunchReport) -> None:
        self.heard.append(report)
        if self.on_heard is not None:
            self.on_heard(report)

    def register(self, *reports: LaunchReport, boot_id: str = "boot-1", peer: str = PEER, **other: str) -> Orders:
        registration = Registration("gpu-2", boot_id, "0.4.9", PEER, HOST, reports)
        return self.nodes.register(replace(registration, **other), peer)  # type: ignore[arg-type]

    def renew(self, orders: Orders, *reports: LaunchReport) -> Orders:
        return self.nodes.renew("gpu-2", orders.lease_id, host=HOST, reports=reports, peer=PEER)

    def last(self) -> LaunchReport:
        return self.heard[-1]

    def phases(self) -> list[Phase]:
        return [report.phase for report in self.heard]

    def view(self) -> NodeView:
        return self.nodes.list()[0]


@pytest.fixture
def house() -> House:
    return House()


# Joining


def test_manager_that_joins_is_told_its_lease_and_every_order(house: House) -> None:
    """ORCH-2105."""
    house.manager.want(order("small/0"))
    house.manager.want(order("large/0"))
    house.nodes.manager("gpu-3").want(order("small/1"))
    orders = house.register()
    assert orders == Orders("lease-1", LEASE_S, 2.0, (order("small/0"), order("large/0")), ())


def test_order_for_a_node_that_has_not_joined_waits_and_says_so(house: House) -> None:
    house.manager.want(order())
    report = house.last()
    assert (report.phase, report.cause) == (Phase.WAITING, None)
    assert report.error is not None
    assert report.error.message == "node gpu-2 has not joined"
    house.register()
    assert house.last() == LaunchReport("small/0", 0, Phase.WAITING)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"node_id": "gpu-9"}, NotFound, "no node gpu-9"),
        ({"peer": "10.0.1.2"}, Forbidden, "may not join from 10.0.1.2"),
        ({"peer": ""}, Forbidden, "outside its networks"),
        ({"address": "192.168.0.1"}, Forbidden, "may not be at 192.168.0.1"),
        ({"address": "gpu-2.example"}, Forbidden, "no IP address"),
        ({"manager_version": "0.5.0"}, InvalidParams, "is llorch 0.5.0, this server is llorch 0.4.1"),
        ({"manager_version": "1.4.1"}, InvalidParams, "install llorch 0.4.1"),
        ({"manager_version": "0"}, InvalidParams, "major and minor"),
    ],
)
def test_manager_that_may_not_join_is_told_why(
    house: House, change: dict[str, str], error: type[LlorchError], says: str
) -> None:
    """ORCH-2109."""
    with pytest.raises(error, match=says):
        house.register(**change)
    assert house.view().state is NodeState.ABSENT


@pytest.mark.parametrize(
    "report",
    [
        replace(up(), url="http://10.0.1.2:80"),
        replace(up(), url="http://gpu-2:80"),
        replace(up(), url="http://[::1:80"),
        replace(up(), url="http://10.0.0.2@10.9.9.9:80"),
        up("other/0"),
    ],
)
def test_reports_of_foreign_addresses_and_pools_are_refused(house: House, report: LaunchReport) -> None:
    """ORCH-2108."""
    with pytest.raises(Forbidden):
        house.register(report)
    orders = house.register()
    with pytest.raises(Forbidden):
        house.renew(orders, report)
    assert house.heard == []


def test_addresses_are_compared_as_addresses(house: House) -> None:
    house.manager.want(order())
    house.register(replace(up(), url="https://[fd00::7]:40001"), peer="::ffff:10.0.0.2", address="fd00::7")
    assert house.last().phase is Phase.UP


def test_other_manager_is_refused_while_the_first_one_lives(house: House) -> None:
    first = house.register()
    house.clock.advance(4.0)
    with pytest.raises(Conflict, match=r"holds node gpu-2; .* free in 6\.0 s"):
        house.register(boot_id="boot-2")
    house.renew(first)
    house.clock.advance(LEASE_S)
    house.register(boot_id="boot-2")
    assert house.view().boot_id == "boot-2"


def test_manager_that_registers_twice_holds_the_newer_lease(house: House) -> None:
    first, second = house.register(), house.register()
    house.renew(second)
    with pytest.raises(Conflict, match="register again"):
        house.renew(first)


# Renewing, silence, coming back


def test_renewals_keep_the_lease_and_tell_what_is_news(house: House) -> None:
    house.manager.want(order())
    orders = house.register()
    house.heard.clear()
    loading = replace(up(), phase=Phase.LOADING)
    for report in (loading, loading, up(), up()):
        house.clock.advance(LEASE_S - 1)
        orders = house.renew(orders, report)
        assert orders.lease_id == "lease-1"
    assert house.heard == [loading, up()]
    assert house.manager.host == HOST


def test_silent_node_loses_its_replicas_and_the_error_says_since_when(house: House) -> None:
    """ORCH-2105."""
    house.manager.want(order())
    orders = house.register(up())
    house.clock.advance(LEASE_S - 0.1)
    house.nodes.expire(house.clock.monotonic())
    assert house.last().phase is Phase.UP
    house.clock.advance(0.1)
    house.nodes.expire(house.clock.monotonic())
    lost = house.last()
    assert (lost.phase, lost.incarnation) == (Phase.LOST, 1)
    assert lost.error is not None
    assert lost.error.message == "node gpu-2 has been silent since 2023-11-14T22:13:20Z"
    with pytest.raises(Conflict):
        house.renew(orders, up())
    assert house.last() is lost


def test_late_heartbeat_is_refused_before_any_timer_has_fired(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.clock.advance(LEASE_S)
    with pytest.raises(Conflict, match="is over"):
        house.renew(orders, up())
    assert house.last().phase is Phase.LOST


def test_node_that_comes_back_under_its_living_manager_is_adopted(house: House) -> None:
    """ORCH-2107."""
    house.manager.want(order())
    house.register(up(incarnation=3))
    house.clock.advance(LEASE_S)
    orders = house.register(up(incarnation=3))
    assert house.phases() == [Phase.WAITING, Phase.UP, Phase.LOST, Phase.UP]
    assert house.last() == up(incarnation=3)
    assert (orders.wanted, orders.restarts) == ((order(),), ())


def test_new_manager_counts_on_where_the_old_one_ended(house: House) -> None:
    """Two processes of a replica never have the same incarnation, whoever started them."""
    house.manager.want(order())
    house.register(up(incarnation=3))
    house.clock.advance(LEASE_S)
    orders = house.register(boot_id="boot-2")
    assert (house.last().phase, house.last().incarnation) == (Phase.WAITING, 3)
    house.renew(orders, up(incarnation=1))
    assert (house.last().phase, house.last().incarnation) == (Phase.UP, 4)
    house.manager.restart("small/0", 4, Cause.SELF_TEST)
    assert house.renew(orders, up(incarnation=1)).restarts == (("small/0", 1, Cause.SELF_TEST),)


def test_leaving_stops_the_replicas_and_keeps_the_orders(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.nodes.leave("gpu-2", orders.lease_id)
    stopped = house.last()
    assert (stopped.phase, stopped.url, stopped.pid, stopped.api_key) == (Phase.STOPPED, None, None, None)
    assert house.view().state is NodeState.ABSENT
    with pytest.raises(Conflict):
        house.nodes.leave("gpu-2", orders.lease_id)
    assert house.register(boot_id="boot-2").wanted == (order(),)


def test_order_to_a_node_that_is_silent_waits_for_it(house: House) -> None:
    house.register()
    house.clock.advance(LEASE_S)
    house.manager.want(order())
    assert house.last().phase is Phase.WAITING
    assert "has been silent since" in str(house.last().error)
    house.manager.want(order("small/1"))
    house.manager.release("small/1")
    assert house.last().phase is Phase.STOPPED
    assert house.register().wanted == (order(),)


# Releasing, restarting


def test_released_replica_is_stopped_when_the_node_says_so(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.manager.release("small/0")
    assert house.renew(orders, up()).wanted == ()
    house.renew(orders, replace(up(), phase=Phase.STOPPING))
    assert house.last().phase is Phase.STOPPING
    house.renew(orders, LaunchReport("small/0", 0, Phase.STOPPED, 1))
    house.renew(orders, LaunchReport("small/0", 0, Phase.STOPPED, 1))
    assert house.phases().count(Phase.STOPPED) == 1
    assert house.view().replicas == ()


def test_released_replica_is_stopped_when_the_node_knows_nothing_of_it(house: House) -> None:
    orders = house.register()
    house.manager.want(order())
    house.manager.release("small/0")
    assert house.phases() == [Phase.WAITING]
    house.renew(orders)
    assert house.phases() == [Phase.WAITING, Phase.STOPPED]


def test_replica_released_during_a_silence_is_stopped_once_the_node_is_back_without_it(house: House) -> None:
    house.manager.want(order())
    house.register(up())
    house.clock.advance(LEASE_S)
    house.manager.release("small/0")
    assert house.last().phase is Phase.LOST
    orders = house.register(up())
    assert (house.last().phase, orders.wanted) == (Phase.UP, ())
    house.renew(orders)
    assert house.last().phase is Phase.STOPPED


def test_release_where_there_can_be_no_process_is_stopped_at_once(house: House) -> None:
    house.manager.want(order())
    house.manager.release("small/0")
    house.manager.release("small/0")
    assert house.phases() == [Phase.WAITING, Phase.STOPPED]


def test_stopped_of_a_released_replica_is_told_for_its_newest_order(house: House) -> None:
    """The service ignores what is told of older orders, and would wait for ever."""
    house.manager.want(order())
    orders = house.register(up())
    house.manager.want(order(generation=1))
    house.manager.release("small/0")
    house.renew(orders, LaunchReport("small/0", 0, Phase.STOPPED, 1))
    assert (house.last().phase, house.last().generation) == (Phase.STOPPED, 1)


def test_restart_is_delivered_until_another_incarnation_is_told(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.manager.restart("small/0", 1, Cause.SELF_TEST)
    for _ in range(2):
        assert house.renew(orders, up()).restarts == (("small/0", 1, Cause.SELF_TEST),)
    house.clock.advance(LEASE_S)
    orders = house.register(up())
    assert orders.restarts == (("small/0", 1, Cause.SELF_TEST),)
    assert house.renew(orders, replace(up(incarnation=2), phase=Phase.STARTING)).restarts == ()
    house.manager.restart("small/0", 1, Cause.SELF_TEST)
    assert house.renew(orders, up(incarnation=2)).restarts == ()


def test_restart_of_a_process_that_ended_by_itself_is_forgotten(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.manager.restart("small/0", 1, Cause.SELF_TEST)
    house.manager.restart("small/9", 1, Cause.SELF_TEST)
    assert house.renew(orders, replace(up(), phase=Phase.WAITING, cause=Cause.EXIT)).restarts == ()


def test_reports_of_what_is_not_wanted_there_are_not_told(house: House) -> None:
    house.nodes.manager("gpu-3").want(order("small/7"))
    house.heard.clear()
    house.register(up("small/7"), up("large/9"))
    assert house.heard == []


def test_hearer_may_give_orders_and_the_answer_has_them(house: House) -> None:
    house.manager.want(order())

    def react(report: LaunchReport) -> None:
        if report.phase is Phase.UP and report.replica_id == "small/0":
            house.manager.want(order("small/0+"))
            house.manager.release("small/0")

    house.on_heard = react
    assert house.register(up()).wanted == (order("small/0+"),)
    assert [(report.replica_id, report.phase) for report in house.heard[1:]] == [
        ("small/0", Phase.UP),
        ("small/0+", Phase.WAITING),
    ]


# Configuration


def test_pool_that_the_node_may_not_run_is_not_delivered(house: House) -> None:
    """ORCH-2108."""
    manager = house.nodes.manager("gpu-3")
    manager.want(order("large/0"))
    assert "may not run replicas of pool large" in str(house.last().error)
    registration = Registration("gpu-3", "b", "0.4.1", "10.0.1.3", HOST)
    orders = house.nodes.register(registration, "10.0.1.3")
    assert orders.wanted == ()
    house.nodes.reconfigure([GPU_2, replace(GPU_3, pools=frozenset({"large"}))])
    orders = house.nodes.renew("gpu-3", orders.lease_id, host=HOST, reports=(), peer="10.0.1.3")
    assert orders.wanted == (order("large/0"),)
    assert (house.last().phase, house.last().error) == (Phase.WAITING, None)


def test_pool_withdrawn_from_a_node_is_up_there_no_more(house: House) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.nodes.reconfigure([replace(GPU_2, pools=frozenset({"large"})), GPU_3])
    assert house.last().phase is Phase.WAITING
    assert house.renew(orders, up()).wanted == ()
    assert house.last().phase is Phase.WAITING


def test_process_of_a_withdrawn_pool_is_not_taken_for_ended_while_its_node_is_silent(house: House) -> None:
    house.manager.want(order())
    house.register(up())
    house.nodes.reconfigure([replace(GPU_2, pools=frozenset({"large"})), GPU_3])
    house.clock.advance(LEASE_S)
    house.manager.release("small/0")
    assert Phase.STOPPED not in house.phases()
    orders = house.register(up())
    assert orders.wanted == ()
    house.renew(orders)
    assert house.last().phase is Phase.STOPPED


@pytest.mark.parametrize(
    "change",
    [{"sha256": "c" * 64}, {"networks": ("10.0.9.0/24",)}],
    ids=["token", "networks"],
)
def test_node_whose_admission_is_withdrawn_loses_its_lease_at_once(house: House, change: dict[str, str]) -> None:
    house.manager.want(order())
    orders = house.register(up())
    house.nodes.reconfigure([replace(GPU_2, **change), GPU_3])  # type: ignore[arg-type]
    assert house.last().phase is Phase.LOST
    assert house.view().state is NodeState.SILENT
    with pytest.raises(Conflict):
        house.renew(orders, up())


def test_removed_node_ends_at_once_and_releases_are_not_waited_for(house: House) -> None:
    house.manager.want(order("small/0"))
    house.manager.want(order("small/1"))
    orders = house.register(up("small/0"), up("small/1"))
    house.manager.release("small/1")
    house.nodes.reconfigure([GPU_3])
    assert [(r.replica_id, r.phase) for r in house.heard[-2:]] == [("small/1", Phase.STOPPED), ("small/0", Phase.LOST)]
    assert [view.node_id for view in house.nodes.list()] == ["gpu-3"]
    for ask in (lambda: house.renew(orders, up()), house.register, lambda: house.nodes.manager("gpu-2")):
        with pytest.raises(NotFound):
            ask()
    house.manager.release("small/0")
    assert house.last().phase is Phase.STOPPED


def test_orders_of_a_removed_node_are_there_when_it_is_configured_again(house: House) -> None:
    house.manager.want(order("small/0"))
    house.nodes.reconfigure([GPU_3])
    house.manager.want(order("small/1"))
    house.nodes.reconfigure([GPU_2, GPU_3])
    assert "has not joined" in str(house.last().error)
    assert house.register().wanted == (order("small/0"), order("small/1"))


def test_changed_lease_holds_from_the_next_renewal_on(house: House) -> None:
    orders = house.register()
    house.nodes.reconfigure([GPU_2, GPU_3], lease_s=50.0)
    assert house.view().lease_remaining_s == LEASE_S
    assert house.renew(orders).lease_s == 50.0
    assert house.view().lease_remaining_s == 50.0


# Looking


def test_views_tell_the_life_of_a_node(house: House) -> None:
    """ORCH-2105."""
    nothing = NodeView("gpu-2", NodeState.ABSENT, None, None, None, None, None, None, ())
    assert house.view() == nothing
    house.manager.want(order())
    house.register(up())
    joined_at = house.clock.wall()
    house.clock.advance(3.0)
    assert house.view() == NodeView(
        "gpu-2",
        NodeState.JOINED,
        joined_at,
        "boot-1",
        "0.4.9",
        PEER,
        7.0,
        HOST,
        (NodeProcess("small/0", Phase.UP, 1),),
    )
    house.clock.advance(7.0)
    view = house.view()
    assert (view.state, view.since, view.lease_remaining_s) == (NodeState.SILENT, house.clock.wall(), None)
    assert view.replicas == (("small/0", Phase.LOST, 1),)
    assert [each.node_id for each in house.nodes.list()] == ["gpu-2", "gpu-3"]


async def test_watch_ends_leases_when_they_are_over_and_not_before() -> None:
    house = House(running_clock())
    house.manager.want(order())
    watching = asyncio.get_running_loop().create_task(house.nodes.watch())
    await asyncio.sleep(100.0)
    orders = house.register(up())
    for _ in range(3):
        await asyncio.sleep(LEASE_S - 1)
        house.renew(orders, up())
    await asyncio.sleep(LEASE_S - 0.01)
    assert house.last().phase is Phase.UP
    await asyncio.sleep(0.02)
    assert house.last().phase is Phase.LOST
    assert house.nodes.next_expiry() is None
    watching.cancel()
