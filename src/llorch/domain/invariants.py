"""What must hold between the parts of a scheduler after every event; tests ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llorch.domain.task import TaskState

if TYPE_CHECKING:
    from llorch.domain.scheduler import Scheduler


def broken_invariants(scheduler: Scheduler) -> Iterator[str]:
    """Say what does not add up. Costs O(tasks)."""
    yield from _broken_tasks(scheduler)
    yield from _broken_leases(scheduler)


def _broken_tasks(scheduler: Scheduler) -> Iterator[str]:
    waiting = [task.key for task in scheduler.queue]
    if len(waiting) != len(set(waiting)) or len(waiting) != len(scheduler.queue):
        yield f"waits more than once: {waiting}"
    if not set(waiting) <= scheduler.tasks.keys():
        yield f"waiting but not live: {set(waiting) - scheduler.tasks.keys()}"
    for key, task in scheduler.tasks.items():
        if task.state.is_final:
            yield f"{key} is {task.state} and still live"
        if (task.state is TaskState.QUEUED) != (key in waiting):
            yield f"{key} is {task.state}, in the queue: {key in waiting}"
        if (task.state is TaskState.RUNNING) != (task.attempt is not None):
            yield f"{key} is {task.state} with attempt {task.attempt}"
        if key not in scheduler.sessions.get(task.spec.session, ()):
            yield f"{key} is missing in its session"


def _broken_leases(scheduler: Scheduler) -> Iterator[str]:
    leases = {lease.attempt_id: lease for lease in scheduler.ledger.leases()}
    for attempt_id, attempt in scheduler.attempts.items():
        lease = leases.get(attempt_id)
        if lease is None or lease.replica_id != attempt.replica_id:
            yield f"attempt {attempt_id} has the lease {lease}"
        elif lease.releasing != (scheduler.running(attempt.task, attempt_id) is None):
            yield f"attempt {attempt_id} of {attempt.task} releasing: {lease.releasing}"
    for replica in scheduler.fleet:
        slots = [a.slot for a in scheduler.attempts.values() if a.replica_id == replica.replica_id]
        if len(slots) != len(set(slots)):
            yield f"{replica.replica_id} has a slot twice: {slots}"
