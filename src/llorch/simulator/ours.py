"""The real scheduler as a desk: events in, commands performed on the floor, as the dispatcher of the service does it.

It holds no queue and takes no decision. Whatever a finished task was is forgotten but for its outcome.
"""

import math

from llorch.domain import events as ev
from llorch.domain.faults import PREEMPTED, SHUTDOWN
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Cohort, Fault, Task, TaskKey, TaskSpec, TaskState
from llorch.errors import DeadlineUnmet, WorkerReset
from llorch.simulator.outcome import Fate, Outcome
from llorch.simulator.replicas import Engine, Floor, Run
from llorch.simulator.spec import Spec
from llorch.simulator.workload import LEVELS, Workload

_COHORT = Cohort("simulated", None, exact=False)
_LOST = Fault(WorkerReset, "the replica broke down")


def make_scheduler(spec: Spec) -> Scheduler:
    """The scheduler of the route, as the service makes it from the same settings."""
    limits = SessionLimits(ttl_s=spec.sessions.ttl_s, turns=spec.sessions.turns)
    return Scheduler(spec.route_policy(), Ledger(limits, spec.quotas()))


class SchedulerDesk:
    """Tasks are known to the scheduler by the index in the workload, as text."""

    def __init__(self, spec: Spec, workload: Workload, floor: Floor, outcome: Outcome) -> None:
        self.wakeup: float | None = None
        self._workload = workload
        self._floor = floor
        self._outcome = outcome
        self._aborts_late = spec.on_deadline == "abort"
        self._scheduler = make_scheduler(spec)
        self._keys: dict[int, TaskKey] = {}
        self._replicas = [_replica(number, engine) for number, engine in enumerate(floor.engines)]
        self._numbers = {replica.replica_id: number for number, replica in enumerate(self._replicas)}
        for replica in self._replicas:
            self._decide(ev.ReplicaChanged(replica), 0.0)

    def arrive(self, index: int, now: float) -> None:
        work = self._workload
        tenant = work.tenants[work.tenant[index]]
        deadline = work.deadline_s[index]
        spec = TaskSpec(
            key=(tenant, str(index)),
            session=(tenant, work.session_name(index)),
            priority=LEVELS[work.level[index]],
            max_tokens=work.max_tokens[index],
            expected_tokens=work.expected_tokens[index],
            prompt_tokens=work.prompt_tokens[index],
            deadline_s=None if math.isnan(deadline) else deadline,
            abort_late=self._aborts_late,
        )
        self._decide(ev.TaskSubmitted(spec), now)

    def first_token(self, run: Run, now: float) -> None:
        self._scheduler.handle(ev.FirstToken(self._keys[run.attempt], run.attempt), now)

    def tokens(self, run: Run, count: int, now: float) -> None:
        self._scheduler.handle(ev.TokensProduced(self._keys[run.attempt], run.attempt, count), now)

    def ended(self, run: Run, now: float) -> None:
        # A run that was told to stop ends as in the service, where it is cancelled.
        fault = _LOST if run.is_lost else SHUTDOWN if run.is_aborted else None
        prompt_tokens = self._workload.prompt_tokens[run.index]
        self._decide(ev.AttemptEnded(self._keys.pop(run.attempt), run.attempt, fault, prompt_tokens), now)

    def change_replica(self, replica: int, now: float, *, is_ready: bool) -> None:
        told = self._replicas[replica]
        if not is_ready:
            told = Replica(told.replica_id, told.pool_id, told.slots, told.cohort, ReplicaState.UNREADY)
        self._decide(ev.ReplicaChanged(told), now)

    def tick(self, now: float) -> None:
        self._decide(ev.Tick(), now)

    def _decide(self, event: ev.Event, now: float) -> None:
        for command in self._scheduler.handle(event, now):
            self._perform(command, now)
        self.wakeup = self._scheduler.next_wakeup()

    def _perform(self, command: ev.Command, now: float) -> None:
        match command:
            case ev.Start():
                self._start(command, now)
            case ev.Finish():
                self._finish(command.task, now)
            case ev.Admit():
                self._admit(command, now)
            case ev.Abort():
                self._floor.abort(command.attempt.attempt_id, now)
            case ev.Reject():
                self._outcome.end(int(command.task[1]), Fate.REJECTED, now, _reason(command.fault))
            case ev.Requeue():
                self._requeue(command, now)
            case ev.Evict():
                pass  # the model has no cache

    def _admit(self, command: ev.Admit, now: float) -> None:
        task, told = command.task, self._outcome.told
        index = int(task.spec.key[1])
        self._outcome.wait(index, now)
        told.ahead[index] = command.queue_position
        if task.predicted_wait is not None:
            told.wait_s[index] = task.predicted_wait.mean_s
        if task.on_time_probability is not None:
            told.on_time[index] = task.on_time_probability

    def _start(self, command: ev.Start, now: float) -> None:
        attempt, work = command.attempt, self._workload
        index = int(attempt.task[1])
        self._keys[attempt.attempt_id] = attempt.task
        self._outcome.start(index, now)
        self._floor.start(
            index,
            attempt.attempt_id,
            self._numbers[attempt.replica_id],
            now,
            context=work.prompt_tokens[index] + attempt.tokens_before,
            goal=work.output_tokens[index] - attempt.tokens_before,
        )

    def _requeue(self, command: ev.Requeue, now: float) -> None:
        index = int(command.task.spec.key[1])
        self._outcome.wait(index, now)
        if command.fault is PREEMPTED:
            self._outcome.preemptions += 1
        else:
            self._outcome.retries += 1

    def _finish(self, task: Task, now: float) -> None:
        index, outcome = int(task.spec.key[1]), self._outcome
        if outcome.is_waiting(index):
            outcome.unwait(index, now)
        if task.state is TaskState.SUCCEEDED:
            outcome.end(index, Fate.FINISHED, now)
        else:
            outcome.end(index, _fate(task), now, _reason(task.fault))


def _replica(number: int, engine: Engine) -> Replica:
    return Replica(f"r{number}", "simulated", engine.slots, _COHORT, ReplicaState.READY, can_interrupt=True)


def _fate(task: Task) -> Fate:
    assert task.fault is not None
    if task.fault.kind is DeadlineUnmet:
        return Fate.ABORTED if task.attempts else Fate.EXPIRED
    return Fate.FAILED if task.attempts else Fate.DROPPED


def _reason(fault: Fault | None) -> str:
    if fault is None:
        return ""
    return f"{fault.kind.code} {fault.policy_label}" if fault.policy_label else fault.kind.code
