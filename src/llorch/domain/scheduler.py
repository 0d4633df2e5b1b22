"""The scheduler of one route: a plain synchronous function of its state, `handle(event, now) -> commands`.

Owns the route's live tasks, its queue and its replicas; shares the Ledger with the other schedulers. It performs
nothing itself: whoever calls it performs the commands, in their order, before the next event is handled.
Three independent systems with this very job have this shape: dask's worker state machine, httpcore's pool, llama-swap.
"""

from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.admission import Admission
from llorch.domain.fair_queue import FairQueue
from llorch.domain.faults import (
    CANCELED,
    DRAINED,
    HOPELESS,
    LATE,
    MOVED,
    PREEMPTED,
    RETRIED_FAULTS,
    SESSION_DELETED,
    SHUTDOWN,
    STRANDED,
    TIME_SPENT,
    UNREAD,
)
from llorch.domain.forecast import Forecast
from llorch.domain.invariants import Parts, broken_invariants
from llorch.domain.ledger import Ledger, Use
from llorch.domain.policy import RoutePolicy
from llorch.domain.pool import Fleet, Replica, ReplicaState
from llorch.domain.runs import Runs
from llorch.domain.task import (
    Attempt,
    Estimate,
    Fault,
    Priority,
    SessionKey,
    Task,
    TaskKey,
    TaskSpec,
    TaskState,
    WaitReason,
)
from llorch.domain.timers import Timer, Timers
from llorch.errors import DecodeTimeout, ReplicaExhausted


class Scheduler:
    """Decides admission, order, placement and the end of every task of one route."""

    def __init__(self, policy: RoutePolicy, ledger: Ledger) -> None:
        self.policy = policy
        self.ledger = ledger
        self.queue = FairQueue(policy.queue)
        self.fleet = Fleet(ledger)
        self.forecast = Forecast(self.queue, self.fleet)
        self.runs = Runs(policy, self.queue, self.fleet, ledger, self.forecast)
        self.attempts = self.runs.attempts
        self.tasks: dict[TaskKey, Task] = {}
        self.sessions: dict[SessionKey, set[TaskKey]] = {}
        self._admission = Admission(policy, self.queue, self.fleet, ledger, self.forecast)
        self._timers = Timers()
        self._last_order = 0
        self._closing: Fault | None = None
        self._closes_at = 0.0

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take in a fact and answer with the orders that follow. `now` is in seconds, never smaller than before."""
        if isinstance(event, ev.TokensProduced):  # no match: two thirds of all events are this or the next
            self.runs.note_tokens(event)
            return []
        if isinstance(event, ev.FirstToken):
            self.runs.note_first_token(event, now)
            return []
        if isinstance(event, ev.FollowerJoined):
            self._join(event.task)
            return []
        if isinstance(event, ev.FollowerLeft):
            self._leave(event.task, now)
            return []
        commands = self._decide(event, now)
        self._fire_timers(now, commands)
        if len(self.queue):
            self._start_tasks(now, commands)
        self.runs.evict_idle(commands)
        return commands

    def _decide(self, event: ev.Deciding, now: float) -> list[ev.Command]:  # noqa: C901, PLR0912 (one case for each event)
        match event:
            case ev.TaskSubmitted():
                return self._submit(event.spec, now)
            case ev.AttemptEnded():
                return self._end_attempt(event, now)
            case ev.AttemptStalled():
                return self._stall_attempt(event, now)
            case ev.CancelRequested():
                return self._finish(event.task, TaskState.CANCELED, CANCELED, now)
            case ev.ReplicaChanged():
                return self._change_replica(event.replica, now)
            case ev.ReplicaVacated():
                return self._vacate(event.replica_id, now)
            case ev.ReplicaRemoved():
                return self._remove_replica(event.replica_id, now)
            case ev.ConfigChanged():
                self._reconfigure(event.policy)
            case ev.EngineLoad():
                self.fleet.note_foreign(event.replica_id, event.foreign_slots, now)
            case ev.LimitLifted():
                self.queue.unpark(event.tenant)
            case ev.SessionDeleted():
                return self._delete_session(event.session, now)
            case ev.ShutdownRequested():
                return self._shut_down(event.grace_s, now)
            case ev.Tick():
                pass
        return []

    def next_wakeup(self) -> float | None:
        """When a Tick is due, in the same seconds as `now`; None while nothing waits for time to pass."""
        due = self._timers.next_at()
        for other in (self.fleet.next_stale(), self._next_preemption()):
            if other is not None and (due is None or other < due):
                due = other
        return due

    def predict(self, task: Task, now: float) -> tuple[Estimate | None, float | None]:
        """Until the waiting task starts, and its chance to end in time; None for what is unknown."""
        wait = self.forecast.wait(task, now)
        return wait, self.forecast.on_time(task, wait, now)

    def wait_reason(self, task: Task) -> WaitReason:
        """Why a queued task has not started."""
        if not self.fleet.ready_count:
            return WaitReason.NO_READY_REPLICA
        if not self.fleet.ready(task.need):
            return WaitReason.NO_EXACT_REPLICA
        if self.queue.is_parked(task):
            return WaitReason.QUOTA
        return WaitReason.TASKS_AHEAD if self.queue.position(task) else WaitReason.SLOTS_BUSY

    def is_warm(self, session: SessionKey, now: float) -> bool | None:
        """The slot that served the session last still holds its KV cache; None when it is not known to this route."""
        place = self.runs.bindings.bound(session, now)
        return None if place is None else self.runs.bindings.is_warm(session, *place)

    # Admission

    def _submit(self, spec: TaskSpec, now: float) -> list[ev.Command]:
        admitted = self._going_away(now) or self._admission.admit(spec, self._last_order + 1, now)
        if isinstance(admitted, Fault):
            return [ev.Reject(spec.key, admitted)]
        task, victim = admitted
        self._last_order += 1
        self.tasks[task.key] = task
        session = self.sessions.get(spec.session)
        if session is None:
            session = self.sessions[spec.session] = set()
        session.add(task.key)
        if spec.deadline_s is not None:
            self._timers.set(task.key, Timer.DEADLINE, now + spec.deadline_s)
        lost: list[ev.Command] = []
        if victim is not None:
            lost = self._finish(victim.task.key, TaskState.FAILED, victim.fault, now)
            self.forecast.tell(task, now)
        return [ev.Admit(task, task.position_told, self._admission.backoff_s(task)), *lost]

    def _going_away(self, now: float) -> Fault | None:
        """What refuses everything once the service is to go: it is gone, or replaced, when its grace is over."""
        if self._closing is None:
            return None
        return replace(self._closing, retry_after_ms=max(1000, round((self._closes_at - now) * 1000)))

    # Placement

    def _start_tasks(self, now: float, commands: list[ev.Command]) -> None:
        """Bring waiting tasks and free slots together; where none is free, somebody may have to make room."""
        fleet, runs = self.fleet, self.runs
        while fleet.has_free:
            task = self.queue.next(fleet.can_start, runs.may_start)
            if task is None:
                break
            if self._admission.is_hopeless(task, now):
                commands += self._finish(task.key, TaskState.FAILED, HOPELESS, now)
            else:
                commands.append(self._start(task, now))
        if self.policy.preemption.hard and len(self.queue):
            self._preempt(now, commands)

    def _start(self, task: Task, now: float) -> ev.Start:
        task.move(TaskState.RUNNING)
        attempt = self.runs.start(task, now)
        left_s = self.ledger.time_left_s(task.key)
        wall_s = attempt.wall_s if left_s is None else min(attempt.wall_s, left_s - task.run_s)
        self._timers.set(task.key, Timer.WALL, now + wall_s)
        return ev.Start(task, attempt)

    def _preempt(self, now: float, commands: list[ev.Command]) -> None:
        """Break off running work for each more urgent task whose turn it is, as far as the policy allows."""
        preemption = self.runs.preemption
        while preemption.pending < self.queue.depth(Priority.INTERACTIVE) and preemption.is_allowed(now):
            task = self.queue.next(self.fleet.ready, self.runs.may_start)
            attempt = None if task is None else preemption.choose(task, self.fleet)
            if attempt is None:
                return
            preemption.note_preempted(now)
            commands.append(self.runs.break_off(attempt, PREEMPTED))

    def _next_preemption(self) -> float | None:
        preemption = self.runs.preemption
        if not self.policy.preemption.hard or preemption.pending >= self.queue.depth(Priority.INTERACTIVE):
            return None
        return preemption.next_allowed_at()

    def _change_replica(self, replica: Replica, now: float) -> list[ev.Command]:
        """Take the news over; tasks that no replica can ever take any more have waited in vain."""
        before = self.fleet.get(replica.replica_id)
        self.fleet.put(replica)
        if replica.state is not ReplicaState.READY:
            self.runs.bindings.lose(replica.replica_id)
        if before is None or (before.may_serve <= replica.may_serve and before.cohort == replica.cohort):
            return []
        return self._end_stranded(now)

    def _remove_replica(self, replica_id: str, now: float) -> list[ev.Command]:
        self.runs.remove_replica(replica_id)
        return self._end_stranded(now)

    def _end_stranded(self, now: float) -> list[ev.Command]:
        stranded = [task.key for task in self.queue if not self.fleet.can_serve(task.need)]
        return self._finish_each(stranded, TaskState.FAILED, STRANDED, now)

    def _vacate(self, replica_id: str, now: float) -> list[ev.Command]:
        """Break off what runs there: tasks that another replica can go on with wait again, the others end."""
        commands: list[ev.Command] = []
        for task, attempt in self.runs.running_on(replica_id):
            if task.can_move and self.fleet.can_serve(task.need):
                commands.append(self.runs.break_off(attempt, MOVED))
            else:
                commands += self._finish(task.key, TaskState.FAILED, DRAINED, now)
        return commands

    def _reconfigure(self, policy: RoutePolicy) -> None:
        """Another policy holds for what comes; what waits and what runs stay as they are."""
        self.policy = policy
        self.queue.reconfigure(policy.queue, self.runs.owners.values())
        self.runs.reconfigure(policy)
        self._admission.reconfigure(policy)

    # What runs report

    def _stall_attempt(self, event: ev.AttemptStalled, now: float) -> list[ev.Command]:
        """The task has its answer at once, unless it goes on later; the slot is free only when the engine let go."""
        attempt = self.runs.attempts.get(event.attempt_id)
        if attempt is None or self.running(event.task, event.attempt_id) is None:
            return []
        self.runs.suspect(attempt.replica_id)
        if attempt.broken_off is not None:
            return []
        return self._finish(event.task, TaskState.FAILED, event.fault, now)

    def _end_attempt(self, event: ev.AttemptEnded, now: float) -> list[ev.Command]:
        ended = self.runs.end(event, now)
        if ended is None:
            return []
        task, attempt = ended
        if event.prompt_tokens is not None and not attempt.tokens_before:
            task.counted_prompt = event.prompt_tokens
        if task.attempt is not attempt:
            self._let_go(task, now)
            return []
        task.attempt = None
        if event.fault is None:
            return self._finish(task.key, TaskState.SUCCEEDED, None, now)
        return self._retry_or_fail(task, attempt, event.fault, now)

    def _retry_or_fail(self, task: Task, attempt: Attempt, fault: Fault, now: float) -> list[ev.Command]:
        """1. Not to be retried: the end. 2. Going away. 3. Late. 4. Tried enough. 5. Nowhere to go. 6. Try again."""
        if attempt.broken_off is not None:
            fault = attempt.broken_off
        elif attempt.has_token or not issubclass(fault.kind, RETRIED_FAULTS):
            return self._finish(task.key, TaskState.FAILED, fault, now)
        if self._closing is not None:
            return self._finish(task.key, TaskState.FAILED, self._closing, now)
        if task.is_late:
            return self._finish(task.key, TaskState.FAILED, LATE, now)
        tries = task.attempts - task.preemptions - task.moves
        if attempt.broken_off is None and tries >= self.policy.attempts:
            exhausted = Fault(ReplicaExhausted, f"{task.attempts} attempts failed, the last one: {fault.message}")
            return self._finish(task.key, TaskState.FAILED, exhausted, now)
        if not self.fleet.can_serve(task.need):
            stranded = DRAINED if fault is MOVED else STRANDED
            return self._finish(task.key, TaskState.FAILED, stranded, now)
        return [self._requeue(task, fault)]

    def _requeue(self, task: Task, fault: Fault) -> ev.Requeue:
        task.preemptions += fault is PREEMPTED
        task.moves += fault is MOVED
        task.move(TaskState.QUEUED)
        self._timers.clear(task.key, Timer.WALL)
        self.queue.settle(task, refund_prompt=task.first_token_at is None)
        self.ledger.requeue(task.key)
        self.queue.push(task)
        return ev.Requeue(task, fault)

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
        if attempt is None:
            self._let_go(task, now)
            return [ev.Finish(task)]
        if attempt.broken_off is not None:
            return [ev.Finish(task)]  # the engine was told already
        self.ledger.release_slot(attempt.attempt_id)
        return [ev.Finish(task), ev.Abort(attempt)]

    def _let_go(self, task: Task, now: float) -> None:
        """The task has ended and holds no slot: what it was charged and what it reserved becomes what it used.

        A prompt counts once a token came of it, or the task succeeded without one.
        """
        is_served = task.first_token_at is not None or task.state is TaskState.SUCCEEDED
        if task.attempts:
            self.queue.settle(task, task.counted_prompt, refund_prompt=not is_served)
        prompt, prices = task.prompt_tokens if is_served else 0, self.policy.prices
        cost = prices.prompt * prompt + prices.output * task.tokens_out
        self.ledger.settle_task(task.key, Use(prompt, task.tokens_out, task.run_s, cost), now)

    def _leave_session(self, task: Task) -> None:
        keys = self.sessions[task.spec.session]
        keys.discard(task.key)
        if not keys:
            del self.sessions[task.spec.session]

    def _delete_session(self, session: SessionKey, now: float) -> list[ev.Command]:
        self.ledger.sessions.forget(session)
        self.runs.forget_session(session)
        keys = sorted(self.sessions.get(session, ()), key=lambda key: self.tasks[key].order)
        return self._finish_each(keys, TaskState.CANCELED, SESSION_DELETED, now)

    def _shut_down(self, grace_s: float, now: float) -> list[ev.Command]:
        self._closing, self._closes_at = SHUTDOWN, now + grace_s
        for task in self.tasks.values():
            if task.state is TaskState.RUNNING:
                self._timers.set(task.key, Timer.SHUTDOWN, now + grace_s)
        return self._finish_each([task.key for task in self.queue], TaskState.FAILED, SHUTDOWN, now)

    def _finish_each(self, keys: list[TaskKey], state: TaskState, fault: Fault, now: float) -> list[ev.Command]:
        return [command for key in keys for command in self._finish(key, state, fault, now)]

    # Time

    def _fire_timers(self, now: float, commands: list[ev.Command]) -> None:
        self.fleet.drop_stale(now)
        for key, timer in self._timers.pop_due(now):
            task = self.tasks.get(key)
            if task is not None:
                commands += self._time_out(task, timer, now)

    def _time_out(self, task: Task, timer: Timer, now: float) -> list[ev.Command]:
        match timer:
            case Timer.DEADLINE:
                task.is_late = True
                if task.state is TaskState.RUNNING and not task.spec.abort_late:
                    return []
                return self._finish(task.key, TaskState.FAILED, LATE, now)
            case Timer.WALL:
                return self._finish(task.key, TaskState.FAILED, self._out_of_time(task), now)
            case Timer.UNREAD:
                return self._finish(task.key, TaskState.CANCELED, UNREAD, now)
            case Timer.SHUTDOWN:
                return self._finish(task.key, TaskState.FAILED, SHUTDOWN, now)

    def _out_of_time(self, task: Task) -> Fault:
        assert task.attempt is not None
        wall_s, left_s = task.attempt.wall_s, self.ledger.time_left_s(task.key)
        if left_s is not None and left_s - task.run_s < wall_s:
            return TIME_SPENT
        return Fault(DecodeTimeout, f"the attempt ran for {wall_s:g} s, the longest allowed")

    def running(self, key: TaskKey, attempt_id: int) -> Task | None:
        """The task, if this attempt is still the one that runs it."""
        task = self.tasks.get(key)
        if task is None or task.attempt is None or task.attempt.attempt_id != attempt_id:
            return None
        return task

    # For tests

    def check_invariants(self) -> None:
        """Raise AssertionError naming what does not add up. Costs O(tasks)."""
        parts = Parts(self.tasks, self.runs, self.sessions, self.queue, self.fleet, self.ledger)
        for broken in broken_invariants(parts):
            raise AssertionError(broken)
