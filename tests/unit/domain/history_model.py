"""What a scheduler may say, kept apart from how it decides: a model that follows its commands and objects.

It knows only events and commands, and asks the scheduler for nothing but its leases and tasks.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Cohort, Fault, Need, Priority, Task, TaskKey, TaskState
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
    has_token: bool = False
    is_aborted: bool = False


@dataclass
class Model:
    """The world as the events and commands so far tell it."""

    capacity: dict[Priority, int]
    replicas: dict[str, Replica] = field(default_factory=dict)
    live: dict[TaskKey, Task] = field(default_factory=dict)
    waiting: dict[TaskKey, Task] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    ended: dict[int, Run] = field(default_factory=dict)
    pins: dict[int, Cohort] = field(default_factory=dict)
    admitted: list[Task] = field(default_factory=list)
    finishes: Counter[int] = field(default_factory=Counter)
    is_closing: bool = False

    # Events, before the scheduler has handled them

    def take(self, event: ev.Event) -> None:
        """What the event by itself changes."""
        match event:
            case ev.ReplicaChanged(told):
                self.replicas[told.replica_id] = told
            case ev.ShutdownRequested():
                self.is_closing = True
            case ev.FirstToken(_, attempt_id) if attempt_id in self.runs:
                self.runs[attempt_id].has_token = True
            case ev.AttemptStalled(key, attempt_id, fault) if attempt_id in self.runs:
                run = self.runs[attempt_id]
                if self.live.get(key) is run.task and not run.is_aborted:
                    self._suspect(run.replica_id, fault)
            case ev.AttemptEnded(_, attempt_id, fault) if attempt_id in self.runs:
                run = self.ended[attempt_id] = self.runs.pop(attempt_id)
                self._suspect(run.replica_id, fault)

    def _suspect(self, replica_id: str, fault: Fault | None) -> None:
        known = self.replicas[replica_id]
        if fault is not None and issubclass(fault.kind, SUSPICIOUS) and known.state is ReplicaState.READY:
            self.replicas[replica_id] = replace(known, state=ReplicaState.UNREADY)

    # Commands, in their order

    def follow(self, event: ev.Event, commands: list[ev.Command], now: float) -> None:
        """Object to what must not be said, and take over the rest."""
        for command in commands:
            match command:
                case ev.Admit(task, position):
                    self._admit(event, task, position)
                case ev.Reject(key, _):
                    assert isinstance(event, ev.TaskSubmitted)
                    assert event.spec.key == key
                case ev.Start(task, attempt):
                    self._start(task, attempt.attempt_id, attempt.replica_id, attempt.slot, now)
                case ev.Requeue(task, fault):
                    self._requeue(event, task, fault)
                case ev.Finish(task):
                    self._finish(task)
                case ev.Abort(attempt):
                    run = self.runs[attempt.attempt_id]
                    assert not run.is_aborted, "aborted twice"
                    assert self.finishes[run.task.order] == 1, "aborted, but the task has not ended"
                    run.is_aborted = True

    def _admit(self, event: ev.Event, task: Task, position: int) -> None:
        assert isinstance(event, ev.TaskSubmitted)
        assert not self.is_closing
        assert task.key not in self.live
        level = [waiting for waiting in self.waiting.values() if waiting.priority is task.priority]
        assert len(level) < self.capacity[task.priority], "admitted to a full queue"
        ahead = [waiting for waiting in self.waiting.values() if self._rank(waiting) < self._rank(task)]
        assert position == len(ahead)
        assert all(task.order > earlier.order for earlier in self.admitted)
        self.live[task.key] = self.waiting[task.key] = task
        self.admitted.append(task)

    def _start(self, task: Task, attempt_id: int, replica_id: str, slot: int, now: float) -> None:
        assert self.waiting.pop(task.key) is task, "started what did not wait"
        target = self.replicas[replica_id]
        assert target.state is ReplicaState.READY
        need = self._need(task)
        assert target.meets(need), "started where it may not run"
        others = [run for run in self.runs.values() if run.replica_id == replica_id]
        assert len(others) < target.slots, "more attempts than slots"
        assert slot in set(range(target.slots)) - {run.slot for run in others}
        assert attempt_id > max((*self.runs, *self.ended), default=0)
        assert task.attempts <= ATTEMPTS
        deadline_s = task.spec.deadline_s
        assert deadline_s is None or task.accepted_at + deadline_s > now, "started after its deadline"
        for waiting in self.waiting.values():
            if self._rank(waiting) < self._rank(task):
                assert not target.meets(self._need(waiting)), "overtook one that could have used this slot"
        best = min(self._load(known) for known in self._free() if known.meets(need))
        assert self._load(target) == best, "not the least loaded"
        self.runs[attempt_id] = Run(task, replica_id, slot)
        if task.spec.strict:
            assert self.pins.setdefault(task.order, target.cohort) == target.cohort, "left its cohort"

    def _requeue(self, event: ev.Event, task: Task, fault: Fault) -> None:
        assert isinstance(event, ev.AttemptEnded)
        run = self.ended[event.attempt_id]
        assert run.task is task
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
            assert not any(known.meets(need) for known in self._free()), f"{task.key} waits beside a free slot"
            assert any(known.meets(need) and not known.state.is_gone for known in self.replicas.values()), "in vain"
        running = [run.task.order for run in self.runs.values() if not run.is_aborted]
        assert len(running) == len(set(running)), "two attempts at one task"
        assert sorted(running) == sorted(t.order for k, t in self.live.items() if k not in self.waiting)

    def check_time(self, now: float, wall_s: float) -> None:
        """Object to what should have ended by now; after events that fire timers."""
        for task in self.live.values():
            if task.spec.deadline_s is not None and (task.key in self.waiting or task.spec.abort_late):
                assert task.accepted_at + task.spec.deadline_s > now
            assert task.attempt is None or task.attempt.started_at + wall_s > now

    def _need(self, task: Task) -> Need:
        pin = self.pins.get(task.order)
        return Need(exact=task.spec.strict, cohort=pin)

    def _rank(self, task: Task) -> tuple[int, int]:
        return list(Priority).index(task.priority), task.order

    def _free(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.state is ReplicaState.READY and self._load(r) < 1]

    def _load(self, known: Replica) -> float:
        return sum(run.replica_id == known.replica_id for run in self.runs.values()) / known.slots
