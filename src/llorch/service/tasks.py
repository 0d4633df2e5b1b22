"""Submit, cancel, look at and follow tasks."""

import base64
import binascii
import hashlib

from llorch.domain import events as ev
from llorch.domain.task import Priority, TaskSpec, TaskState
from llorch.errors import Conflict, InvalidParams, LlorchError, PayloadTooLarge, PoolUnready, QuotaExceeded
from llorch.service.dispatcher import Dispatcher
from llorch.service.frames import predicted_ms
from llorch.service.limits import Limits
from llorch.service.patience import told
from llorch.service.pools import Pools
from llorch.service.ports import Clock
from llorch.service.prompts import (
    UNREACHABLE,
    Prompt,
    check_prompt,
    estimated_tokens,
    fits_by_bytes,
    unchecked_prompt,
)
from llorch.service.records import Record
from llorch.service.routes import Route
from llorch.service.streams import OpenReaders, Reader
from llorch.service.submission import Acceptance, Submission, TaskView, Timeline
from llorch.telemetry import Telemetry

SEEDS = 2**32 - 1
"""Seeds are 0 … SEEDS - 1; llama.cpp draws at random for SEEDS itself."""


class Tasks:
    """What a client can do with tasks. Another tenant's task is NotFound."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        pools: Pools,
        limits: Limits,
        readers: OpenReaders,
        telemetry: Telemetry,
        clock: Clock,
    ) -> None:
        self._dispatcher = dispatcher
        self._records = dispatcher.records
        self._pools = pools
        self._limits = limits
        self._readers = readers
        self._telemetry = telemetry
        self._clock = clock

    async def submit(self, submission: Submission, correlation_id: str) -> Acceptance:
        """Admit the task, or raise why not and change nothing.

        1. known already: the stored answer, or Conflict. 2. the route. 3. what can be said without an engine. 4. the
        context, which may ask an engine. 5. known in the meantime? 6. the scheduler's decision.
        """
        try:
            found = self._replay(submission) or await self._prepare(submission, correlation_id)
            found = self._replay(submission) or found
        except LlorchError as error:
            self._telemetry.observe_rejection(
                error.engine,
                error.code,
                policy=error.policy_label,
                tenant=submission.tenant,
                task_id=submission.task_id,
                correlation_id=correlation_id,
            )
            raise
        if isinstance(found, Acceptance):
            await self._dispatcher.commit()
            return found
        try:
            return await self._dispatcher.submit(found, ev.TaskSubmitted(_spec_of(found)))
        except PoolUnready as error:
            raise self._pools.explain(found.route.route_id, error) from error

    async def _prepare(self, submission: Submission, correlation_id: str) -> Record:
        route = self._pools.routes.resolve(submission.model_ref, submission.engine, submission.workload)
        try:
            self._check_wishes(submission, route)
            prompt = await self._check_context(submission, route)
        except LlorchError as error:
            error.engine = error.engine or route.engine
            raise
        return Record(
            submission=submission,
            route=route,
            seed=_seed_of(submission),
            correlation_id=correlation_id,
            accepted_wall=self._clock.wall(),
            prompt=prompt,
        )

    async def cancel(self, tenant: str, task_id: str) -> None:
        """End the task if it has not ended. Idempotent; raises NotFound."""
        record = self._records.get((tenant, task_id))
        self._dispatcher.post(record.route.route_id, ev.CancelRequested(record.key))
        await self._dispatcher.commit()

    def get(self, tenant: str, task_id: str) -> TaskView:
        """The task as it is now; raises NotFound."""
        return self._view(self._records.get((tenant, task_id)))

    def list(
        self, tenant: str, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> tuple[list[TaskView], str | None]:
        """A page of tasks, newest first, and the cursor of the next; InvalidParams for a foreign cursor."""
        page: list[TaskView] = []
        last = 0
        for record in self._records.newest_first(tenant, None if cursor is None else _number_of(cursor)):
            if state not in (None, record.admitted.state):
                continue
            if session_id not in (None, record.submission.session_id):
                continue
            if len(page) == limit:
                return page, _cursor_of(last)
            page.append(self._view(record))
            last = record.number
        return page, None

    def follow(self, tenant: str, task_id: str, after: int) -> Reader | None:
        """A reader behind frame `after`, or None when that was the terminal frame.

        Raises NotFound, StreamGone, InvalidParams for a frame that never was, QuotaExceeded when too many streams are
        open. The caller must call the reader's `leave`.
        """
        record = self._records.get((tenant, task_id))
        stream = record.stream
        if not stream.is_gone and after > stream.last_id:
            raise InvalidParams(f"frame {after} was never sent; the newest is {stream.last_id}")
        if stream.is_closed and after and after == stream.last_id:
            return None
        if (count := self._readers.count(tenant)) >= self._limits.open_streams:
            raise QuotaExceeded(f"{count} streams are open already", policy_label="open-streams")
        return self._join(record, after)

    def _join(self, record: Record, after: int) -> Reader:
        def on_leave() -> None:
            self._readers.discard(reader)
            if self._records.find(record.key) is record:
                self._dispatcher.post(route_id, ev.FollowerLeft(record.key))

        route_id = record.route.route_id
        reader = record.stream.join(after, on_leave)
        self._readers.add(reader, record.submission.tenant)
        self._dispatcher.post(route_id, ev.FollowerJoined(record.key))
        self._dispatcher.advice.tell(record)
        return reader

    def _replay(self, submission: Submission) -> Acceptance | None:
        record = self._records.find((submission.tenant, submission.task_id))
        if record is None:
            return None
        if record.submission.digest != submission.digest:
            raise Conflict(f"task {submission.task_id} was submitted before with another body")
        return record.acceptance

    def _check_wishes(self, submission: Submission, route: Route) -> None:
        """Refuse what this route or service can never do."""
        if submission.max_tokens > self._limits.max_tokens:
            raise InvalidParams(
                f"max_tokens {submission.max_tokens} is more than a transcript holds, {self._limits.max_tokens}",
                details={"max_tokens": submission.max_tokens, "limit": self._limits.max_tokens},
            )
        if submission.expected_tokens is not None and submission.expected_tokens > submission.max_tokens:
            raise InvalidParams("expected_tokens is more than max_tokens", details={"field": "expected_tokens"})
        if submission.strict and not route.can_be_strict:
            raise InvalidParams(f"no replica of {route.model!r} is exact: strict tasks cannot run there")
        wanted = submission.sampler_profile_version
        if wanted not in (None, route.sampler_profile_version):
            raise InvalidParams(
                f"sampler profile {wanted!r} is not served; this route has {route.sampler_profile_version!r}",
                details={"sampler_profile_version": route.sampler_profile_version},
            )
        self._check_prompt_form(submission, route)

    def _check_prompt_form(self, submission: Submission, route: Route) -> None:
        sampling = submission.sampling
        if sampling.grammar is not None and sampling.json_schema is not None:
            raise InvalidParams("grammar and json_schema exclude each other", details={"field": "sampling"})
        for feature, wish in (("grammar", sampling.grammar), ("json_schema", sampling.json_schema)):
            if wish is not None and feature not in route.features:
                raise InvalidParams(f"this route has no {feature}", details={"field": f"sampling.{feature}"})
        if submission.prompt is None and not submission.messages:
            raise InvalidParams("a completion needs prompt or messages", details={"field": "inputs"})
        length = len(submission.prompt or "") + sum(len(message.content) for message in submission.messages)
        if length > self._limits.prompt_chars:
            raise PayloadTooLarge(f"the prompt has {length} characters; at most {self._limits.prompt_chars} are taken")

    async def _check_context(self, submission: Submission, route: Route) -> Prompt:
        """The prompt, checked if an engine could be asked or need not be; else it is checked before Start."""
        prompt = unchecked_prompt(submission, route)
        engine = self._pools.ready_engine(route.route_id)
        if engine is None or fits_by_bytes(prompt):
            return prompt
        try:
            return await check_prompt(prompt, engine)
        except UNREACHABLE:
            return prompt

    def _view(self, record: Record) -> TaskView:
        task, submission = record.admitted, record.submission
        position = wait = None
        if task.state is TaskState.QUEUED:
            scheduler = self._dispatcher.schedulers[record.route.route_id]
            record.note_wait(scheduler.wait_reason(task))
            position = scheduler.queue.position(task)
            wait, _ = scheduler.predict(task, self._dispatcher.now())
        completed = record.completed if task.state is TaskState.SUCCEEDED else None
        return TaskView(
            task_id=submission.task_id,
            session_id=submission.session_id,
            state=task.state,
            workload=submission.workload,
            priority=submission.priority,
            model_ref=submission.model_ref,
            engine=record.route.engine,
            strict=submission.strict,
            seed=record.seed,
            max_tokens=submission.max_tokens,
            deadline_ms=submission.deadline_ms,
            labels=submission.labels,
            correlation_id=record.correlation_id,
            timeline=self._timeline(record),
            placement=record.placement,
            queue_position=position,
            predicted_start_ms=predicted_ms(wait),
            output=record.stream.output() if task.state.is_final and not record.stream.is_gone else None,
            finish_reason=completed.finish_reason if completed else None,
            usage=completed.usage if completed else None,
            fault=None if task.fault is None else told(task.fault, submission.task_id),
        )

    def _timeline(self, record: Record) -> Timeline:
        task = record.admitted
        until = next(t for t in (task.started_at, task.ended_at, self._dispatcher.now()) if t is not None)

        def wall(at: float | None) -> float | None:
            return None if at is None else record.accepted_wall + (at - task.accepted_at)

        return Timeline(
            accepted_at=record.accepted_wall,
            started_at=wall(task.started_at),
            first_token_at=wall(task.first_token_at),
            ended_at=wall(task.ended_at),
            waited_ms=round((until - task.accepted_at) * 1000),
            wait_reasons=tuple(record.wait_reasons),
            attempts=task.attempts,
            preemptions=task.preemptions,
        )


def _spec_of(record: Record) -> TaskSpec:
    submission, prompt, sampling = record.submission, record.prompt, record.submission.sampling
    assert prompt is not None
    unread = submission.on_disconnect or ("cancel" if submission.priority is Priority.INTERACTIVE else "continue")
    return TaskSpec(
        key=(submission.tenant, submission.task_id),
        session=(submission.tenant, submission.session_id),
        priority=submission.priority,
        max_tokens=submission.max_tokens,
        expected_tokens=submission.expected_tokens or submission.max_tokens,
        prompt_tokens=estimated_tokens(prompt),
        strict=submission.strict,
        deadline_s=None if submission.deadline_ms is None else submission.deadline_ms / 1000,
        abort_late=submission.abort_late,
        cancel_unread=unread == "cancel",
        can_continue=sampling.grammar is None and sampling.json_schema is None,
        wants_warm=submission.kv_hint != "cold",
        budgets=submission.budgets,
    )


def _seed_of(submission: Submission) -> int:
    if submission.seed is not None:
        return submission.seed
    return int.from_bytes(hashlib.sha256(submission.task_id.encode()).digest()[:8]) % SEEDS


def _cursor_of(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(8)).rstrip(b"=").decode()


def _number_of(cursor: str) -> int:
    try:
        number = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except (binascii.Error, ValueError):
        number = b""
    if len(number) != 8:
        raise InvalidParams("this cursor is not one that was given out", details={"field": "cursor"})
    return int.from_bytes(number)
