"""Flows of one priority by themselves: lifting, turns, parking, forgetting."""

from math import inf

import pytest

from llorch.domain.fair_queue import broken_level
from llorch.domain.fairness import Flow, Level
from llorch.domain.task import ANYWHERE, EXACT, Cohort, Need, Task
from tests.unit.domain.desk import INTERACTIVE, spec


class Bench:
    """A level with tasks of cost 10."""

    def __init__(self) -> None:
        self.level = Level(INTERACTIVE, 1.0)
        self.orders = 0

    def push(self, tenant: str, need: Need = ANYWHERE, weight: float = 1.0) -> Task:
        self.orders += 1
        task = Task(spec(f"{tenant}{self.orders}"), self.orders, accepted_at=0.0, need=need)
        task.due, task.cost = self.orders, 10.0
        flow = self.level.flows.get(tenant) or self.level.add_flow(tenant, weight, keep_arrivals=False)
        self.level.push(flow, task)
        self.check()
        return task

    def flow(self, tenant: str) -> Flow:
        return self.level.flows[tenant]

    def start(self, *, needs: tuple[Need, ...] = (ANYWHERE, EXACT), refused: tuple[str, ...] = ()) -> str | None:
        """Who has its turn, charged at once."""
        task = self.level.next(lambda need: need in needs, lambda task: self.owner(task) not in refused)
        self.check()
        if task is None:
            return None
        tenant = self.owner(task)
        flow = self.flow(tenant)
        self.level.remove(flow, task)
        self.level.virtual_time = flow.counter
        self.level.charge(flow, task.cost)
        self.check()
        return tenant

    def owner(self, task: Task) -> str:
        return task.key[1].rstrip("0123456789")

    def check(self) -> None:
        assert list(broken_level(self.level)) == []


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_flow_with_the_smallest_counter_has_its_turn(bench: Bench) -> None:
    for tenant in "aaabbb":
        bench.push(tenant)
    assert [bench.start() for _ in range(7)] == ["a", "b", "a", "b", "a", "b", None]


def test_weight_is_how_much_service_counts(bench: Bench) -> None:
    for _ in range(6):
        bench.push("light")
        bench.push("heavy", weight=2.0)
    started = [bench.start() for _ in range(9)]
    assert (started.count("light"), started.count("heavy")) == (3, 6)


def test_idle_flow_gains_no_credit(bench: Bench) -> None:
    for _ in range(20):
        bench.push("a")
        bench.push("c")
    for _ in range(10):
        bench.start()
    bench.push("b")
    assert bench.flow("b").counter == min(bench.flow("a").counter, bench.flow("c").counter) == 50.0


def test_flow_that_comes_when_none_waits_starts_at_the_virtual_time(bench: Bench) -> None:
    bench.push("a")
    bench.push("a")
    bench.start()
    bench.start()
    bench.push("b")
    assert bench.flow("b").counter == bench.level.virtual_time == 10.0


def test_refund_of_older_charges_does_not_sink_a_flow_below_its_floor(bench: Bench) -> None:
    bench.push("a")
    bench.push("b")
    for _ in range(2):
        bench.start()
    for _ in range(4):
        bench.push("b")
        bench.start()
    bench.push("b")
    bench.push("a")
    assert bench.flow("a").floor == 50.0
    bench.level.charge(bench.flow("a"), 30.0)
    bench.level.charge(bench.flow("a"), -90.0)
    assert bench.flow("a").counter == 50.0
    bench.check()


def test_refund_brings_the_turn_forward(bench: Bench) -> None:
    for tenant in ("a", "b", "a", "b", "a", "b"):
        bench.push(tenant)
    assert [bench.start(), bench.start(), bench.start()] == ["a", "b", "a"]
    bench.level.charge(bench.flow("a"), -15.0)
    bench.check()
    assert bench.start() == "a"


def test_parked_flow_takes_no_part_until_it_is_unparked_and_gains_no_credit(bench: Bench) -> None:
    for tenant in ("a", "b", "b", "b"):
        bench.push(tenant)
    assert bench.start(refused=("a",)) == "b"
    assert bench.start() == "b"
    bench.push("a")
    assert (list(bench.level.parked), bench.level.active, bench.level.depth) == (["a"], 1, 3)
    bench.level.unpark(bench.flow("a"))
    bench.check()
    assert bench.flow("a").counter == bench.flow("b").counter == 20.0
    assert [bench.start(), bench.start(), bench.start()] == ["b", "a", "a"]


def test_parked_flow_whose_tasks_go_is_parked_no_more(bench: Bench) -> None:
    task = bench.push("a")
    assert bench.start(refused=("a",)) is None
    bench.level.remove(bench.flow("a"), task)
    bench.check()
    assert not bench.level.parked
    bench.push("a")
    assert bench.start() == "a"


def test_need_that_nobody_can_meet_blocks_no_other(bench: Bench) -> None:
    bench.push("a", EXACT)
    bench.push("a")
    bench.push("b")
    assert [bench.start(needs=(ANYWHERE,)) for _ in range(3)] == ["a", "b", None]
    assert bench.start(needs=(EXACT,)) == "a"


def test_first_in_order_of_the_startable_lanes_starts(bench: Bench) -> None:
    first, second = bench.push("a", EXACT), bench.push("a")
    assert bench.level.next(lambda _: True, lambda _: True) is first
    assert bench.level.next(lambda need: need is ANYWHERE, lambda _: True) is second


def test_waiting_for_a_special_replica_gains_no_credit(bench: Bench) -> None:
    bench.push("special", EXACT)
    for _ in range(11):
        bench.push("a")
    for _ in range(10):
        assert bench.start(needs=(ANYWHERE,)) == "a"
    bench.push("new")
    assert bench.flow("new").counter == 90.0
    assert bench.start() == "special"
    assert bench.flow("special").counter == 100.0


def test_peer_bug_15_flows_and_needs_that_are_gone_leave_nothing_behind(bench: Bench) -> None:
    for number in range(5_000):
        need = Need(exact=True, cohort=Cohort(f"v{number}", None, exact=True))
        flow = bench.level.add_flow(f"t{number}", 1.0, keep_arrivals=False)
        waiting = Task(spec("x"), number, accepted_at=0.0, need=need)
        waiting.cost = 10.0
        bench.level.push(flow, waiting)
        bench.level.remove(flow, waiting)
        bench.level.charge(flow, 10.0)
        bench.level.retire(flow)
    assert len(bench.level.flows) <= 3 * 1024
    assert not bench.level.turns
    assert not bench.level.bands
    assert bench.level.contending == 0.0


def test_flow_that_owes_nothing_is_forgotten_at_once_and_one_ahead_is_remembered(bench: Bench) -> None:
    task = bench.push("a")
    flow = bench.flow("a")
    bench.level.remove(flow, task)
    bench.level.retire(flow)
    assert not bench.level.flows
    bench.push("b")
    bench.start()
    bench.level.retire(bench.flow("b"))
    assert set(bench.level.flows) == {"b"}


def test_sweep_keeps_who_waits_runs_or_is_far_ahead(bench: Bench) -> None:
    bench.push("waits")
    bench.level.add_flow("runs", 1.0, keep_arrivals=False).running = 1
    ahead = bench.level.add_flow("far ahead", 1.0, keep_arrivals=False)
    ahead.counter = 1e9
    for number in range(3000):
        bench.level.add_flow(f"t{number}", 1.0, keep_arrivals=False).counter = 1.0 + number
    assert {"waits", "runs", "far ahead"} <= set(bench.level.flows)
    assert "t0" not in bench.level.flows


def test_stale_turns_do_not_pile_up(bench: Bench) -> None:
    for tenant in "abcabc":
        bench.push(tenant)
    for _ in range(150):
        bench.level.charge(bench.flow("b"), 10.0)
        bench.start()
        bench.push("b")
        bench.level.charge(bench.flow("b"), -9.0)
        bench.push("a")
        bench.level.charge(bench.flow("a"), -9.0)
    assert all(len(turns.heap) <= 2 * turns.live + 64 + 1 for turns in bench.level.turns.values())


def test_fullest_flow_is_the_one_with_most_tasks_for_its_weight(bench: Bench) -> None:
    assert bench.level.fullest() is None
    for tenant, weight, count in (("a", 1.0, 3), ("b", 4.0, 8), ("c", 1.0, 1)):
        for _ in range(count):
            bench.push(tenant, weight=weight)
    fullest = [bench.level.fullest()]
    for _ in range(3):
        bench.push("c")
    fullest.append(bench.level.fullest())
    for _ in range(200):
        bench.push("b")
    fullest.append(bench.level.fullest())
    assert [flow.tenant for flow in fullest if flow is not None] == ["a", "c", "b"]


def test_sums_by_band_tell_what_flows_get_first(bench: Bench) -> None:
    for tenant, weight, count in (("a", 1.0, 1), ("b", 2.0, 30), ("c", 1.0, 200)):
        for _ in range(count):
            bench.push(tenant, weight=weight)
    assert bench.level.served_first(None, inf) == (231, 2310.0)
    assert bench.level.served_first(None, 0.0) == (0, 0.0)
    assert bench.level.served_first(bench.flow("c"), 100.0) == (21.0, 210.0)
    assert bench.level.served_first(bench.flow("a"), 100.0) == (30.0, 300.0)
