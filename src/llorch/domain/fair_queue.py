"""The waiting tasks of one route: bounded, fair by tokens between priorities and in them between tenants.

Decides who loses its place when the queue is full, whose turn it is, and what is ahead of whom; keeps what flows were
charged. Starts nothing, and knows neither clock nor replicas.
Source: "Fairness in Serving Large Language Models", Sheng et al., OSDI 2024 (virtual token counters), on two levels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf

from llorch.domain.fairness import Flow, Level
from llorch.domain.policy import Fairness, FullPolicy, Order, QueuePolicy
from llorch.domain.task import Fault, Need, Priority, Task, TaskSpec
from llorch.errors import AdmissionReject, QueueFullDropLru

_FULL = "the tenant has as many tasks waiting as it may while the queue is full"
_REJECT = Fault(AdmissionReject, _FULL, policy_label="reject")
_NONE_TO_DROP = Fault(AdmissionReject, f"{_FULL}, and none of them may be dropped", policy_label="drop-lru")
_NONE_TO_SHED = Fault(AdmissionReject, f"{_FULL}, and no batch task to shed", policy_label="shed-low-priority")
_EVICTED = Fault(
    AdmissionReject,
    "a tenant with less than its fair share of the full queue took the place",
    policy_label="fair-share",
)
_DROPPED = Fault(QueueFullDropLru, "a newer task of the same flow took the place", policy_label="drop-lru")
_SHED = Fault(
    AdmissionReject, "an interactive task of the same tenant took the place", policy_label="shed-low-priority"
)


@dataclass(slots=True)
class Room:
    """Whether a submission finds a place: no, with this `refusal`; or yes, once `victim` has ended with `fault`."""

    refusal: Fault | None = None
    victim: Task | None = None
    fault: Fault | None = None


_ROOM = Room()


@dataclass(slots=True)
class Ahead:
    """What is to start before a task: so many tasks, of so many weighted tokens."""

    tasks: float
    cost: float


class FairQueue:
    """Admitted tasks that wait for a slot. All but `__iter__` and `check` cost O(log n) in the number that waits.

    `push`, then `next` and `start`, `charge` while it runs, `settle` when it does not run any more; `remove` instead of
    `start` when it will not.
    """

    def __init__(self, policy: QueuePolicy) -> None:
        self._running: set[int] = set()
        self._begin(policy)

    def _begin(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self._levels = {priority: Level(priority, policy.level_weights[priority]) for priority in Priority}
        self._ranks = list(self._levels.values())
        self._length = 0
        self._virtual_time = 0.0
        self._bound = sum(policy.capacity.values())
        self._is_strict = policy.fairness is Fairness.STRICT
        self._by_deadline = policy.order is Order.EDF
        self._sheds = policy.full_policy[Priority.INTERACTIVE] is FullPolicy.SHED_LOW_PRIORITY

    def reconfigure(self, policy: QueuePolicy, running: Iterable[Task] = ()) -> None:
        """Hold by another policy from now on. Costs O(n log n) in the number that waits.

        Everything that waits goes on waiting, in order and beyond a smaller capacity, too; a queue that is then
        overfull is a full one. All counters begin anew, as what was charged by other weights and costs cannot be
        compared with what will be: a flow has been charged what its `running` tasks, those started and not settled,
        would have paid in advance for what is still to come of them. Refunds of that, too, are made at the new costs.
        """
        waiting = list(self)
        self._begin(policy)
        for task in running:
            self._charge_anew(task)
        levels = self._levels  # the least served first, as who begins to wait is lifted to the least served that waits
        waiting.sort(key=lambda task: (levels[task.priority].counter, self.counter(task.priority, task.key[0])))
        for task in waiting:
            self.push(task)

    def _charge_anew(self, task: Task) -> None:
        level = self._levels[task.priority]
        flow = level.flows.get(task.key[0])
        if flow is None:
            flow = level.add_flow(task.key[0], self._weight(task.key[0]), keep_arrivals=self._by_deadline)
        flow.running += 1
        cost = self.policy.output_cost * (task.charged_tokens - task.tokens_out)
        if task.has_paid_prompt and task.first_token_at is None:
            cost += self.policy.prompt_cost * task.prompt_tokens
        flow.counter += cost / flow.weight
        level.counter += cost / level.weight

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        """All that wait: the urgent level first, in each by admission."""
        for level in self._ranks:
            lanes = [lane for flow in level.flows.values() for lane in flow.lanes.values()]
            yield from sorted((task for lane in lanes for task in lane), key=lambda task: task.order)

    def depth(self, priority: Priority) -> int:
        """How many wait in this priority."""
        return self._levels[priority].depth

    def waiting(self, priority: Priority, tenant: str) -> int:
        """How many wait in this flow."""
        flow = self._levels[priority].flows.get(tenant)
        return 0 if flow is None else flow.waiting

    # Places: ORCH-3004, ORCH-3005

    def room_for(self, spec: TaskSpec) -> Room:
        """Is there a place for it, and at whose cost? Changes nothing.

        1. The queue is not full. 2. Its flow has less than its fair share of places: the flow furthest above its own
        gives one up. 3. Else the full policy of the priority decides within the flow.
        """
        level = self._levels[spec.priority]
        if level.depth < self._capacity(level):
            return _ROOM
        tenant = spec.key[0]
        flow = level.flows.get(tenant)
        if (victim := self._above_share(level, tenant, flow)) is not None:
            return Room(victim=victim, fault=_EVICTED)
        match self.policy.full_policy[spec.priority]:
            case FullPolicy.REJECT:
                return Room(refusal=_REJECT)
            case FullPolicy.DROP_LRU:
                victim = None if flow is None else flow.oldest()
                return Room(refusal=_NONE_TO_DROP) if victim is None else Room(victim=victim, fault=_DROPPED)
            case FullPolicy.SHED_LOW_PRIORITY:
                return self._shed(spec.priority, tenant)

    def share_of(self, priority: Priority, tenant: str) -> float:
        """The flow's fair share of the places, were it to wait: by weight among the flows that have tasks waiting."""
        level = self._levels[priority]
        return self.policy.capacity[priority] * self._part_of(level, tenant, level.flows.get(tenant))

    def share_of_service(self, task: Task) -> float:
        """The part of the route's service, above 0 and at most 1, that the task's flow gets while it and others wait.

        Under Fairness.STRICT that is what it gets when its level has its turn.
        """
        level = self._levels[task.priority]
        tenant = task.key[0]
        share = self._part_of(level, tenant, level.flows.get(tenant))
        if self._is_strict:
            return share
        rivals = sum([each.weight for each in self._ranks if each.active and each is not level])
        return share * level.weight / (level.weight + rivals)

    def _capacity(self, level: Level) -> int:
        """Places of the priority. What interactive tasks have shed, batch tasks lack."""
        own = self.policy.capacity[level.priority]
        if not self._sheds or level.priority is Priority.INTERACTIVE:
            return own
        return min(own, self._bound - (self._length - level.depth))

    def _above_share(self, level: Level, tenant: str, flow: Flow | None) -> Task | None:
        """Who gives up a place for the tenant: the newest of the flow that is, and then still is not, behind it."""
        waiting = 0 if flow is None else flow.waiting
        if waiting >= self._capacity(level) * self._part_of(level, tenant, flow):
            return None
        fullest = level.fullest()  # it is above its share, as all places are taken and this flow is below its own
        # Were the places merely swapped, the two would take them from each other for ever.
        if fullest is None or fullest.waiting / fullest.weight <= (waiting + 1) / self._weight(tenant):
            return None
        return fullest.newest()

    def _part_of(self, level: Level, tenant: str, flow: Flow | None) -> float:
        """The tenant's weight among those that have tasks waiting, itself included."""
        weight = self._weight(tenant)
        others = level.contending - (weight if flow is not None and flow.waiting else 0.0)
        return weight / (weight + max(0.0, others))

    def _shed(self, priority: Priority, tenant: str) -> Room:
        batch = self._levels[Priority.BATCH].flows.get(tenant)
        victim = batch.newest() if batch is not None and priority is Priority.INTERACTIVE else None
        return Room(refusal=_NONE_TO_SHED) if victim is None else Room(victim=victim, fault=_SHED)

    # Waiting

    def push(self, task: Task) -> None:
        """Let the task wait at the place that its flow's order gives it; sets `due` and `cost`.

        Does not ask for room: requeued tasks may exceed the capacity.
        """
        policy, spec = self.policy, task.spec
        tokens = spec.expected_tokens - task.tokens_out
        task.cost = policy.output_cost * max(1, tokens)
        if not task.has_paid_prompt:
            task.cost += policy.prompt_cost * spec.prompt_tokens
        if self._by_deadline:
            task.due = task.accepted_at + (policy.edf_default_s if spec.deadline_s is None else spec.deadline_s)
        else:
            task.due = task.order
        level = self._levels[spec.priority]
        flow = level.flows.get(spec.key[0])
        if flow is None:
            flow = level.add_flow(spec.key[0], self._weight(spec.key[0]), keep_arrivals=self._by_deadline)
        if not level.active:
            self._lift(level)
        level.push(flow, task)
        self._length += 1
        if flow.is_parked and self._by_deadline:  # it may be the first now, and smaller than the one that was
            self._unpark(level, flow)

    def remove(self, task: Task) -> None:
        """The task waits no more and will not start; raises KeyError when it did not wait."""
        level = self._levels[task.spec.priority]
        flow = level.flows[task.spec.key[0]]
        level.remove(flow, task)
        self._length -= 1
        if flow.is_parked:  # the task may be the one that was too big for the quota
            self._unpark(level, flow)
        level.retire(flow)

    def unpark(self, tenant: str) -> bool:
        """What kept the tenant's tasks from running was lifted; says whether flows take part again."""
        any_parked = False
        for level in self._ranks:
            flow = level.parked.get(tenant)
            if flow is not None:
                self._unpark(level, flow)
                any_parked = True
        return any_parked

    def _unpark(self, level: Level, flow: Flow) -> None:
        if not level.active:
            self._lift(level)
        level.unpark(flow)

    def is_parked(self, task: Task) -> bool:
        """Its flow takes no part until its tenant's quota is lifted."""
        flow = self._levels[task.priority].flows.get(task.key[0])
        return flow is not None and flow.is_parked

    def _lift(self, level: Level) -> None:
        """The level becomes active: to have been away gains no credit."""
        others = [each.counter for each in self._ranks if each.active]
        level.floor = min(others) if others else self._virtual_time
        level.counter = max(level.counter, level.floor)

    def _weight(self, tenant: str) -> float:
        return self.policy.weights.get(tenant, 1.0)

    # Turns: ORCH-3075, ORCH-3076

    def next(self, can_start: Callable[[Need], bool], may_run: Callable[[Task], bool]) -> Task | None:
        """The task whose turn it is among those that `can_start` somewhere; None when there is none.

        Of the levels the one served least (under Fairness.STRICT the most urgent), in it the flow served least, in that
        the first in order. A flow whose first task `may_run` refuses takes no part until `unpark`.
        """
        passed: Level | None = None
        for level in self._turns():
            if not level.active:
                continue
            task = level.next(can_start, may_run)
            if task is not None:
                if passed is not None and passed.active and not self._is_strict:
                    # It could not use its turn, and gains no credit by that.
                    passed.counter = max(passed.counter, level.counter)
                return task
            passed = level
        return None

    def _turns(self) -> list[Level]:
        first, second = self._ranks
        if self._is_strict or first.counter <= second.counter:
            return self._ranks
        return [second, first]

    def start(self, task: Task) -> None:
        """The task runs: it waits no more, and its flow is charged for the prompt and the output expected of it."""
        spec = task.spec
        level = self._levels[spec.priority]
        flow = level.flows[spec.key[0]]
        level.remove(flow, task)
        self._length -= 1
        self._running.add(task.order)
        flow.running += 1
        level.virtual_time = flow.counter
        self._virtual_time = level.counter
        task.charged_tokens = max(spec.expected_tokens, task.tokens_out)
        cost = self.policy.output_cost * (task.charged_tokens - task.tokens_out)
        if not task.has_paid_prompt:
            task.has_paid_prompt = True
            task.prompt_tokens = spec.prompt_tokens
            cost += self.policy.prompt_cost * spec.prompt_tokens
        flow.counter += cost / flow.weight
        level.counter += cost / level.weight

    def charge(self, task: Task) -> None:
        """More tokens were produced: charge those beyond what was expected."""
        excess = task.tokens_out - task.charged_tokens
        if excess > 0:
            task.charged_tokens = task.tokens_out
            self._bill(task, self.policy.output_cost * excess)

    def settle(self, task: Task, prompt_tokens: int | None = None, *, refund_prompt: bool = False) -> None:
        """The run is over: its flow has then paid for what was produced, and for the prompt as it was counted.

        `prompt_tokens`: as the engine counted them. `refund_prompt`: it ended before its first token and will be tried
        again. Idempotent.
        """
        if task.order not in self._running:
            return
        self._running.remove(task.order)
        cost = self.policy.output_cost * (task.tokens_out - task.charged_tokens)
        task.charged_tokens = task.tokens_out
        if task.has_paid_prompt and refund_prompt:
            task.has_paid_prompt = False
            cost -= self.policy.prompt_cost * task.prompt_tokens
        elif prompt_tokens is not None:
            cost += self.policy.prompt_cost * (prompt_tokens - task.prompt_tokens)
            task.prompt_tokens = prompt_tokens
        level = self._levels[task.spec.priority]
        flow = level.flows[task.spec.key[0]]
        flow.running -= 1
        if cost:
            self._bill(task, cost)
        level.retire(flow)

    def _bill(self, task: Task, cost: float) -> None:
        level = self._levels[task.spec.priority]
        flow = level.flows.get(task.spec.key[0])
        if flow is None:
            return
        level.charge(flow, cost)
        level.counter += cost / level.weight
        if cost < 0 and level.counter < level.floor:
            level.counter = level.floor

    # What is ahead: ORCH-3029

    def ahead(self, task: Task) -> Ahead:
        """What is to start before this waiting task, if all cost what is expected.

        Exact among the tasks of its flow and, with one flow in each level, of all; an estimate among the others.
        """
        level = self._levels[task.spec.priority]
        flow = level.flows[task.spec.key[0]]
        tasks, cost = flow.before(task.due, task.order)
        return self._ahead(level, flow, tasks, cost)

    def position(self, task: Task) -> int:
        """How many tasks are to start before this waiting one."""
        return round(self.ahead(task).tasks)

    def _ahead(self, level: Level, flow: Flow, own_tasks: float, own_cost: float) -> Ahead:
        tasks, cost = own_tasks, own_cost
        rivals = level.active - (flow.band is not None)
        if rivals:
            lead = max(0.0, flow.counter - (level.minimum() or 0.0))
            others = level.served_first(flow, own_cost / flow.weight + lead)
            tasks += others[0]
            cost += others[1]
        until = level.counter + cost / level.weight
        for other in self._ranks:
            if other is not level and other.active:
                more = self._ahead_in(other, level, until)
                tasks += more[0]
                cost += more[1]
        return Ahead(tasks, cost)

    def _ahead_in(self, other: Level, level: Level, until: float) -> tuple[float, float]:
        """What starts in the other level before this one has got `until` on its counter."""
        is_urgent = self._ranks.index(other) < self._ranks.index(level)
        if self._is_strict:
            return other.served_first(None, inf) if is_urgent else (0.0, 0.0)
        service = (until - other.counter) * other.weight
        if service < 0 or (service == 0 and not is_urgent):
            return 0.0, 0.0
        lane = other.only_lane()
        if lane is not None:
            return lane.reaching(service, is_inclusive=is_urgent)
        return other.part_of(service)

    # For tests

    def counter(self, priority: Priority, tenant: str) -> float:
        """What the flow was charged, in weighted tokens / weight; that of a forgotten flow is the virtual time."""
        level = self._levels[priority]
        flow = level.flows.get(tenant)
        return level.virtual_time if flow is None else flow.counter

    def level(self, priority: Priority) -> Level:
        """The flows of a priority, to be looked at."""
        return self._levels[priority]

    def check(self) -> Iterator[str]:
        """Say what does not add up. Costs O(tasks)."""
        for level in self._ranks:
            yield from broken_level(level)
        if self._length != sum([level.depth for level in self._ranks]):
            yield f"{self._length} tasks wait, by level {[level.depth for level in self._ranks]}"
        running = sum([flow.running for level in self._ranks for flow in level.flows.values()])
        if running != len(self._running):
            yield f"{len(self._running)} tasks run, by flow {running}"


def broken_level(level: Level) -> Iterator[str]:
    """Say what does not add up. Costs O(tasks)."""
    waiting = sum([flow.waiting for flow in level.flows.values()])
    active = [flow for flow in level.flows.values() if flow.waiting and not flow.is_parked]
    contending = sum([flow.weight for flow in level.flows.values() if flow.waiting])
    banded = sum([band.tasks for band in level.bands.values()])
    cost, weight = sum([b.backlog for b in level.bands.values()]), sum([b.weight for b in level.bands.values()])
    yield from _unequal("depth", level.depth, waiting)
    yield from _unequal("active flows", level.active, len(active))
    yield from _unequal("weight of waiting flows", level.contending, contending)
    yield from _unequal("tasks in bands", banded, sum([flow.waiting for flow in active]))
    yield from _unequal("backlog in bands", cost, sum([flow.backlog for flow in active]))
    yield from _unequal("weight in bands", weight, sum([flow.weight for flow in active]))
    yield from _unequal("parked flows", len(level.parked), sum([f.is_parked for f in level.flows.values()]))
    for flow in level.flows.values():
        yield from _broken_flow(flow)
    for turns in level.turns.values():
        entered = [flow.lanes[turns.need] for flow in active if flow.lanes.get(turns.need)]
        yield from _unequal(f"lanes for {turns.need}", turns.live, len(entered))
        if any(lane.entry not in turns.heap for lane in entered):
            yield f"lanes for {turns.need} without a turn"


def _broken_flow(flow: Flow) -> Iterator[str]:
    lanes = list(flow.lanes.values())
    yield from _unequal(f"waiting of {flow.tenant}", flow.waiting, sum(map(len, lanes)))
    yield from _unequal(f"backlog of {flow.tenant}", flow.backlog, sum([lane.cost for lane in lanes]))
    if any(lane.entry is not None and lane.entry[0] > flow.counter for lane in lanes):
        yield f"{flow.tenant} waits for a turn above its counter {flow.counter}"
    if flow.arrivals is not None:
        fresh = {task.order for lane in lanes for task in lane if not task.attempts}
        if fresh != set(flow.arrivals):
            yield f"{flow.tenant} has {fresh} that never ran, kept as {set(flow.arrivals)}"
    for lane in lanes:
        yield from lane.broken()


def _unequal(what: str, kept: float, true: float) -> Iterator[str]:
    if abs(kept - true) > 1e-6 * max(1.0, abs(true)):
        yield f"{what}: {kept}, in truth {true}"
