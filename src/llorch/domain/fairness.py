"""Whose turn it is within one priority: flows, their virtual token counters, and the heaps they are chosen by.

A flow is one tenant's tasks of the priority. Knows nothing of other priorities, of bounds or of what tokens cost.
Source: "Fairness in Serving Large Language Models", Sheng et al., OSDI 2024 (virtual token counters).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from math import frexp, inf
from operator import attrgetter

from llorch.domain.lane import Lane
from llorch.domain.task import Need, Priority, Task

_SLACK = 64
"""Stale entries that a heap may keep whatever its size."""
_IDLE = 1024
"""Idle flows of which the counters are remembered at least, while they are ahead of the others."""
_BANDS = 47
"""Bands by powers of two that backlogs are sorted into; the last one is open above."""

_turn = attrgetter("due", "order")


class FlowLane(Lane):
    """A flow's tasks of one need. `entry` is its place in the heap of that need, None while it takes no part."""

    __slots__ = ("entry", "flow", "turns")

    def __init__(self, flow: "Flow", turns: "Turns") -> None:
        super().__init__()
        self.flow = flow
        self.turns = turns
        self.entry: _Entry | None = None


_Entry = tuple[float, int, FlowLane]
"""(counter of the flow when it was made, number that breaks ties in order of coming, lane)."""


class Flow:
    """One tenant's share of a priority. `counter` is the service it got, in weighted tokens / weight.

    `floor` is what it was lifted to when it became active: refunds of what it got before do not take it below that.
    `backlog` is the cost of its `waiting` tasks. `arrivals` are those that never ran, by admission, when asked for.
    """

    __slots__ = (
        "arrivals", "backlog", "band", "counter", "floor", "is_parked", "lanes", "last_lane", "number", "running",
        "tenant", "waiting", "weight",
    )  # fmt: skip

    def __init__(self, tenant: str, weight: float, number: int, arrivals: OrderedDict[int, Task] | None) -> None:
        self.tenant = tenant
        self.weight = weight
        self.number = number
        self.counter = 0.0
        self.floor = 0.0
        self.waiting = 0
        self.running = 0
        self.backlog = 0.0
        self.is_parked = False
        self.lanes: dict[Need, FlowLane] = {}
        self.last_lane: FlowLane | None = None
        self.band: Band | None = None
        self.arrivals = arrivals

    def newest(self) -> Task | None:
        """Of its waiting tasks that never ran, the one admitted last."""
        if self.arrivals is not None:
            return self.arrivals[next(reversed(self.arrivals))] if self.arrivals else None
        last = [task for lane in self.lanes.values() if (task := _first_fresh(reversed(lane))) is not None]
        return max(last, key=_turn) if last else None

    def oldest(self) -> Task | None:
        """Of its waiting tasks that never ran, the one admitted first."""
        if self.arrivals is not None:
            return self.arrivals[next(iter(self.arrivals))] if self.arrivals else None
        first = [task for lane in self.lanes.values() if (task := _first_fresh(iter(lane))) is not None]
        return min(first, key=_turn) if first else None

    def before(self, due: float, order: float) -> tuple[int, float]:
        """How many of its waiting tasks come before this place, and what they cost."""
        count, cost = 0, 0.0
        for lane in self.lanes.values():
            in_lane = lane.before(due, order)
            count += in_lane[0]
            cost += in_lane[1]
        return count, cost


def _first_fresh(tasks: Iterator[Task]) -> Task | None:
    """Passes over as many requeued tasks as there are: they stand at one end, and are fewer than slots."""
    for task in tasks:
        if not task.attempts:
            return task
    return None


class Turns:
    """The lanes of one need, those of the smallest counter first: a heap whose entries are put right when they come up.

    An entry is never above the counter of its flow. Entries that are no lane's `entry` any more are dropped when they
    come up, or when they outnumber the others. No flow with these tasks alone counts as less served than `floor`: it
    was passed over when one with that counter had its turn, and to wait for a special replica gains no credit.
    """

    __slots__ = ("floor", "heap", "lanes", "live", "need")

    def __init__(self, need: Need) -> None:
        self.need = need
        self.lanes = 0
        self.heap: list[_Entry] = []
        self.live = 0
        self.floor = 0.0

    def enter(self, lane: FlowLane, number: int) -> None:
        """The lane takes part from now on."""
        self.live += 1
        lane.entry = entry = (lane.flow.counter, number, lane)
        heappush(self.heap, entry)
        if len(self.heap) > 2 * self.live + _SLACK:
            self._tidy()

    def leave(self, lane: FlowLane) -> None:
        """The lane takes part no more. Idempotent."""
        if lane.entry is not None:
            lane.entry = None
            self.live -= 1
            if not self.live:
                self.heap.clear()
                self.floor = 0.0

    def sink(self, lane: FlowLane) -> None:
        """The counter of its flow may have fallen."""
        entry = lane.entry
        if entry is not None and entry[0] > lane.flow.counter:
            self.live -= 1
            self.enter(lane, entry[1])

    def first(self) -> FlowLane | None:
        """The lane whose turn it is."""
        heap = self.heap
        while heap:
            entry = heap[0]
            lane = entry[2]
            if lane.entry is not entry:
                heappop(heap)
                continue
            flow = lane.flow
            if flow.counter < self.floor and flow.waiting == len(lane):
                flow.counter = self.floor
            if flow.counter == entry[0]:
                return lane
            lane.entry = fresh = (flow.counter, entry[1], lane)
            heapreplace(heap, fresh)
        return None

    def _tidy(self) -> None:
        self.heap = [entry for entry in self.heap if entry[2].entry is entry]
        heapify(self.heap)


class Band:
    """The sums over the flows whose backlog / weight is `least` or more and below `below`."""

    __slots__ = ("backlog", "below", "exponent", "flows", "least", "tasks", "weight")

    def __init__(self, exponent: int) -> None:
        self.exponent = exponent
        self.least = 2.0 ** (exponent - 1) if exponent else 0.0
        self.below = 2.0**exponent if exponent < _BANDS else inf
        self.flows = 0
        self.tasks = 0
        self.backlog = 0.0
        self.weight = 0.0


class Level:
    """The flows of one priority. `counter`, `floor` and `weight` are its own among the priorities.

    `active` flows have tasks that wait and are not parked; `contending` is the weight of all with waiting tasks.
    `virtual_time` is the counter that the flow had whose task started last, before it was charged.
    """

    __slots__ = (
        "_last_number", "_sweep_at", "active", "bands", "contending", "counter", "depth", "floor", "flows",
        "fullest_heap", "parked", "priority", "turns", "virtual_time", "weight",
    )  # fmt: skip

    def __init__(self, priority: Priority, weight: float) -> None:
        self.priority = priority
        self.weight = weight
        self.counter = 0.0
        self.floor = 0.0
        self.virtual_time = 0.0
        self.depth = 0
        self.active = 0
        self.contending = 0.0
        self.flows: dict[str, Flow] = {}
        self.parked: dict[str, Flow] = {}
        self.turns: dict[Need, Turns] = {}
        self.bands: dict[int, Band] = {}
        self.fullest_heap: list[tuple[float, int, Flow]] | None = None
        self._last_number = 0
        self._sweep_at = _IDLE

    # Flows that come and go

    def add_flow(self, tenant: str, weight: float, *, keep_arrivals: bool) -> Flow:
        """A flow that nothing is remembered of."""
        if len(self.flows) >= self._sweep_at:
            self._sweep()
        self._last_number += 1
        flow = self.flows[tenant] = Flow(tenant, weight, self._last_number, OrderedDict() if keep_arrivals else None)
        return flow

    def retire(self, flow: Flow) -> None:
        """Forget the flow when it is idle and owes nothing."""
        if not flow.waiting and not flow.running and flow.counter <= self.virtual_time:
            del self.flows[flow.tenant]

    def _sweep(self) -> None:
        """Forget the idle flows whose turn has come again, and the least indebted of the others if they are many."""
        idle = [flow for flow in self.flows.values() if not flow.waiting and not flow.running]
        idle.sort(key=attrgetter("counter"))
        for number, flow in enumerate(idle):
            if flow.counter <= self.virtual_time or len(idle) - number > _IDLE // 2:
                del self.flows[flow.tenant]
        self._sweep_at = 2 * len(self.flows) + _IDLE

    def _activate(self, flow: Flow) -> None:
        """Lift it to the least served of the active: to have been away gains no credit."""
        minimum = self.minimum()
        flow.floor = self.virtual_time if minimum is None else minimum
        flow.counter = max(flow.counter, flow.floor)
        self.active += 1

    def minimum(self) -> float | None:
        """The smallest counter of an active flow; None when none is active."""
        if not self.active:
            return None
        return min([lane.flow.counter for turns in self.turns.values() if (lane := turns.first()) is not None])

    # Tasks that come and go

    def push(self, flow: Flow, task: Task) -> None:
        """The task waits; its `due` and `cost` are set."""
        lane = flow.last_lane
        if lane is None or lane.turns.need is not task.need:
            lane = flow.lanes.get(task.need)
            if lane is None:
                lane = self._add_lane(flow, task.need)
            flow.last_lane = lane
        if not flow.waiting:
            self.contending += flow.weight
            self._activate(flow)
        lane.push(task)
        flow.waiting += 1
        flow.backlog += task.cost
        if not flow.is_parked:
            if lane.entry is None:
                self._enter(lane)
            self._weigh(flow, 1, task.cost)
        if flow.arrivals is not None and not task.attempts:
            flow.arrivals[task.order] = task
        self.depth += 1
        if self.fullest_heap is not None:
            self._note_fuller(flow)

    def remove(self, flow: Flow, task: Task) -> None:
        """The task waits no more; raises KeyError when it did not."""
        lane = flow.last_lane
        if lane is None or lane.turns.need is not task.need:
            lane = flow.lanes[task.need]
        lane.remove(task)
        flow.waiting -= 1
        flow.backlog = flow.backlog - task.cost if flow.waiting else 0.0
        if not lane:
            self._close_lane(flow, lane)
        if not flow.is_parked:
            self._weigh(flow, -1, -task.cost)
        if flow.arrivals is not None:
            flow.arrivals.pop(task.order, None)
        self.depth -= 1
        if not flow.waiting:
            self._deactivate(flow)

    def _deactivate(self, flow: Flow) -> None:
        if flow.is_parked:
            flow.is_parked = False
            del self.parked[flow.tenant]
        else:
            self.active -= 1
        self.contending = self.contending - flow.weight if self.depth else 0.0

    def _add_lane(self, flow: Flow, need: Need) -> FlowLane:
        turns = self.turns.get(need)
        if turns is None:
            turns = self.turns[need] = Turns(need)
        turns.lanes += 1
        lane = flow.lanes[need] = FlowLane(flow, turns)
        return lane

    def _enter(self, lane: FlowLane) -> None:
        self._last_number += 1
        lane.turns.enter(lane, self._last_number)

    def _close_lane(self, flow: Flow, lane: FlowLane) -> None:
        """Nothing remains of cohorts, which come and go."""
        turns = lane.turns
        turns.leave(lane)
        if turns.need.cohort is not None:
            flow.last_lane = None
            del flow.lanes[turns.need]
            turns.lanes -= 1
            if not turns.lanes:
                del self.turns[turns.need]

    # Whose turn it is

    def next(self, can_start: Callable[[Need], bool], may_run: Callable[[Task], bool]) -> Task | None:
        """The task whose turn it is among those that can start; parks the flows that may not run."""
        startable = [turns for turns in self.turns.values() if turns.live and can_start(turns.need)]
        while self.active:
            lane = _first_of(startable)
            if lane is None:
                return None
            flow = lane.flow
            task = lane.head()
            if len(flow.lanes) > 1:
                task = min([each.head() for each in flow.lanes.values() if each and each.turns in startable], key=_turn)
            if may_run(task):
                if len(self.turns) > len(startable):
                    self._pass_over(startable, flow.counter)
                return task
            self._park(flow)
        return None

    def _pass_over(self, startable: list[Turns], counter: float) -> None:
        for turns in self.turns.values():
            if turns.live and turns.floor < counter and turns not in startable:
                turns.floor = counter

    def _park(self, flow: Flow) -> None:
        assert flow.band is not None
        self._leave_band(flow, flow.band, flow.waiting, flow.backlog)
        for lane in flow.lanes.values():
            lane.turns.leave(lane)
        flow.is_parked = True
        self.parked[flow.tenant] = flow
        self.active -= 1

    def unpark(self, flow: Flow) -> None:
        """A parked flow takes part again, as if it came anew."""
        flow.is_parked = False
        del self.parked[flow.tenant]
        self._activate(flow)
        for lane in flow.lanes.values():
            if lane:
                self._enter(lane)
        self._weigh(flow, flow.waiting, flow.backlog)

    def charge(self, flow: Flow, cost: float) -> None:
        """Count service for the flow; less than nothing is a refund. The level's own counter is not touched."""
        if cost >= 0:
            flow.counter += cost / flow.weight
            return
        flow.counter = max(flow.counter + cost / flow.weight, min(flow.counter, flow.floor))
        if flow.waiting and not flow.is_parked:
            for lane in flow.lanes.values():
                lane.turns.sink(lane)

    # What waits

    def fullest(self) -> Flow | None:
        """The flow with the most tasks waiting for its weight."""
        heap = self.fullest_heap
        if heap is None:
            busy = [flow for flow in self.flows.values() if flow.waiting]
            heap = self.fullest_heap = [(-flow.waiting / flow.weight, flow.number, flow) for flow in busy]
            heapify(heap)
        while heap:
            fullness, number, flow = heap[0]
            if not flow.waiting:
                heappop(heap)
            elif fullness != -flow.waiting / flow.weight:
                heapreplace(heap, (-flow.waiting / flow.weight, number, flow))
            else:
                return flow
        return None

    def _note_fuller(self, flow: Flow) -> None:
        """Keep the heap while it is asked for; one that has grown old is made anew when it is asked for again."""
        assert self.fullest_heap is not None
        if len(self.fullest_heap) > 4 * len(self.flows) + _SLACK:
            self.fullest_heap = None
        else:
            heappush(self.fullest_heap, (-flow.waiting / flow.weight, flow.number, flow))

    def _weigh(self, flow: Flow, tasks: int, cost: float) -> None:
        """Keep the sums of the bands after so much came to the flow or left it."""
        band = flow.band
        size = flow.backlog / flow.weight
        if band is not None:
            if flow.waiting and band.least <= size < band.below:
                band.tasks += tasks
                band.backlog += cost
                return
            self._leave_band(flow, band, flow.waiting - tasks, flow.backlog - cost)
        if flow.waiting:
            self._enter_band(flow, max(0, min(frexp(size)[1], _BANDS)))

    def _enter_band(self, flow: Flow, exponent: int) -> None:
        band = self.bands.get(exponent)
        if band is None:
            band = self.bands[exponent] = Band(exponent)
        flow.band = band
        band.flows += 1
        band.tasks += flow.waiting
        band.backlog += flow.backlog
        band.weight += flow.weight

    def _leave_band(self, flow: Flow, band: Band, tasks: int, backlog: float) -> None:
        """`tasks` and `backlog` are what the flow had in it."""
        flow.band = None
        band.flows -= 1
        if not band.flows:
            del self.bands[band.exponent]
            return
        band.tasks -= tasks
        band.backlog -= backlog
        band.weight -= flow.weight

    def served_first(self, but: Flow | None, service: float) -> tuple[float, float]:
        """Tasks and cost that the active flows get until each had so much service per weight, leaving one out.

        Exact by flow outside of one band; within it the flows count as served alike.
        """
        tasks = cost = 0.0
        if service <= 0:
            return tasks, cost
        for band in self.bands.values():
            count: float = band.tasks
            backlog, weight = band.backlog, band.weight
            if but is not None and but.band is band:
                count, backlog, weight = count - but.waiting, backlog - but.backlog, weight - but.weight
                if count <= 0 or backlog <= 0:
                    continue
            share = 1.0 if band.below <= service else min(1.0, service * weight / backlog)
            tasks += count * share
            cost += backlog * share
        return tasks, cost

    def part_of(self, service: float) -> tuple[float, float]:
        """Tasks and cost that the level starts until it got so much service, the last one of which goes beyond it."""
        tasks, cost = self.served_first(None, inf)
        part = min(1.0, (service + cost / tasks / 2) / cost) if cost else 1.0
        return tasks * part, cost * part

    def only_lane(self) -> FlowLane | None:
        """The lane in which all the active tasks stand, if one does."""
        if self.active != 1:
            return None
        lanes = [lane for turns in self.turns.values() if (lane := turns.first()) is not None]
        return lanes[0] if len(lanes) == 1 else None


def _first_of(startable: list[Turns]) -> FlowLane | None:
    """The lane with the smallest entry."""
    if len(startable) == 1:
        return startable[0].first()
    best: FlowLane | None = None
    for turns in startable:
        lane = turns.first()
        if lane is not None and (best is None or _entry(lane) < _entry(best)):
            best = lane
    return best


def _entry(lane: FlowLane) -> _Entry:
    assert lane.entry is not None
    return lane.entry
