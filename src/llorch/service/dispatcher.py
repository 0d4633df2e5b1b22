"""The single owner of all schedulers: takes events one after the other, and performs the commands that come out.

Events stand in one mailbox and are handled to the end, without an await, before the next. What must outlive the
process goes to the journal first; terminal frames follow its commit.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence

from llorch.domain import events as ev
from llorch.domain.faults import MOVED, PREEMPTED, REPLICA_FAULTS, SHUTDOWN
from llorch.domain.ledger import Ledger
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Attempt, Budgets, Fault, SessionKey, Task, TaskKey
from llorch.errors import Internal, NotFound
from llorch.service import frames
from llorch.service.advice import Advice
from llorch.service.patience import spread, told
from llorch.service.ports import Accepted, Clock, Ended, Journal
from llorch.service.records import Record, Records
from llorch.service.runner import Runner
from llorch.service.submission import Acceptance, Placement
from llorch.telemetry import Telemetry


class Dispatcher:
    """Owns the attempts that run, and the timers for time, journal and expiry.

    It tells, by replica id, `on_suspect` of a fault that speaks against the replica, `on_end` of every attempt that is
    over, and `on_move` of a task that leaves a replica for another one.
    """

    def __init__(
        self,
        *,
        schedulers: dict[str, Scheduler],
        ledger: Ledger,
        records: Records,
        journal: Journal,
        runner: Runner,
        telemetry: Telemetry,
        clock: Clock,
        on_suspect: Callable[[str], None],
        on_end: Callable[[str], None] = lambda _replica_id: None,
        on_move: Callable[[str], None] = lambda _replica_id: None,
    ) -> None:
        self.schedulers = schedulers
        self.ledger = ledger
        self.records = records
        self.advice = Advice(schedulers, ledger, clock)
        self._journal = journal
        self._runner = runner
        self._telemetry = telemetry
        self._clock = clock
        self._on_suspect = on_suspect
        self._on_end = on_end
        self._on_move = on_move
        self._mailbox: deque[tuple[str, ev.Event]] = deque()
        self._is_handling = False
        self._running: dict[int, asyncio.Task[Fault | None]] = {}
        self._erasing: set[asyncio.Task[bool]] = set()
        self._submitted: dict[TaskKey, Record] = {}
        self._refusals: dict[TaskKey, Fault] = {}
        self._ended: list[Record] = []
        self._committer: asyncio.Task[None] | None = None
        self._wakeup: asyncio.TimerHandle | None = None
        self._wakeup_at: float | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_at: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def now(self) -> float:
        """The schedulers' time."""
        return self._clock.monotonic()

    def post(self, route_id: str, event: ev.Event) -> None:
        """Handle the event and perform what follows, now or, when called from within that, right afterwards."""
        self._mailbox.append((route_id, event))
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._mailbox:
                self._handle(*self._mailbox.popleft())
        finally:
            self._is_handling = False

    def post_to_all(self, event: ev.Event) -> None:
        """Post what concerns every route."""
        for route_id in self.schedulers:
            self.post(route_id, event)

    def open_route(self, route_id: str, scheduler: Scheduler) -> None:
        """There is one route more."""
        self.schedulers[route_id] = scheduler

    def close_route(self, route_id: str) -> bool:
        """Forget a route that nothing serves any more; False while tasks of it live, and then nothing changes."""
        scheduler = self.schedulers[route_id]
        if scheduler.tasks or scheduler.attempts:
            return False
        del self.schedulers[route_id]
        return True

    async def submit(self, record: Record, event: ev.TaskSubmitted) -> Acceptance:
        """Let the scheduler decide on a new task; raises what it refuses with.

        The caller has seen, without an await since, that the task is new.
        """
        if record.route.route_id not in self.schedulers:
            raise NotFound("nothing here serves this model any more", engine=record.route.engine)
        self._submitted[record.key] = record
        try:
            self.post(record.route.route_id, event)
        finally:
            del self._submitted[record.key]
        refusal = self._refusals.pop(record.key, None)
        if refusal is not None:
            raise told(refusal, record.key[1]).error(engine=record.route.engine)
        submission = record.submission
        record.acceptance = acceptance = Acceptance(
            task_id=submission.task_id,
            session_id=submission.session_id,
            state=record.admitted.state,
            queue_position=record.queue_position,
            predicted_start_ms=frames.predicted_ms(record.admitted.predicted_wait),
            backoff_ms=record.backoff_ms,
            budgets=self.ledger.budgets_left(record.admitted.spec.session, self.now()),
        )
        self.advice.tell(record)
        await self._journal.commit()
        return acceptance

    def find(self, key: TaskKey) -> Record | None:
        """The record of a task, also of one that is just being decided on."""
        return self._submitted.get(key) or self.records.find(key)

    async def commit(self) -> None:
        """Return when all that was decided so far is durable."""
        await self._journal.commit()

    async def wait_idle(self) -> None:
        """Return when no task is live and every terminal frame is written."""
        await self._idle.wait()

    async def aclose(self) -> None:
        """Break off what still runs, and return when every engine was told."""
        if any(scheduler.tasks for scheduler in self.schedulers.values()):
            self.post_to_all(ev.ShutdownRequested(grace_s=0.0))
        running = [*self._running.values(), *self._erasing]
        for run in running:
            run.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._committer is not None:
            await self._committer
        self.advice.close()
        for handle in (self._wakeup, self._expiry):
            if handle is not None:
                handle.cancel()

    def budgets_left(self, session: SessionKey) -> Budgets | None:
        """What is left of a session's budgets; None without any."""
        return self.ledger.budgets_left(session, self.now())

    # Events in, commands out

    def _handle(self, route_id: str, event: ev.Event) -> None:
        scheduler = self.schedulers.get(route_id)
        if scheduler is None:
            return  # the route was closed, and with it ended whatever this is about
        now = self._clock.monotonic()
        commands = scheduler.handle(event, now)
        for command in commands:
            self._perform(route_id, command, now)
        self._telemetry.observe(route_id, event, commands, now)
        if not isinstance(event, ev.QUIET):
            self._follow_up(scheduler, event, commands)
            for tenant in self.ledger.take_lifted():
                self._tell_lifted(tenant, route_id)

    def _tell_lifted(self, tenant: str, route_id: str) -> None:
        """A limit of the tenant has room again: what waited for it on other routes may start."""
        for other in self.schedulers:
            if other != route_id:
                self._mailbox.append((other, ev.LimitLifted(tenant)))

    def _follow_up(self, scheduler: Scheduler, event: ev.Event, commands: Sequence[ev.Command]) -> None:
        if commands:
            self.advice.plan()
            if isinstance(event, ev.AttemptStalled):
                self._on_suspect(scheduler.attempts[event.attempt_id].replica_id)
        if scheduler.tasks or scheduler.attempts:
            self._idle.clear()
        elif commands or isinstance(event, ev.AttemptEnded):
            self._watch_idle()
        due = scheduler.next_wakeup()
        if due is not None and (self._wakeup_at is None or due < self._wakeup_at):
            self._set_wakeup(due)

    def _perform(self, route_id: str, command: ev.Command, now: float) -> None:
        match command:
            case ev.Admit():
                self._admit(route_id, command)
            case ev.Reject():
                self._refusals[command.task] = command.fault
            case ev.Start():
                self._start(route_id, command.task, command.attempt, now)
            case ev.Requeue():
                self._requeue(command)
            case ev.Finish():
                self._finish(command.task, now)
            case ev.Abort():
                self._running[command.attempt.attempt_id].cancel()
            case ev.Evict():
                self._evict(command)

    def _admit(self, route_id: str, command: ev.Admit) -> None:
        task = command.task
        record = self._submitted[task.key]
        record.task = task
        record.queue_position = command.queue_position
        if command.backoff_s is not None:
            record.backoff_ms = spread(math.ceil(command.backoff_s * 1000), task.key[1])
        self.records.file(record)
        self._journal.append(Accepted(*task.key, route_id=route_id, order=task.order))

    def _start(self, route_id: str, task: Task, attempt: Attempt, now: float) -> None:
        record = self._record(task)
        replica = self.schedulers[route_id].fleet.get(attempt.replica_id)
        assert replica is not None
        record.placement = Placement(
            replica.pool_id,
            replica.replica_id,
            attempt.attempt_id,
            replica.cohort.engine_version,
            replica.cohort.model_digest,
        )
        if task.attempts == 1:
            record.stream.append("started", frames.started(record, now))
        else:
            self.advice.tell_running(record)
        run = asyncio.get_running_loop().create_task(self._runner.run(record, attempt, self.post))
        self._running[attempt.attempt_id] = run
        run.add_done_callback(lambda done: self._report_end(record, attempt, done))

    def _requeue(self, command: ev.Requeue) -> None:
        """The scheduler has put it back, its Start follows in time; a reader hears of what had begun to come."""
        label = command.fault.policy_label
        if label in (PREEMPTED.policy_label, MOVED.policy_label):
            record = self._record(command.task)
            self.advice.tell_broken_off(record)
            if label == MOVED.policy_label:
                self._on_move(record.placed.replica_id)

    def _evict(self, command: ev.Evict) -> None:
        """Nobody waits for the outcome: a cache that stays is overwritten by the next task in its slot."""
        erasing = asyncio.get_running_loop().create_task(self._runner.erase(command.replica_id, command.slot))
        self._erasing.add(erasing)
        erasing.add_done_callback(self._end_erasing)

    def _end_erasing(self, erasing: "asyncio.Task[bool]") -> None:
        self._erasing.discard(erasing)
        if not erasing.cancelled() and (error := erasing.exception()) is not None:
            self._telemetry.report_bug("evict", error)

    def _report_end(self, record: Record, attempt: Attempt, run: "asyncio.Task[Fault | None]") -> None:
        """Whatever happened to the attempt, exactly one AttemptEnded tells it."""
        del self._running[attempt.attempt_id]
        fault: Fault | None
        if run.cancelled():
            fault = SHUTDOWN  # for a task that is still live: it was not told to stop by its scheduler
        elif (error := run.exception()) is not None:
            self._telemetry.report_bug("attempt", error)
            fault = Fault(Internal)
        else:
            fault = run.result()
        if record.replayed:
            self._telemetry.observe_replay(attempt.attempt_id, record.replayed)
            record.replayed = 0
        prompt_tokens = None
        if fault is None and record.completed is not None:
            prompt_tokens = record.completed.usage.prompt_tokens
        event = ev.AttemptEnded(attempt.task, attempt.attempt_id, fault, prompt_tokens)
        self.post(record.route.route_id, event)
        if fault is not None and issubclass(fault.kind, REPLICA_FAULTS):
            self._on_suspect(attempt.replica_id)
        self._on_end(attempt.replica_id)

    def _finish(self, task: Task, now: float) -> None:
        record = self._record(task)
        record.stream.shut_gate()
        record.free_prompt()
        if record.completed is not None and (tokens := record.completed.usage.prompt_tokens) is not None:
            self._telemetry.observe_usage(record.placed.attempt_id, tokens)
        self._journal.append(Ended(*task.key, code=task.fault.kind.code if task.fault else None))
        due = self.records.settle(record, now)
        if self._expiry_at is None or due < self._expiry_at:
            self._plan_expiry(due)
        self._ended.append(record)
        if self._committer is None:
            self._committer = asyncio.get_running_loop().create_task(self._write_terminal_frames())

    async def _write_terminal_frames(self) -> None:
        while self._ended:
            ended, self._ended = self._ended, []
            await self._journal.commit()
            for record in ended:
                record.stream.close(*frames.terminal(record))
        self._committer = None
        self._watch_idle()

    def _record(self, task: Task) -> Record:
        return self.records.get(task.key)

    def _watch_idle(self) -> None:
        if self._committer is None and not any(s.tasks or s.attempts for s in self.schedulers.values()):
            self._idle.set()
        else:
            self._idle.clear()

    # Time

    def _set_wakeup(self, due: float) -> None:
        if self._wakeup is not None:
            self._wakeup.cancel()
        self._wakeup_at = due
        self._wakeup = self._call_at(due, self._wake)

    def _wake(self) -> None:
        """Tick, if something is still due: what a wake-up was set for may have been called off meanwhile.

        To move the timer at each such time would cost every task a timer of its own.
        """
        self._wakeup = self._wakeup_at = None
        if (due := self._next_wakeup()) is not None and due <= self.now():
            self.post_to_all(ev.Tick())
            due = self._next_wakeup()
        if due is not None and self._wakeup_at is None:
            self._set_wakeup(due)

    def _next_wakeup(self) -> float | None:
        return min((at for s in self.schedulers.values() if (at := s.next_wakeup()) is not None), default=None)

    def _plan_expiry(self, due: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()  # it was for a record, and a transcript is due before it
        self._expiry_at = due
        self._expiry = self._call_at(due, self._expire)

    def _expire(self) -> None:
        self._expiry = self._expiry_at = None
        self.records.expire(self.now())
        if (due := self.records.next_expiry()) is not None:
            self._plan_expiry(due)

    def _call_at(self, due: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, due - self.now()), call)
