"""The scheduler of one route: a plain synchronous function of its state, `handle(event, now) -> commands`.

Owns the route's live tasks, its queue and its replicas; shares the Ledger with the other schedulers. It performs
nothing itself: whoever calls it performs the commands, in their order, before the next event is handled.
Three independent systems with this very job have this shape: dask's worker state machine, httpcore's pool, llama-swap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llorch.domain import events as ev
from llorch.domain.faults import (
    CANCELED,
    LATE,
    REPLICA_FAULTS,
    RETRIED_FAULTS,
    SESSION_DELETED,
    SHUTDOWN,
    STRANDED,
    UNREAD,
)
from llorch.domain.invariants import Parts, broken_invariants
from llorch.domain.ledger import Ledger
from llorch.domain.pool import Fleet, Replica, ReplicaState
from llorch.domain.queue import TaskQueue
from llorch.domain.task import (
    ANYWHERE,
    EXACT,
    Attempt,
    Fault,
    Need,
    Priority,
    SessionKey,
    Task,
    TaskKey,
    TaskSpec,
    TaskState,
    WaitReason,
)
from llorch.domain.timers import Timer, Timers
from llorch.errors import AdmissionReject, DecodeTimeout, ReplicaExhausted


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """How a route treats its tasks. Times in seconds; `attempts` is the most runs of one task before a first token."""

    capacity: Mapping[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 256))
    wall_s: float = 600.0
    unread_grace_s: float = 10.0
    attempts: int = 3


class Scheduler:
    """Decides admission, order, placement and the end of every task of one route."""

    def __init__(self, policy: RoutePolicy, ledger: Ledger) -> None:
        self.policy = policy
        self.ledger = ledger
        self.queue = TaskQueue(policy.capacity)
        self.fleet = Fleet(ledger)
        self.tasks: dict[TaskKey, Task] = {}
        self.attempts: dict[int, Attempt] = {}
        self.sessions: dict[SessionKey, set[TaskKey]] = {}
        self._timers = Timers()
        self._last_order = 0
        self._closing: Fault | None = None

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take in a fact and answer with the orders that follow. `now` is in seconds, never smaller than before."""
        match event:
            case ev.FirstToken() | ev.TokensProduced() | ev.FollowerJoined() | ev.FollowerLeft():
                self._note(event, now)
                return []
            case _:
                return [*self._decide(event, now), *self._fire_timers(now), *self._start_tasks(now)]

    def _note(self, event: ev.FirstToken | ev.TokensProduced | ev.FollowerJoined | ev.FollowerLeft, now: float) -> None:
        """Take in what calls for no order now."""
        match event:
            case ev.TokensProduced():
                self._count_tokens(event)
            case ev.FirstToken():
                self._note_first_token(event, now)
            case ev.FollowerJoined():
                self._join(event.task)
            case ev.FollowerLeft():
                self._leave(event.task, now)

    def _decide(self, event: ev.Deciding, now: float) -> list[ev.Command]:
        match event:
            case ev.TaskSubmitted():
                return self._submit(event.spec, now)
            case ev.AttemptStalled():
                return self._stall_attempt(event, now)
            case ev.AttemptEnded():
                return self._end_attempt(event, now)
            case ev.CancelRequested():
                return self._finish(event.task, TaskState.CANCELED, CANCELED, now)
            case ev.ReplicaChanged():
                return self._change_replica(event.replica, now)
            case ev.SessionDeleted():
                return self._delete_session(event.session, now)
            case ev.ShutdownRequested():
                return self._shut_down(event.grace_s, now)
            case ev.Tick():
                return []

    def next_wakeup(self) -> float | None:
        """When a Tick is due, in the same seconds as `now`; None while nothing waits for time to pass."""
        return self._timers.next_at()

    def wait_reason(self, task: Task) -> WaitReason:
        """Why a queued task has not started."""
        ready = [replica for replica in self.fleet if replica.state is ReplicaState.READY]
        if not ready:
            return WaitReason.NO_READY_REPLICA
        if not any(replica.meets(task.need) for replica in ready):
            return WaitReason.NO_EXACT_REPLICA
        return WaitReason.TASKS_AHEAD if self.queue.position(task) else WaitReason.SLOTS_BUSY

    # Admission

    def _submit(self, spec: TaskSpec, now: float) -> list[ev.Command]:
        fault = self._refusal(spec, now)
        if fault is not None:
            return [ev.Reject(spec.key, fault)]
        self._last_order += 1
        task = Task(spec, self._last_order, accepted_at=now, need=EXACT if spec.strict else ANYWHERE)
        self.ledger.sessions.take_turn(spec.session, now)
        self.tasks[task.key] = task
        self.sessions.setdefault(spec.session, set()).add(task.key)
        self.queue.push(task)
        if spec.deadline_s is not None:
            self._timers.set(task.key, Timer.DEADLINE, now + spec.deadline_s)
        return [ev.Admit(task, self.queue.position(task))]

    def _refusal(self, spec: TaskSpec, now: float) -> Fault | None:
        if self._closing is not None:
            return self._closing
        if not self.fleet.can_serve(EXACT if spec.strict else ANYWHERE):
            return STRANDED
        if self.queue.is_full(spec.priority):
            waiting = self.queue.depth(spec.priority)
            return Fault(AdmissionReject, f"{waiting} {spec.priority} tasks wait already", policy_label="reject")
        return self.ledger.sessions.refusal(spec.session, now)

    # Placement

    def _start_tasks(self, now: float) -> list[ev.Command]:
        commands: list[ev.Command] = []
        while len(self.queue) and (free := self.fleet.free()):
            task = self.queue.head(lambda need: any(replica.meets(need) for replica in free))
            if task is None:
                break
            commands.append(self._start(task, self.fleet.least_loaded(free, task.need), now))
        return commands

    def _start(self, task: Task, replica: Replica, now: float) -> ev.Start:
        self.queue.remove(task)
        lease = self.ledger.hold_slot(replica.replica_id)
        attempt = Attempt(lease.attempt_id, task.key, replica.replica_id, lease.slot, started_at=now)
        self.attempts[attempt.attempt_id] = attempt
        task.move(TaskState.RUNNING)
        task.attempt = attempt
        task.attempts += 1
        if task.started_at is None:
            task.started_at = now
        if task.spec.strict:
            task.need = Need(exact=True, cohort=replica.cohort)
        self._timers.set(task.key, Timer.WALL, now + self.policy.wall_s)
        return ev.Start(task, attempt)

    def _change_replica(self, replica: Replica, now: float) -> list[ev.Command]:
        """Take the news over; tasks that no replica can ever take any more have waited in vain."""
        self.fleet.put(replica)
        stranded = [task.key for task in self.queue if not self.fleet.can_serve(task.need)]
        return self._finish_each(stranded, TaskState.FAILED, STRANDED, now)

    # What runs report

    def _note_first_token(self, event: ev.FirstToken, now: float) -> None:
        task = self.running(event.task, event.attempt_id)
        if task is not None and task.attempt is not None:
            task.attempt.has_token = True
            task.first_token_at = now

    def _count_tokens(self, event: ev.TokensProduced) -> None:
        task = self.running(event.task, event.attempt_id)
        if task is not None:
            task.tokens_out += event.count

    def _stall_attempt(self, event: ev.AttemptStalled, now: float) -> list[ev.Command]:
        """The task has its answer at once; the slot is free only when the engine let go."""
        attempt = self.attempts.get(event.attempt_id)
        if attempt is None or self.running(event.task, event.attempt_id) is None:
            return []
        self.fleet.suspect(attempt.replica_id)
        return self._finish(event.task, TaskState.FAILED, event.fault, now)

    def _end_attempt(self, event: ev.AttemptEnded, now: float) -> list[ev.Command]:
        attempt = self.attempts.pop(event.attempt_id, None)
        if attempt is None:
            return []
        self.ledger.settle_slot(attempt.attempt_id)
        if event.fault is not None and issubclass(event.fault.kind, REPLICA_FAULTS):
            self.fleet.suspect(attempt.replica_id)
        task = self.running(attempt.task, attempt.attempt_id)
        if task is None:
            return []
        task.attempt = None
        if event.fault is None:
            return self._finish(task.key, TaskState.SUCCEEDED, None, now)
        return self._retry_or_fail(task, attempt, event.fault, now)

    def _retry_or_fail(self, task: Task, attempt: Attempt, fault: Fault, now: float) -> list[ev.Command]:
        """1. Not to be retried: the end. 2. Going away. 3. Late. 4. Tried enough. 5. Nowhere to go. 6. Try again."""
        if attempt.has_token or not issubclass(fault.kind, RETRIED_FAULTS):
            return self._finish(task.key, TaskState.FAILED, fault, now)
        if self._closing is not None:
            return self._finish(task.key, TaskState.FAILED, self._closing, now)
        if task.is_late:
            return self._finish(task.key, TaskState.FAILED, LATE, now)
        if task.attempts >= self.policy.attempts:
            exhausted = Fault(ReplicaExhausted, f"{task.attempts} attempts failed, the last one: {fault.message}")
            return self._finish(task.key, TaskState.FAILED, exhausted, now)
        if not self.fleet.can_serve(task.need):
            return self._finish(task.key, TaskState.FAILED, STRANDED, now)
        task.move(TaskState.QUEUED)
        self._timers.clear(task.key, Timer.WALL)
        self.queue.push(task)
        return [ev.Requeue(task, fault)]

    # Readers

    def _join(self, key: TaskKey) -> None:
        task = self.tasks.get(key)
        if task is not None:
            task.readers += 1
            self._timers.clear(key, Timer.UNREAD)

    def _leave(self, key: TaskKey, now: float) -> None:
        task = self.tasks.get(key)
        if task is not None and task.readers:
            task.readers -= 1
            if task.readers == 0 and task.spec.cancel_unread:
                self._timers.set(key, Timer.UNREAD, now + self.policy.unread_grace_s)

    # Ends

    def _finish(self, key: TaskKey, state: TaskState, fault: Fault | None, now: float) -> list[ev.Command]:
        """End a live task; the slot of one that runs stays taken until its AttemptEnded."""
        task = self.tasks.pop(key, None)
        if task is None:
            return []
        attempt, task.attempt = task.attempt, None
        if task.state is TaskState.QUEUED:
            self.queue.remove(task)
        task.move(state)
        task.fault = fault
        task.ended_at = now
        self._timers.clear_all(key)
        self._leave_session(task)
        commands: list[ev.Command] = [ev.Finish(task)]
        if attempt is not None:
            self.ledger.release_slot(attempt.attempt_id)
            commands.append(ev.Abort(attempt))
        return commands

    def _leave_session(self, task: Task) -> None:
        keys = self.sessions[task.spec.session]
        keys.discard(task.key)
        if not keys:
            del self.sessions[task.spec.session]

    def _delete_session(self, session: SessionKey, now: float) -> list[ev.Command]:
        self.ledger.sessions.forget(session)
        keys = sorted(self.sessions.get(session, ()), key=lambda key: self.tasks[key].order)
        return self._finish_each(keys, TaskState.CANCELED, SESSION_DELETED, now)

    def _shut_down(self, grace_s: float, now: float) -> list[ev.Command]:
        self._closing = SHUTDOWN
        for task in self.tasks.values():
            if task.state is TaskState.RUNNING:
                self._timers.set(task.key, Timer.SHUTDOWN, now + grace_s)
        return self._finish_each([task.key for task in self.queue], TaskState.FAILED, SHUTDOWN, now)

    def _finish_each(self, keys: list[TaskKey], state: TaskState, fault: Fault, now: float) -> list[ev.Command]:
        return [command for key in keys for command in self._finish(key, state, fault, now)]

    # Time

    def _fire_timers(self, now: float) -> list[ev.Command]:
        commands: list[ev.Command] = []
        for key, timer in self._timers.pop_due(now):
            task = self.tasks.get(key)
            if task is not None:
                commands += self._time_out(task, timer, now)
        return commands

    def _time_out(self, task: Task, timer: Timer, now: float) -> list[ev.Command]:
        match timer:
            case Timer.DEADLINE:
                task.is_late = True
                if task.state is TaskState.RUNNING and not task.spec.abort_late:
                    return []
                return self._finish(task.key, TaskState.FAILED, LATE, now)
            case Timer.WALL:
                fault = Fault(DecodeTimeout, f"the attempt ran for {self.policy.wall_s:g} s, the longest allowed")
                return self._finish(task.key, TaskState.FAILED, fault, now)
            case Timer.UNREAD:
                return self._finish(task.key, TaskState.CANCELED, UNREAD, now)
            case Timer.SHUTDOWN:
                return self._finish(task.key, TaskState.FAILED, SHUTDOWN, now)

    def running(self, key: TaskKey, attempt_id: int) -> Task | None:
        """The task, if this attempt is still the one that runs it."""
        task = self.tasks.get(key)
        if task is None or task.attempt is None or task.attempt.attempt_id != attempt_id:
            return None
        return task

    # For tests

    def check_invariants(self) -> None:
        """Raise AssertionError naming what does not add up. Costs O(tasks)."""
        parts = Parts(self.tasks, self.attempts, self.sessions, self.queue, self.fleet, self.ledger)
        for broken in broken_invariants(parts):
            raise AssertionError(broken)
