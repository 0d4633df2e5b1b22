"""Everything the service remembers of its tasks, found by (tenant, task_id), bounded in time and number.

A transcript expires first, its record later; a forgotten task was never there. What is live is never forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from llorch.domain.task import Task, TaskKey, WaitReason
from llorch.errors import NotFound
from llorch.service.ports import NO_SAMPLING, Completed
from llorch.service.prompts import Prompt
from llorch.service.routes import Route
from llorch.service.streams import TaskStream
from llorch.service.submission import Acceptance, Placement, Submission


@dataclass(slots=True, eq=False)
class Record:
    """One accepted task: what was asked, what the scheduler makes of it, and its stream.

    `number` grows with acceptance over all routes, `queue_position` is the place at acceptance, `accepted_wall` in
    seconds since the Unix epoch. `prompt` is given back when the task has ended. `replayed` tokens were made again by
    the newest attempt, and not sent again. `told` is the place, the reason and the time of the predicted start that
    readers of the waiting task heard last.
    """

    submission: Submission
    route: Route
    seed: int
    correlation_id: str
    accepted_wall: float
    prompt: Prompt | None
    stream: TaskStream = field(default_factory=TaskStream)
    number: int = 0
    task: Task | None = None
    queue_position: int = 0
    backoff_ms: int | None = None
    acceptance: Acceptance | None = None
    placement: Placement | None = None
    completed: Completed | None = None
    replayed: int = 0
    wait_reasons: list[WaitReason] = field(default_factory=list)
    told: tuple[int, WaitReason, float | None] | None = None

    @property
    def key(self) -> TaskKey:
        """(tenant, task_id)."""
        return self.submission.tenant, self.submission.task_id

    def free_prompt(self) -> None:
        """Give back what was only needed to run the task: the record may be kept much longer."""
        self.prompt = None
        self.submission = msgspec.structs.replace(self.submission, prompt=None, messages=(), sampling=NO_SAMPLING)

    def note_wait(self, reason: WaitReason) -> None:
        """Remember why the task waits, once for each change."""
        if not self.wait_reasons or self.wait_reasons[-1] is not reason:
            self.wait_reasons.append(reason)

    @property
    def placed(self) -> Placement:
        """Where the newest attempt runs; only a task that has started has one."""
        assert self.placement is not None
        return self.placement

    @property
    def admitted(self) -> Task:
        """The scheduler's view; only a record that is filed has one."""
        assert self.task is not None
        return self.task


@dataclass(frozen=True, slots=True)
class Retention:
    """How long finished things are kept, in seconds from their end, and how many records a tenant may have."""

    transcript_s: float = 300.0
    record_s: float = 3600.0
    records_per_tenant: int = 10_000


class Records:
    """The index of tasks."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._by_tenant: dict[str, dict[str, Record]] = {}
        self._by_number: dict[str, dict[int, Record]] = {}
        self._finished: dict[str, OrderedDict[str, Record]] = {}
        self._transcripts: OrderedDict[int, tuple[float, Record]] = OrderedDict()
        self._records: OrderedDict[int, tuple[float, Record]] = OrderedDict()
        self._last_number = 0

    def find(self, key: TaskKey) -> Record | None:
        """The record, if it is still kept."""
        tenant, task_id = key
        records = self._by_tenant.get(tenant)
        return None if records is None else records.get(task_id)

    def get(self, key: TaskKey) -> Record:
        """The record; raises NotFound for one that is not kept or is another tenant's."""
        record = self.find(key)
        if record is None:
            raise NotFound(f"there is no task {key[1]}")
        return record

    def file(self, record: Record) -> None:
        """Keep the record of a task that was admitted."""
        self._last_number += 1
        record.number = self._last_number
        tenant, task_id = record.key
        self._by_tenant.setdefault(tenant, {})[task_id] = record
        self._by_number.setdefault(tenant, {})[record.number] = record
        self._make_room(tenant)

    def settle(self, record: Record, now: float) -> float:
        """The task has ended: its time to be forgotten begins. Returns when the first of it is due."""
        tenant, task_id = record.key
        if tenant not in self._finished:
            self._finished[tenant] = OrderedDict()
        self._finished[tenant][task_id] = record
        gone_at, forgotten_at = now + self._retention.transcript_s, now + self._retention.record_s
        self._transcripts[record.number] = gone_at, record
        self._records[record.number] = forgotten_at, record
        return min(gone_at, forgotten_at)

    def newest_first(self, tenant: str, before: int | None) -> Iterator[Record]:
        """A tenant's records, from the one accepted last, or from the one before number `before`."""
        for number, record in reversed(self._by_number.get(tenant, {}).items()):
            if before is None or number < before:
                yield record

    def expire(self, now: float) -> None:
        """Forget what is due."""
        for record in _take_due(self._transcripts, now):
            record.stream.drop_transcript()
        for record in _take_due(self._records, now):
            self._forget(record)

    def next_expiry(self) -> float | None:
        """When there is something to forget, in the seconds of `now`."""
        dues = [next(iter(table.values()))[0] for table in (self._transcripts, self._records) if table]
        return min(dues, default=None)

    def _make_room(self, tenant: str) -> None:
        finished = self._finished.get(tenant)
        while finished and len(self._by_tenant[tenant]) > self._retention.records_per_tenant:
            self._forget(next(iter(finished.values())))

    def _forget(self, record: Record) -> None:
        tenant, task_id = record.key
        record.stream.drop_transcript()
        self._transcripts.pop(record.number, None)
        self._records.pop(record.number, None)
        del self._by_tenant[tenant][task_id]
        del self._by_number[tenant][record.number]
        self._finished[tenant].pop(task_id, None)
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant], self._by_number[tenant], self._finished[tenant]


def _take_due(table: OrderedDict[int, tuple[float, Record]], now: float) -> Iterator[Record]:
    """Take out what is due; entries stand in the order of their times."""
    while table:
        number, (due, record) = next(iter(table.items()))
        if due > now:
            return
        del table[number]
        yield record
