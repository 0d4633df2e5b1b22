"""The attempts on the replicas of a route: placed where least is to be done, or where their session's cache is warm.

Counts what they report and settles their slots. Which task starts, and what its end means, is the scheduler's.
"""

from collections.abc import Iterator

from llorch.domain import events as ev
from llorch.domain.affinity import Bindings
from llorch.domain.fair_queue import FairQueue
from llorch.domain.faults import REPLICA_FAULTS
from llorch.domain.forecast import Forecast
from llorch.domain.ledger import Ledger
from llorch.domain.policy import RoutePolicy
from llorch.domain.pool import Fleet, ReplicaState
from llorch.domain.preemption import Preemption
from llorch.domain.task import Affinity, Attempt, Fault, Need, SessionKey, Task


class Runs:
    """The attempts that hold slots, each with the task it belongs to, which may have ended already."""

    __slots__ = (
        "_evictions", "_fleet", "_forecast", "_ledger", "_policy", "_queue", "attempts", "bindings", "owners",
        "preemption",
    )  # fmt: skip

    def __init__(self, policy: RoutePolicy, queue: FairQueue, fleet: Fleet, ledger: Ledger, forecast: Forecast) -> None:
        self._policy = policy
        self._queue = queue
        self._fleet = fleet
        self._ledger = ledger
        self._forecast = forecast
        self.attempts: dict[int, Attempt] = {}
        self.owners: dict[int, Task] = {}
        self.bindings = Bindings(policy.bindings)
        self.preemption = Preemption(policy.preemption)
        self._evictions: dict[tuple[str, int], SessionKey] = {}

    def reconfigure(self, policy: RoutePolicy) -> None:
        """Another policy holds for what starts from now on, and for what makes room."""
        self._policy = policy
        self.bindings.resize(policy.bindings)
        self.preemption.reconfigure(policy.preemption, self._untold())

    def may_start(self, task: Task) -> bool:
        """The tenant's quotas of what runs have room for it."""
        return self._ledger.can_start(task.key[0], task.kv_tokens)

    def start(self, task: Task, now: float) -> Attempt:
        """Begin an attempt at a task whose turn it is, on a replica with a free slot."""
        bound = self.bindings.bound(task.spec.session, now) if task.spec.wants_warm else None
        warm_on = bound[0] if bound is not None else None
        replica = self._fleet.choose(task.need, prefer=warm_on, detour_s=self._policy.detour_s)
        replica_id = replica.replica_id
        lease = self._ledger.hold_slot(
            replica_id,
            task=task.key,
            kv_tokens=task.kv_tokens,
            prefer=bound[1] if bound is not None and warm_on == replica_id else None,
        )
        attempt = Attempt(lease.attempt_id, task.key, replica_id, lease.slot, started_at=now)
        attempt.wall_s = self._policy.wall_s
        attempt.tokens_before = task.tokens_out
        if (run := self._forecast.run(task)) is not None:
            attempt.work_s = run.mean_s
        self._fleet.take(replica_id, attempt.work_s)
        if warm_on is not None:
            self._note_affinity(task.spec.session, attempt, warm_on, task.need)
        self.bindings.bind(task.spec.session, replica_id, lease.slot, now + self._ledger.sessions.limits.ttl_s)
        self._forecast.note_start(task, attempt)
        self._queue.start(task)
        self.preemption.note_start(task, attempt)
        self.attempts[attempt.attempt_id] = attempt
        self.owners[attempt.attempt_id] = task
        task.attempt = attempt
        task.attempts += 1
        if task.started_at is None:
            task.started_at = now
        if task.spec.strict:
            task.need = Need(exact=True, cohort=replica.cohort)
        return attempt

    def _note_affinity(self, session: SessionKey, attempt: Attempt, warm_on: str, need: Need) -> None:
        """Asked before the session is bound anew: is its KV cache still in this slot?"""
        if warm_on == attempt.replica_id:
            attempt.affinity = Affinity.HIT
            attempt.kv_warmth = self.bindings.is_warm(session, attempt.replica_id, attempt.slot)
            return
        attempt.kv_warmth = False
        bound = self._fleet.get(warm_on)
        is_usable = bound is not None and bound.state is ReplicaState.READY and bound.meets(need)
        attempt.affinity = Affinity.MISS if is_usable else Affinity.REPIN

    def note_first_token(self, event: ev.FirstToken, now: float) -> None:
        """The attempt's prompt is done."""
        attempt = self.attempts.get(event.attempt_id)
        if attempt is None:
            return
        task = self.owners[event.attempt_id]
        attempt.has_token = True
        attempt.first_token_at = now
        if task.first_token_at is None:
            task.first_token_at = now
        self._forecast.note_first_token(task, attempt, now)

    def note_tokens(self, event: ev.TokensProduced) -> None:
        """Count tokens, also those of a task that has ended: its session pays for what it was given."""
        attempt = self.attempts.get(event.attempt_id)
        if attempt is None:
            return
        task = self.owners[event.attempt_id]
        task.tokens_out += event.count
        if task.tokens_out > task.charged_tokens:
            self._queue.charge(task)

    def end(self, event: ev.AttemptEnded, now: float) -> tuple[Task, Attempt] | None:
        """The engine let go: the slot is free. None for an attempt that has ended before."""
        attempt = self.attempts.pop(event.attempt_id, None)
        if attempt is None:
            return None
        task = self.owners.pop(event.attempt_id)
        replica_id, fault = attempt.replica_id, event.fault
        self._ledger.settle_slot(attempt.attempt_id)
        self._fleet.give_back(replica_id, attempt.work_s)
        self.preemption.note_end(attempt)
        task.run_s += now - attempt.started_at
        if fault is not None and issubclass(fault.kind, REPLICA_FAULTS):
            self.suspect(replica_id)
        self._forecast.note_end(task, attempt, event, now)
        self._queue.unpark(task.key[0])
        return task, attempt

    # Attempts and replicas that go

    def running_on(self, replica_id: str) -> list[tuple[Task, Attempt]]:
        """The live tasks that run there and were not told to stop, oldest attempt first."""
        return [(task, attempt) for task, attempt in self._untold() if attempt.replica_id == replica_id]

    def _untold(self) -> Iterator[tuple[Task, Attempt]]:
        for attempt_id, attempt in self.attempts.items():
            task = self.owners[attempt_id]
            if task.attempt is attempt and attempt.broken_off is None:
                yield task, attempt

    def break_off(self, attempt: Attempt, reason: Fault) -> ev.Abort:
        """Have the attempt stop. It stays its task's, which waits again when the engine let go."""
        attempt.broken_off = reason
        self.preemption.withdraw(attempt)
        self._ledger.release_slot(attempt.attempt_id)
        return ev.Abort(attempt)

    def suspect(self, replica_id: str) -> None:
        """The replica failed a task: it takes none until it is told Ready again, and its caches count as lost."""
        self._fleet.suspect(replica_id)
        self.bindings.lose(replica_id)

    def remove_replica(self, replica_id: str) -> None:
        """The replica is no more, and no cache is left to be emptied there. Its attempts end when they end."""
        self._fleet.remove(replica_id)
        self.bindings.lose(replica_id)
        self._evictions = {place: key for place, key in self._evictions.items() if place[0] != replica_id}

    # Caches of sessions that are gone

    def forget_session(self, session: SessionKey) -> None:
        """What the session left in its slot is of no use any more."""
        if (place := self.bindings.forget(session)) is not None:
            self._evictions[place] = session

    def evict_idle(self, commands: list[ev.Command]) -> None:
        """A slot whose session is gone is emptied once its last task has let go of it, unless another works there."""
        if not self._evictions:
            return
        holders = {(a.replica_id, a.slot): self.owners[a.attempt_id] for a in self.attempts.values()}
        for place, session in list(self._evictions.items()):
            holder = holders.get(place)
            if holder is None:
                commands.append(ev.Evict(*place))
            if holder is None or holder.spec.session != session:
                del self._evictions[place]
