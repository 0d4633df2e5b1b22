"""What a scheduler may say, kept apart from how it decides: a model that follows its commands and objects.

It knows only events and commands, and asks the scheduler for nothing but its leases and tasks.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.policy import NO_QUOTA, Order, Quota, RoutePolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Attempt, Cohort, Fault, Need, Priority, Task, TaskKey, TaskState
from llorch.errors import DecodeTimeout, LlorchError, PoolUnready, WorkerReset

RETRIED: tuple[type[LlorchError], ...] = (WorkerReset, PoolUnready)
SUSPICIOUS: tuple[type[LlorchError], ...] = (*RETRIED, DecodeTimeout)
ATTEMPTS = 3


@dataclass
class Run:
    """An attempt between its Start and its AttemptEnded."""

    task: Task
    replica_id: str
    slot: int
    wall_s: float
    epoch: int
    has_token: bool = False
    is_aborted: bool = False
    is_preempted: bool = False
    is_moved: bool = False

    @property
    def waits_again(self) -> bool:
        """It was told to stop, and its task goes on later."""
        return self.is_preempted or self.is_moved


@dataclass
class Model:
    """The world as the events and commands so far tell it."""

    policy: RoutePolicy
    quotas: dict[str, Quota] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    live: dict[TaskKey, Task] = field(default_factory=dict)
    waiting: dict[TaskKey, Task] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    ended: dict[int, Run] = field(default_factory=dict)
    pins: dict[int, Cohort] = field(default_factory=dict)
    admitted: list[Task] = field(default_factory=list)
    finishes: Counter[int] = field(default_factory=Counter)
    preemptions: Counter[int] = field(default_factory=Counter)
    moves: Counter[int] = field(default_factory=Counter)
    overhang: Counter[Priority] = field(default_factory=Counter)
    epoch: int = 0
    limited_since: Counter[tuple[str, str]] = field(default_factory=Counter)
    vacated: str | None = None
    is_closing: bool = False

    # Events, before the scheduler has handled them

    def take(self, event: ev.Event) -> None:
        """What the event by itself changes."""
        self.vacated = event.replica_id if isinstance(event, ev.ReplicaVacated) else None
        match event:
            case ev.ReplicaRemoved(replica_id):
                self.replicas.pop(replica_id, None)
            case ev.ConfigChanged(policy):
                self.policy = policy
                self.overhang = self._fresh()
            case ev.ReplicaChanged(told):
                self.replicas[told.replica_id] = told
            case ev.ShutdownRequested():
                self.is_closing = True
            case ev.FirstToken(_, attempt_id) if attempt_id in self.runs:
                self.runs[attempt_id].has_token = True
            case ev.AttemptStalled(key, attempt_id, fault) if attempt_id in self.runs:
                run = self.runs[attempt_id]
                if self.live.get(key) is run.task:
                    self._suspect(run.replica_id, fault)
            case ev.AttemptEnded(_, attempt_id, fault) if attempt_id in self.runs:
                run = self.ended[attempt_id] = self.runs.pop(attempt_id)
                self._suspect(run.replica_id, fault)

    def take_quotas(self, quotas: dict[str, Quota]) -> None:
        """Other quotas from now on. A limit that there was not before knows nothing of what runs."""
        self.epoch += 1
        for tenant, quota in quotas.items():
            before = self.quotas.get(tenant, NO_QUOTA)
            for limit in ("max_concurrent", "kv_tokens"):
                if getattr(before, limit) is None and getattr(quota, limit) is not None:
                    self.limited_since[tenant, limit] = self.epoch
        self.quotas = quotas

    def _suspect(self, replica_id: str, fault: Fault | None) -> None:
        known = self.replicas.get(replica_id)
        if known is None or known.state is not ReplicaState.READY:
            return
        if fault is not None and issubclass(fault.kind, SUSPICIOUS):
            self.replicas[replica_id] = replace(known, state=ReplicaState.UNREADY)

    # Commands, in their order

    def follow(self, event: ev.Event, commands: list[ev.Command], now: float) -> None:
        """Object to what must not be said, and take over the rest."""
        for command in commands:
            match command:
                case ev.Admit(task, position, _):
                    self._admit(event, task, position, len(commands))
                case ev.Reject(key, _):
                    assert isinstance(event, ev.TaskSubmitted)
                    assert event.spec.key == key
                case ev.Start(task, attempt):
                    self._start(task, attempt, now)
                case ev.Requeue(task, fault):
                    self._requeue(event, task, fault)
                case ev.Finish(task):
                    self._finish(task)
                case ev.Abort(attempt):
                    self._abort(attempt)

    def _abort(self, attempt: Attempt) -> None:
        run = self.runs[attempt.attempt_id]
        assert not run.is_aborted, "aborted twice"
        run.is_aborted = True
        if attempt.broken_off is not None and attempt.broken_off.policy_label == "moved":
            self._move(run)
        elif attempt.broken_off is not None:
            self._preempt(run)
        else:
            assert self.finishes[run.task.order] == 1, "aborted, but the task has not ended"

    def _move(self, run: Run) -> None:
        """ORCH-3158."""
        run.is_moved = True
        self.moves[run.task.order] += 1
        assert run.replica_id == self.vacated, "moved without need"
        assert self.can_move(run), "moved to nowhere"

    def can_move(self, run: Run) -> bool:
        """Some replica may go on with it."""
        task = run.task
        if task.first_token_at is not None and not task.spec.strict and not task.spec.can_continue:
            return False
        return any(r.meets(self._need(task)) and r.may_serve for r in self.replicas.values())

    def stays(self, replica_id: str) -> list[Run]:
        """What runs there and has not been told to stop."""
        return [run for run in self.runs.values() if run.replica_id == replica_id and not run.is_aborted]

    def _preempt(self, run: Run) -> None:
        """ORCH-3085..3087."""
        run.is_preempted = True
        policy, task = self.policy.preemption, run.task
        self.preemptions[task.order] += 1
        assert policy.hard
        assert task.priority is Priority.BATCH
        assert self.preemptions[task.order] <= policy.per_task
        assert 2 * task.tokens_out <= task.spec.expected_tokens, "past half of its progress"
        assert task.spec.strict or task.spec.can_continue
        assert task.priority not in policy.protected
        assert self.replicas[run.replica_id].can_interrupt
        assert self.replicas[run.replica_id].state is ReplicaState.READY, "made room where nothing starts"
        urgent = [waiting for waiting in self.waiting.values() if waiting.priority is Priority.INTERACTIVE]
        assert sum(other.is_preempted for other in self.runs.values()) <= len(urgent), "more room than is needed"

    def _admit(self, event: ev.Event, task: Task, position: int, commands: int) -> None:
        assert isinstance(event, ev.TaskSubmitted)
        assert not self.is_closing
        assert task.key not in self.live
        assert 0 <= position <= len(self.waiting)
        if commands == 1:
            self.check_bounds(extra=task)
        assert all(task.order > earlier.order for earlier in self.admitted)
        self.live[task.key] = self.waiting[task.key] = task
        self.admitted.append(task)

    def _start(self, task: Task, attempt: Attempt, now: float) -> None:
        assert self.waiting.pop(task.key) is task, "started what did not wait"
        target = self.replicas[attempt.replica_id]
        assert target.state is ReplicaState.READY
        need = self._need(task)
        assert target.meets(need), "started where it may not run"
        others = [run for run in self.runs.values() if run.replica_id == attempt.replica_id]
        assert len(others) < target.slots, "more attempts than slots"
        assert attempt.slot in set(range(max(target.slots, attempt.slot + 1))) - {run.slot for run in others}
        assert attempt.attempt_id > max((*self.runs, *self.ended), default=0)
        assert task.attempts <= ATTEMPTS + self.preemptions[task.order] + self.moves[task.order]
        assert attempt.tokens_before == task.tokens_out
        deadline_s = task.spec.deadline_s
        assert deadline_s is None or task.accepted_at + deadline_s > now, "started after its deadline"
        assert self.has_room(task), "started beyond its tenant's quota"
        for waiting in self.waiting.values():
            if self._flow(waiting) == self._flow(task) and self._rank(waiting) < self._rank(task):
                assert not target.meets(self._need(waiting)), "overtook one of its flow that could have used this slot"
        self.runs[attempt.attempt_id] = Run(task, attempt.replica_id, attempt.slot, self.policy.wall_s, self.epoch)
        if task.spec.strict:
            assert self.pins.setdefault(task.order, target.cohort) == target.cohort, "left its cohort"

    def has_room(self, task: Task) -> bool:
        """The tenant may run one more."""
        quota = self.quotas.get(task.key[0], NO_QUOTA)
        running = self._counted(task.key[0], "max_concurrent")
        if quota.max_concurrent is not None and len(running) >= quota.max_concurrent:
            return False
        used = sum(map(_kv_tokens, self._counted(task.key[0], "kv_tokens")))
        return quota.kv_tokens is None or not used or used + _kv_tokens(task) <= quota.kv_tokens

    def _counted(self, tenant: str, limit: str) -> list[Task]:
        since = self.limited_since[tenant, limit]
        return [run.task for run in self.runs.values() if run.task.key[0] == tenant and run.epoch >= since]

    def _requeue(self, event: ev.Event, task: Task, fault: Fault) -> None:
        assert isinstance(event, ev.AttemptEnded)
        run = self.ended[event.attempt_id]
        assert run.task is task
        if run.waits_again:
            assert fault.policy_label == ("moved" if run.is_moved else "preempted")
        else:
            assert not run.has_token
            assert not run.is_aborted
            assert issubclass(fault.kind, RETRIED)
        assert not self.is_closing
        self.waiting[task.key] = task

    def _finish(self, task: Task) -> None:
        assert self.live.pop(task.key) is task
        self.waiting.pop(task.key, None)
        self.finishes[task.order] += 1
        assert self.finishes[task.order] == 1, "finished twice"
        assert task.state.is_final
        assert (task.state is TaskState.SUCCEEDED) == (task.fault is None)

    # What holds between events

    def check(self, ledger: Ledger, now: float) -> None:
        """Object to a state that must not last beyond an event."""
        leases = {lease.attempt_id: (lease.replica_id, lease.slot, lease.releasing) for lease in ledger.leases()}
        assert leases == {
            number: (run.replica_id, run.slot, run.task.key not in self.live or run.is_aborted)
            for number, run in self.runs.items()
        }
        assert not (self.is_closing and self.waiting)
        for task in self.waiting.values():
            need = self._need(task)
            is_waiting_in_vain = not any(r.meets(need) and r.may_serve for r in self.replicas.values())
            assert not is_waiting_in_vain
            if self._has_turn(task):
                assert not any(known.meets(need) for known in self._free()), f"{task.key} waits beside a free slot"
        running = [run.task.order for run in self.runs.values() if run.waits_again or not run.is_aborted]
        running = [order for order in running if self.finishes[order] == 0]
        assert len(running) == len(set(running)), "two attempts at one task"
        assert sorted(running) == sorted(t.order for k, t in self.live.items() if k not in self.waiting)

    def _has_turn(self, task: Task) -> bool:
        """Nobody of its flow that waits before it keeps it from starting by a quota that has no room for either."""
        flow = [each for each in self.waiting.values() if self._flow(each) == self._flow(task)]
        return all(self.has_room(each) for each in flow if self._rank(each) <= self._rank(task))

    def check_bounds(self, extra: Task | None = None) -> None:
        """No more wait than have places, but for those that wait again, or waited when the queue became smaller."""
        fresh = self._fresh(extra)
        for priority, capacity in self.policy.queue.capacity.items():
            assert fresh[priority] <= max(capacity, self.overhang[priority]), f"more {priority} than have places"
        if extra is None:
            self.overhang &= fresh

    def _fresh(self, extra: Task | None = None) -> Counter[Priority]:
        """How many wait that never ran."""
        waiting = [task for task in [*self.waiting.values(), extra] if task is not None]
        return Counter(task.priority for task in waiting if not task.attempts)

    def check_time(self, now: float) -> None:
        """Object to what should have ended by now; after events that fire timers."""
        for task in self.live.values():
            if task.spec.deadline_s is not None and (task.key in self.waiting or task.spec.abort_late):
                assert task.accepted_at + task.spec.deadline_s > now
            if task.attempt is not None:
                assert task.attempt.started_at + self.runs[task.attempt.attempt_id].wall_s > now

    def _need(self, task: Task) -> Need:
        pin = self.pins.get(task.order)
        return Need(exact=task.spec.strict, cohort=pin)

    def _flow(self, task: Task) -> tuple[Priority, str]:
        return task.priority, task.key[0]

    def _rank(self, task: Task) -> tuple[float, int]:
        """The order within a flow."""
        if self.policy.queue.order is Order.FIFO:
            return 0.0, task.order
        deadline_s = task.spec.deadline_s
        return task.accepted_at + (self.policy.queue.edf_default_s if deadline_s is None else deadline_s), task.order

    def _free(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.state is ReplicaState.READY and self._load(r) < 1]

    def _load(self, known: Replica) -> float:
        return sum(run.replica_id == known.replica_id for run in self.runs.values()) / known.slots


def _kv_tokens(task: Task) -> int:
    return task.spec.prompt_tokens + task.spec.max_tokens
