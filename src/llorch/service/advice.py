"""What readers of a task are told of the moment: where it waits and for how long, what became of it on the way.

Only tasks that somebody reads are looked at again, at most each ADVICE_INTERVAL_S, however many wait. Frames tell it;
the numbers are the scheduler's and the Ledger's.
"""

import asyncio
from collections.abc import Mapping

from llorch.domain.ledger import Ledger
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Attempt, TaskState, WaitReason
from llorch.service import frames
from llorch.service.ports import Clock
from llorch.service.records import Record

ADVICE_INTERVAL_S = 1.0
"""Waiting readers hear of a new place or a new prediction at most this often."""

NEWS_S, NEWS_SHARE = 1.0, 0.25
"""A predicted start is news when it moved by more than this many seconds and this share of the time until then."""

Standing = tuple[int, WaitReason, float | None]
"""Place, reason, and the monotonic time of the predicted start."""


class Advice:
    """Tells the readers of all tasks. `close` it at the end."""

    def __init__(self, schedulers: Mapping[str, Scheduler], ledger: Ledger, clock: Clock) -> None:
        self._schedulers = schedulers
        self._ledger = ledger
        self._clock = clock
        self._waiting: set[Record] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Tasks that are looked at again: those that wait and are read, and some that did until lately."""
        return len(self._waiting)

    def tell(self, record: Record) -> None:
        """Tell the readers how the task stands now; a new reader has heard nothing yet."""
        task = record.admitted
        if task.state is TaskState.QUEUED:
            record.told = None
            self._tell_waiting(record)
        elif task.state is TaskState.RUNNING and record.stream.readers:
            self.tell_running(record)

    def tell_running(self, record: Record) -> None:
        """Tell what is known of a running attempt, if anything is."""
        attempt = record.admitted.attempt
        if attempt is None or not record.stream.readers:
            return
        known = self._known(record, attempt)
        if known:
            record.stream.advise("metrics", known)

    def tell_broken_off(self, record: Record) -> None:
        """The task made room for more urgent work and waits again."""
        if record.stream.readers:
            spec = record.admitted.spec
            depth = len(self._schedulers[record.route.route_id].queue)
            resumable = spec.strict or spec.can_continue
            record.stream.advise("metrics", {"queue_depth": depth, "preempted": True, "resumable": resumable})
            self._waiting.add(record)

    def plan(self) -> None:
        """Something may have changed for those who wait: look after them soon."""
        if self._timer is None and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(ADVICE_INTERVAL_S, self._tell_all)

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell_all(self) -> None:
        self._timer = None
        self._waiting = {
            record for record in self._waiting if record.stream.readers and record.admitted.state is TaskState.QUEUED
        }
        for record in self._waiting:
            self._tell_waiting(record)

    def _tell_waiting(self, record: Record) -> None:
        """Note why the task waits; tell its readers when that, its place or its predicted start is news."""
        task, now = record.admitted, self._clock.monotonic()
        scheduler = self._schedulers[record.route.route_id]
        reason = scheduler.wait_reason(task)
        record.note_wait(reason)
        if not record.stream.readers:
            return
        self._waiting.add(record)
        position = scheduler.queue.position(task)
        wait, on_time = scheduler.predict(task, now)
        start_at = None if wait is None else now + wait.mean_s
        if record.told is not None and not _is_news(record.told, (position, reason, start_at), now):
            return
        record.told = position, reason, start_at
        advice = [("queued", frames.queued(position, reason, wait))]
        budgets = self._ledger.budgets_left(task.spec.session, now)
        if on_time is not None or budgets is not None:
            depth = len(scheduler.queue)
            advice.append(("metrics", frames.metrics(queue_depth=depth, on_time=on_time, left=budgets)))
        record.stream.advise_all(advice)

    def _known(self, record: Record, attempt: Attempt) -> dict[str, object]:
        known: dict[str, object] = {}
        if attempt.tokens_before or record.admitted.preemptions:
            known["preempted"] = False
        if attempt.affinity is not None:
            known |= {"affinity": attempt.affinity.value, "kv_warmth": attempt.kv_warmth}
        budgets = self._ledger.budgets_left(record.admitted.spec.session, self._clock.monotonic())
        if budgets is not None:
            known["budgets"] = frames.budgets(budgets)
        return known


def _is_news(told: Standing, now_is: Standing, now: float) -> bool:
    if told[:2] != now_is[:2]:
        return True
    before, after = told[2], now_is[2]
    if before is None or after is None:
        return before is not after
    return abs(after - before) > max(NEWS_S, NEWS_SHARE * (after - now))
