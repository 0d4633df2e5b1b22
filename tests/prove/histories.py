"""Random histories of a scheduler with quotas and budgets: repeatable from a seed, to be cut at any step.

The books kept here come from what was told to the scheduler, not from what it keeps.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.policy import (
    Fairness,
    FullPolicy,
    Order,
    PreemptionPolicy,
    Prices,
    QueuePolicy,
    Quota,
    Rate,
    RoutePolicy,
)
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.sessions import SessionLimits
from llorch.domain.task import Attempt, Budgets, Cohort, Fault, Priority, SessionKey, Task, TaskKey, TaskSpec
from llorch.errors import Canceled, InvalidParams, WorkerReset

TENANTS: Final = ("a", "b", "c")
GRACE_S: Final = 3.0
WALL_S: Final = 60.0
PRICES: Final = Prices(prompt=0.25, output=0.5)
"""Exact in binary, so that sums can be compared."""
BROKEN: Final = Fault(WorkerReset, "the connection broke")
STOPPED: Final = Fault(Canceled, "told to stop")
REFUSED: Final = Fault(InvalidParams, "the engine refuses it")
MOST_DRAIN_STEPS: Final = 2_000


@dataclass(slots=True)
class Account:
    """What one task used, as the engines told. A prompt counts once a token came of it, or the end without one."""

    session: SessionKey
    estimate: int
    has_succeeded: bool = False
    counted_prompt: int | None = None
    tokens: int = 0
    run_s: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        if not self.tokens and not self.has_succeeded:
            return 0
        return self.estimate if self.counted_prompt is None else self.counted_prompt

    @property
    def cost(self) -> float:
        return PRICES.prompt * self.prompt_tokens + PRICES.output * self.tokens


@dataclass(slots=True)
class Running:
    """An attempt that the engine has not let go of."""

    attempt: Attempt
    task: Task
    begun: float
    is_aborted: bool = False


@dataclass(slots=True)
class Seen:
    """How much of everything the histories had."""

    starts: int = 0
    refusals: int = 0
    preemptions: int = 0
    requeues: int = 0
    ends: dict[str, int] = field(default_factory=dict)


class History:
    """One history. `step()` lets something happen; the same seed has the same steps."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 100.0
        self.accounts: dict[TaskKey, Account] = {}
        self.limits: dict[SessionKey, Budgets] = {}
        self.readers: dict[TaskKey, int] = {}
        self.running: dict[int, Running] = {}
        self.seen = Seen()
        self._submitted = 0
        self._forgotten: set[SessionKey] = set()
        self.ledger = Ledger(SessionLimits(ttl_s=3600.0, turns=100), self._quotas())
        self.scheduler = Scheduler(self._policy(), self.ledger)
        self.replicas = [self._replica(number) for number in range(self.draw.randint(1, 3))]
        for replica in self.replicas:
            self.post(ev.ReplicaChanged(replica))

    # What there is

    def _quotas(self) -> dict[str, Quota]:
        draw = self.draw

        def one() -> Quota:
            return Quota(
                max_queued=draw.choice([None, 2, 4]),
                max_concurrent=draw.choice([None, 1, 2]),
                rate={priority: Rate(1.0, 6.0) for priority in Priority if draw.random() < 0.3},
                tokens_per_minute=draw.choice([None, 300, 2000]),
                kv_tokens=draw.choice([None, 60, 200]),
            )

        return {tenant: one() for tenant in TENANTS if draw.random() < 0.8}

    def _policy(self) -> RoutePolicy:
        draw = self.draw
        queue = QueuePolicy(
            capacity={priority: draw.randint(1, 4) for priority in Priority},
            full_policy={priority: draw.choice(list(FullPolicy)) for priority in Priority},
            fairness=draw.choice(list(Fairness)),
            order=draw.choice(list(Order)),
            weights={"a": 2.0},
        )
        hard = PreemptionPolicy(hard=draw.random() < 0.5, per_minute=30)
        return RoutePolicy(queue=queue, wall_s=WALL_S, unread_grace_s=GRACE_S, preemption=hard, prices=PRICES)

    def _replica(self, number: int) -> Replica:
        cohort = Cohort("v1", None, exact=self.draw.random() < 0.7)
        slots = self.draw.randint(1, 2)
        return Replica(f"r{number}", "pool", slots, cohort, ReplicaState.READY, can_interrupt=True)

    # What happens

    def step(self) -> None:
        """One thing that may happen, and some time."""
        happen: Callable[[], None] = self.draw.choices(
            [self._submit, self._progress, self._end, self._fail, self._read, self._leave, self._wait, self._delete],
            weights=[8, 6, 3, 1, 1, 1, 2, 0.3],
        )[0]
        happen()

    def _submit(self) -> None:
        draw = self.draw
        tenant = draw.choice(TENANTS)
        session = (tenant, f"s{draw.randint(0, 2)}")
        self._submitted += 1
        most = draw.randint(1, 24)
        spec = TaskSpec(
            key=(tenant, f"t{self._submitted}"),
            session=session,
            priority=draw.choice(list(Priority)),
            max_tokens=most,
            expected_tokens=draw.randint(1, most),
            prompt_tokens=draw.randint(1, 40),
            strict=draw.random() < 0.15,
            deadline_s=draw.choice([None, None, 0.5, 5.0, 50.0]),
            abort_late=draw.random() < 0.3,
            cancel_unread=draw.random() < 0.6,
            can_continue=draw.random() < 0.8,
            budgets=self._budgets(session),
        )
        self.post(ev.TaskSubmitted(spec))

    def _budgets(self, session: SessionKey) -> Budgets | None:
        """Of a session's first task, or of a new one under an old name."""
        if session in self.limits and session not in self._forgotten:
            return None
        draw = self.draw
        return Budgets(
            tokens=draw.choice([None, 80, 600]),
            time_s=draw.choice([None, 8.0, 100.0]),
            cost=draw.choice([None, 30.0, 300.0]),
        )

    def _progress(self) -> None:
        if self.running:
            self.produce(self.draw.choice(list(self.running.values())), self.draw.randint(1, 4))

    def produce(self, run: Running, count: int) -> None:
        """The engine gives some tokens, no more than it was asked for."""
        if run.is_aborted:
            return
        account = self.accounts[run.task.key]
        count = min(count, run.task.spec.max_tokens - account.tokens)
        if count <= 0:
            return
        if not run.attempt.has_token:
            self.post(ev.FirstToken(run.task.key, run.attempt.attempt_id))
        account.tokens += count
        self.post(ev.TokensProduced(run.task.key, run.attempt.attempt_id, count))

    def _end(self) -> None:
        if self.running:
            self.end(self.draw.choice(list(self.running.values())))

    def end(self, run: Running, fault: Fault | None = None) -> None:
        """The engine lets go: at its end, or broken off."""
        if run.is_aborted and fault is None:
            fault = STOPPED
        counted = None
        if fault is None:
            self.produce(run, self.draw.randint(0, 2))
            counted = max(1, run.task.spec.prompt_tokens + self.draw.randint(-1, 2))
        self.finish(run, fault, counted)

    def _fail(self) -> None:
        if self.running:
            self.end(self.draw.choice(list(self.running.values())), self.draw.choice([BROKEN, REFUSED]))

    def finish(self, run: Running, fault: Fault | None, counted: int | None) -> None:
        """Report the end of an attempt, and book it."""
        if self.running.pop(run.attempt.attempt_id, None) is None:
            return
        account = self.accounts[run.task.key]
        account.run_s += self.now - run.begun
        account.has_succeeded |= fault is None
        if counted is not None and not run.attempt.tokens_before:
            account.counted_prompt = counted
        self.post(ev.AttemptEnded(run.task.key, run.attempt.attempt_id, fault, counted))
        if fault is BROKEN:
            self.heal(run.attempt.replica_id)

    def heal(self, replica_id: str) -> None:
        """A probe finds the replica Ready again."""
        replica = next(each for each in self.replicas if each.replica_id == replica_id)
        self.post(ev.ReplicaChanged(replica))

    def _read(self) -> None:
        live = list(self.scheduler.tasks)
        if live:
            self.read(self.draw.choice(live))

    def read(self, key: TaskKey) -> None:
        self.readers[key] = self.readers.get(key, 0) + 1
        self.post(ev.FollowerJoined(key))

    def _leave(self) -> None:
        read = [key for key in self.scheduler.tasks if self.readers.get(key)]
        if read:
            self.leave(self.draw.choice(read))

    def leave(self, key: TaskKey) -> None:
        self.readers[key] -= 1
        self.post(ev.FollowerLeft(key))

    def _wait(self) -> None:
        self.wait(self.draw.choice([0.25, 1.0, 4.0]))

    def wait(self, seconds: float) -> None:
        """Time passes; what is due in it happens at its time."""
        until = self.now + seconds
        while (due := self.scheduler.next_wakeup()) is not None and due <= until:
            self.now = max(self.now, due)
            self.post(ev.Tick())
        self.now = until

    def _delete(self) -> None:
        if self.limits:
            self.delete(self.draw.choice(list(self.limits)))

    def delete(self, session: SessionKey) -> None:
        """What its tasks use from now on settles into nothing, and the next one starts a new session of that name."""
        self._forgotten.add(session)
        self.post(ev.SessionDeleted(session))

    def cancel(self, key: TaskKey) -> None:
        self.post(ev.CancelRequested(key))

    def post(self, event: ev.Event) -> None:
        """Tell the scheduler, and do what it orders."""
        for command in self.scheduler.handle(event, self.now):
            self._follow(event, command)

    def _follow(self, event: ev.Event, command: ev.Command) -> None:
        match command:
            case ev.Admit(task=task):
                self._admit(task)
            case ev.Reject():
                self.seen.refusals += 1
            case ev.Start(task=task, attempt=attempt):
                self.seen.starts += 1
                self.running[attempt.attempt_id] = Running(attempt, task, self.now)
            case ev.Abort(attempt=attempt):
                self.seen.preemptions += attempt.broken_off is not None
                self.running[attempt.attempt_id].is_aborted = True
            case ev.Requeue():
                self.seen.requeues += 1
            case ev.Finish(task=task):
                code = (
                    task.state.value if task.fault is None else str(task.fault.policy_label or task.fault.kind.__name__)
                )
                self.seen.ends[code] = self.seen.ends.get(code, 0) + 1
            case _:
                assert isinstance(command, ev.Evict), (event, command)

    def _admit(self, task: Task) -> None:
        session = task.spec.session
        self.accounts[task.key] = Account(session, task.spec.prompt_tokens)
        if session in self._forgotten:
            self._forgotten.discard(session)
            self.limits.pop(session)
            for key, account in self.accounts.items():
                if account.session == session and key != task.key:
                    account.session = (session[0], "forgotten")
        self.limits.setdefault(session, task.spec.budgets or Budgets())

    # The end

    def drain(self) -> None:
        """Let everything that is left come to its end, as it does while the service goes on."""
        for _ in range(MOST_DRAIN_STEPS):
            if self.running:
                self.wait(0.5)
                if self.running:
                    self.end(next(iter(self.running.values())))
            elif self.scheduler.tasks:
                due = self.scheduler.next_wakeup()
                assert due is not None, f"waits for ever: {list(self.scheduler.tasks)}"
                self.wait(due - self.now)
            else:
                return
        raise AssertionError(f"not drained: {len(self.scheduler.tasks)} tasks, {len(self.running)} attempts")

    def broken(self) -> list[str]:
        """What is still reserved, and which budget is not what its tasks used."""
        problems = [f"{owner} still holds {amount} of {label}" for owner, label, amount in self.ledger.outstanding()]
        problems += [f"slot lease {lease}" for lease in self.ledger.leases()]
        problems += [problem for session in self.budgeted() for problem in self._broken_budget(session)]
        return problems

    def budgeted(self) -> list[SessionKey]:
        """Sessions with budgets that still live."""
        return [
            session for session, limits in self.limits.items() if session not in self._forgotten and limits != Budgets()
        ]

    def _broken_budget(self, session: SessionKey) -> list[str]:
        limits, left = self.limits[session], self.ledger.budgets_left(session, self.now)
        if left is None:
            return [f"{session} has lost its budgets"]
        accounts = [account for account in self.accounts.values() if account.session == session]
        used = {
            "tokens": sum(account.prompt_tokens + account.tokens for account in accounts),
            "time_s": sum(account.run_s for account in accounts),
            "cost": sum(account.cost for account in accounts),
        }
        problems = []
        for name, amount in used.items():
            limit, rest = getattr(limits, name), getattr(left, name)
            if limit is not None and abs(max(0.0, limit - amount) - rest) > 1e-6:
                problems.append(f"{session}: {amount} {name} of {limit} used, {rest} left")
        return problems
