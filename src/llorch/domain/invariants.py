"""What must hold between the parts of a scheduler after every event; tests ask for it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from llorch.domain.fair_queue import FairQueue
from llorch.domain.ledger import Ledger
from llorch.domain.pool import Fleet
from llorch.domain.runs import Runs
from llorch.domain.task import SessionKey, Task, TaskKey, TaskState


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a scheduler that must agree."""

    tasks: Mapping[TaskKey, Task]
    runs: Runs
    sessions: Mapping[SessionKey, Collection[TaskKey]]
    queue: FairQueue
    fleet: Fleet
    ledger: Ledger


def broken_invariants(parts: Parts) -> Iterator[str]:
    """Say what does not add up. Costs O(tasks)."""
    yield from _broken_queue(parts)
    yield from _broken_tasks(parts)
    yield from _broken_leases(parts)


def _broken_queue(parts: Parts) -> Iterator[str]:
    waiting = [task.key for task in parts.queue]
    if len(waiting) != len(set(waiting)) or len(waiting) != len(parts.queue):
        yield f"waits more than once: {waiting}"
    queued = {key for key, task in parts.tasks.items() if task.state is TaskState.QUEUED}
    if queued != set(waiting):
        yield f"queued, but not waiting: {queued - set(waiting)}; waiting, but not queued: {set(waiting) - queued}"
    yield from parts.queue.check()


def _broken_tasks(parts: Parts) -> Iterator[str]:
    for key, task in parts.tasks.items():
        if task.state.is_final:
            yield f"{key} is {task.state} and still live"
        if (task.state is TaskState.RUNNING) != (task.attempt is not None):
            yield f"{key} is {task.state} with attempt {task.attempt}"
        if key not in parts.sessions.get(task.spec.session, ()):
            yield f"{key} is missing in its session"
    if sum(map(len, parts.sessions.values())) != len(parts.tasks):
        yield f"sessions name tasks that are not live: {parts.sessions}"


def _broken_leases(parts: Parts) -> Iterator[str]:
    yield from parts.ledger.check()
    leases = {lease.attempt_id: lease for lease in parts.ledger.leases()}
    attempts = parts.runs.attempts
    if attempts.keys() != leases.keys() & attempts.keys() or attempts.keys() != parts.runs.owners.keys():
        yield f"attempts {list(attempts)} of {list(parts.runs.owners)} hold the leases {list(leases)}"
    for attempt_id, attempt in attempts.items():
        lease = leases.get(attempt_id)
        task = parts.tasks.get(attempt.task)
        if lease is None or (lease.replica_id, lease.slot) != (attempt.replica_id, attempt.slot):
            yield f"attempt {attempt_id} has the lease {lease}"
        elif lease.releasing != (attempt.broken_off is not None or task is None or task.attempt is not attempt):
            yield f"attempt {attempt_id} of {attempt.task} releasing: {lease.releasing}"
    for replica in parts.fleet:
        slots = [a.slot for a in attempts.values() if a.replica_id == replica.replica_id]
        if len(slots) != len(set(slots)):
            yield f"{replica.replica_id} has a slot twice: {slots}"
