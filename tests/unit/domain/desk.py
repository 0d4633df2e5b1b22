"""A scheduler with a clock and one-word names, for tests that read like a conversation with it.

What comes back is told in words, one line a command: `start a on r0/0`, `finish a failed DEADLINE_UNMET`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace as changed

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import Fairness, FullPolicy, QueuePolicy, RoutePolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Budgets, Cohort, Fault, Priority, Task, TaskKey, TaskSpec
from llorch.errors import DecodeTimeout, WorkerReset

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
LOST = Fault(WorkerReset, "the replica broke off")
EXACT_COHORT = Cohort("v1", "sha256:aa", exact=True)
LOOSE_COHORT = Cohort("v1", "sha256:aa", exact=False)
TENANT = "acme"


REJECT = dict.fromkeys(Priority, FullPolicy.REJECT)


def key(name: str, tenant: str = TENANT) -> TaskKey:
    return tenant, name


def spec(
    name: str,
    priority: Priority = INTERACTIVE,
    *,
    tenant: str = TENANT,
    session: str | None = None,
    strict: bool = False,
    deadline_s: float | None = None,
    abort_late: bool = False,
    cancel_unread: bool = False,
    prompt_tokens: int = 0,
    expected_tokens: int = 16,
    max_tokens: int = 16,
    can_continue: bool = True,
    wants_warm: bool = True,
    budgets: Budgets | None = None,
) -> TaskSpec:
    return TaskSpec(
        key=key(name, tenant),
        session=(tenant, session or f"session of {name}"),
        priority=priority,
        max_tokens=max(max_tokens, expected_tokens),
        expected_tokens=expected_tokens,
        prompt_tokens=prompt_tokens,
        strict=strict,
        deadline_s=deadline_s,
        abort_late=abort_late,
        cancel_unread=cancel_unread,
        can_continue=can_continue,
        wants_warm=wants_warm,
        budgets=budgets,
    )


def replica(
    replica_id: str = "r0",
    slots: int = 1,
    *,
    state: ReplicaState = ReplicaState.READY,
    exact: bool | None = None,
    version: str = "v1",
    can_interrupt: bool = True,
) -> Replica:
    """Exact when it has one slot, if nothing else is said."""
    cohort = Cohort(version, "sha256:aa", exact=slots == 1 if exact is None else exact)
    return Replica(replica_id, "pool", slots, cohort, state, can_interrupt)


def told(command: ev.Command) -> str:
    """The command in words."""
    match command:
        case ev.Admit(task, position, _):
            return f"admit {task.key[1]} at {position}"
        case ev.Reject((_, name), fault):
            return f"reject {name} {fault.kind.code}"
        case ev.Start(task, attempt):
            return f"start {task.key[1]} on {attempt.replica_id}/{attempt.slot}"
        case ev.Abort(attempt):
            return f"abort {attempt.task[1]} on {attempt.replica_id}/{attempt.slot}"
        case ev.Requeue(task, _):
            return f"requeue {task.key[1]}"
        case ev.Evict(replica_id, slot):
            return f"evict {replica_id}/{slot}"
        case ev.Finish(task):
            code = f" {task.fault.kind.code}" if task.fault else ""
            return f"finish {task.key[1]} {task.state.value}{code}"


class Desk:
    """One route. Every event is followed by `check_invariants()`.

    Unless a policy says otherwise the more urgent priority goes first, and a full queue rejects.
    """

    def __init__(
        self,
        *replicas: Replica,
        capacity: int = 100,
        batch_capacity: int | None = None,
        wall_s: float = 600.0,
        grace_s: float = 10.0,
        turns: int = 1000,
        ledger: Ledger | None = None,
        fairness: Fairness = Fairness.STRICT,
        full_policy: Mapping[Priority, FullPolicy] = REJECT,
        queue: Mapping[str, object] = {},
        **policies: object,
    ) -> None:
        limits = {INTERACTIVE: capacity, BATCH: capacity if batch_capacity is None else batch_capacity}
        queue_policy = QueuePolicy(capacity=limits, full_policy=full_policy, fairness=fairness)
        queue_policy = changed(queue_policy, **queue)  # type: ignore[arg-type]
        policy = RoutePolicy(queue=queue_policy, wall_s=wall_s, unread_grace_s=grace_s)
        policy = changed(policy, **policies)  # type: ignore[arg-type]
        self.ledger = ledger or Ledger(SessionLimits(ttl_s=600.0, turns=turns))
        self.scheduler = Scheduler(policy, self.ledger)
        self.now = 0.0
        self.commands: list[ev.Command] = []
        self.seen: dict[str, Task] = {}
        for known in replicas:
            self.handle(ev.ReplicaChanged(known))

    def handle(self, event: ev.Event) -> list[str]:
        self.commands = self.scheduler.handle(event, self.now)
        self.scheduler.check_invariants()
        for command in self.commands:
            if isinstance(command, ev.Admit):
                self.seen[command.task.key[1]] = command.task
        return [told(command) for command in self.commands]

    def submit(self, name: str, priority: Priority = INTERACTIVE, **wishes: object) -> list[str]:
        return self.handle(ev.TaskSubmitted(spec(name, priority, **wishes)))  # type: ignore[arg-type]

    def cancel(self, name: str) -> list[str]:
        return self.handle(ev.CancelRequested(self.seen[name].key if name in self.seen else key(name)))

    def join(self, name: str) -> list[str]:
        return self.handle(ev.FollowerJoined(key(name)))

    def leave(self, name: str) -> list[str]:
        return self.handle(ev.FollowerLeft(key(name)))

    def attempt_of(self, name: str) -> int:
        attempt = self.seen[name].attempt
        assert attempt is not None
        return attempt.attempt_id

    def token(self, name: str) -> list[str]:
        return self.handle(ev.FirstToken(self.seen[name].key, self.attempt_of(name)))

    def tokens(self, name: str, count: int) -> list[str]:
        """The first token, if there was none, and then so many in all."""
        task = self.seen[name]
        if task.attempt is not None and not task.attempt.has_token:
            self.token(name)
        return self.handle(ev.TokensProduced(task.key, self.attempt_of(name), count))

    def end(
        self,
        name: str,
        fault: Fault | None = None,
        *,
        attempt_id: int | None = None,
        prompt_tokens: int | None = None,
    ) -> list[str]:
        """The attempt that runs the task, or the one with this id, is over."""
        number = self.attempt_of(name) if attempt_id is None else attempt_id
        return self.handle(ev.AttemptEnded(self.seen[name].key, number, fault, prompt_tokens))

    def stall(self, name: str, *, attempt_id: int | None = None) -> list[str]:
        """The engine fell silent."""
        number = self.attempt_of(name) if attempt_id is None else attempt_id
        return self.handle(ev.AttemptStalled(key(name), number, Fault(DecodeTimeout, "silent")))

    def change(self, told_replica: Replica) -> list[str]:
        return self.handle(ev.ReplicaChanged(told_replica))

    def after(self, seconds: float) -> list[str]:
        """Let time pass, and tick."""
        self.now += seconds
        return self.handle(ev.Tick())

    def waiting(self) -> list[str]:
        return [task.key[1] for task in self.scheduler.queue]

    def running(self) -> dict[str, str]:
        """Where each running task runs."""
        runs = ((name, task.attempt) for name, task in self.seen.items())
        return {name: f"{attempt.replica_id}/{attempt.slot}" for name, attempt in runs if attempt is not None}


def names(commands: Sequence[str], verb: str) -> list[str]:
    """Whom a verb was said of."""
    return [words[1] for line in commands if (words := line.split())[0] == verb]
