"""Every metric and every log line about tasks and replicas: they hang on the events and commands of the schedulers.

It only watches. It keeps what it needs to label a running attempt until that attempt ended, and nothing that grows.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from structlog.typing import FilteringBoundLogger

from llorch.domain import events as ev
from llorch.domain.faults import MOVED, PREEMPTED
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Cohort, Fault, Priority, Task, TaskKey, TaskState
from llorch.errors import DecodeTimeout, Forbidden
from llorch.telemetry_engines import EngineMetrics
from llorch.telemetry_log import writer_of
from llorch.telemetry_metrics import CONTENT_TYPE, Family, Metrics, Sample, Series
from llorch.telemetry_shares import Flow, Shares
from llorch.telemetry_slo import Got, SloWindows, Window

__all__ = ["CONTENT_TYPE", "UNVERIFIED", "Family", "RouteScope", "Sample", "Telemetry", "Window"]

UNVERIFIED = "unverified"
"""Label of an engine version that nobody stated or measured."""

NO_ENGINE = "none"
"""Label where no route was found."""

DROPS = frozenset({"drop-lru", "shed-low-priority", "fair-share"})
"""Policies by which an admitted task loses its place in a full queue to another one."""

SHED = "shed-low-priority"

Describe = Callable[[TaskKey], Mapping[str, Any]]
"""Log fields of a task that the domain does not know, such as its correlation_id; empty when the task is unknown."""


@dataclass(frozen=True, slots=True)
class RouteScope:
    """What the events of one route are labelled with, and what its tokens weigh in shares."""

    route_id: str
    engine: str
    model: str
    prompt_cost: float = 1.0
    output_cost: float = 2.0


@dataclass(slots=True)
class _Place:
    """What the attempts of one priority on one replica have in common: labels, and series that are looked up once."""

    replica: Replica
    labels: tuple[str, str, str]
    started: Series
    tokens_in: Series
    tokens_out: Series
    tokens_replayed: Series
    first_token: Series
    decode: Series


@dataclass(slots=True)
class _Run:
    """An attempt that has not ended, and where it runs."""

    attempt_id: int
    place: _Place
    accepted_at: float
    flow: Flow
    fault: Fault | None = None
    is_over: bool = False
    is_aborted: bool = False
    made_room: bool = False

    def outcome(self, fault: Fault | None) -> str:
        """How the attempt ended: as it was told to, or else as it says itself."""
        if self.is_aborted:
            is_late = self.fault is not None and self.fault.kind is DecodeTimeout
            return DecodeTimeout.code if is_late else "aborted"
        return "completed" if fault is None else fault.kind.code


@dataclass(slots=True)
class _Live:
    """The attempts that have not ended, and the latest attempt of each task that has started and not ended."""

    attempts: dict[int, _Run] = field(default_factory=dict)
    tasks: dict[TaskKey, _Run] = field(default_factory=dict)


class Telemetry:
    """Metrics and log lines of one server.

    `families` are the contract's declarations, `routes` those of the configuration, `describe` adds the log fields of a
    task. Raises KeyError when a family that moves here is not declared.
    """

    def __init__(
        self,
        families: Sequence[Family],
        routes: Iterable[RouteScope],
        log: FilteringBoundLogger,
        describe: Describe,
        *,
        overflow_label: str = "other",
        overflow_family: str = "label_overflow_total",
    ) -> None:
        self._metrics = Metrics(families, overflow_label=overflow_label, overflow_family=overflow_family)
        self._scopes = {scope.route_id: scope for scope in routes}
        self._log = log
        self._write = writer_of(log)
        self._tells_info = log.is_enabled_for(logging.INFO)
        self._tells_warnings = log.is_enabled_for(logging.WARNING)
        self._describe = describe
        self._live = _Live()
        self._replicas: dict[str, Replica] = {}
        self._places: dict[tuple[str, Priority], _Place] = {}
        instrument = self._metrics.instrument
        self._enqueued = instrument("tasks_enqueued_total")
        self._started = instrument("tasks_started_total")
        self._finished = instrument("tasks_finished_total")
        self._missed = instrument("deadlines_missed_total")
        self._canceled = instrument("tasks_canceled_total")
        self._rejected = instrument("tasks_rejected_total")
        self._backpressure = instrument("admission_backpressure_events_total")
        self._attempts = instrument("attempts_total")
        self._wait = instrument("task_wait_ms")
        self._first_token = instrument("latency_first_token_ms")
        self._decode = instrument("latency_decode_ms")
        self._tokens_in = instrument("tokens_in_total")
        self._tokens_out = instrument("tokens_out_total")
        self._tokens_replayed = instrument("tokens_replayed_total")
        self._dropped = instrument("tasks_dropped_total")
        self._preemptions = instrument("preemptions_total")
        self._moved = instrument("tasks_moved_total")
        self._resumptions = instrument("resumptions_total")
        self._affinity = instrument("session_affinity_total")
        self._prediction = instrument("predicted_start_error_ms")
        self._requests = instrument("http_requests_total")
        flows = next(family.max_series for family in families if family.name == "admission_share")
        self._shares = Shares(flows, (overflow_label, overflow_label))
        self._deadlines: dict[Priority, list[int]] = {}
        self._slo = SloWindows()
        self.engines = EngineMetrics(self._metrics, UNVERIFIED)

    def set_routes(self, routes: Iterable[RouteScope]) -> None:
        """These are the routes from now on; one that has closed keeps its labels for what is still to come of it."""
        self._scopes |= {scope.route_id: scope for scope in routes}

    def slo(self, route_id: str, cohort: Cohort, priority: Priority, now: float) -> Window | None:
        """What the tasks of a replica set got of late; None when none ended."""
        return self._slo.look((route_id, cohort, priority), now)

    def observe(self, route_id: str, event: ev.Event, commands: Sequence[ev.Command], now: float) -> None:
        """Take note of an event and of what the route's scheduler made of it. `now` in the scheduler's seconds."""
        if isinstance(event, ev.TokensProduced):
            run = self._live.attempts.get(event.attempt_id)
            if run is not None:
                run.place.tokens_out.inc(event.count)
                self._shares.add(run.flow, self._scopes[route_id].output_cost * event.count, now)
            return
        scope = self._scopes[route_id]
        self._observe_event(scope, event, now)
        for command in commands:
            self._observe_command(scope, command, now)

    def observe_usage(self, attempt_id: int, prompt_tokens: int) -> None:
        """Count the prompt tokens that the engine told; before the attempt's AttemptEnded is observed, else ignored."""
        run = self._live.attempts.get(attempt_id)
        if run is not None:
            run.place.tokens_in.inc(prompt_tokens)

    def observe_replay(self, attempt_id: int, tokens: int) -> None:
        """Count tokens that an attempt made again; before the attempt's AttemptEnded is observed, else ignored."""
        run = self._live.attempts.get(attempt_id)
        if run is not None:
            run.place.tokens_replayed.inc(tokens)

    def observe_rejection(
        self,
        engine: str | None,
        code: str,
        *,
        policy: str | None = None,
        tenant: str | None = None,
        task_id: str | None = None,
        correlation_id: str | None = None,
    ) -> None:
        """Take note of a submission that was refused before a scheduler saw it. `engine` is None without a route."""
        fields = {"tenant": tenant, "task_id": task_id, "correlation_id": correlation_id, "engine": engine}
        self._reject(engine or NO_ENGINE, code, policy, fields)

    def observe_request(self, operation: str, status: int, code: str | None = None) -> None:
        """Count an answered request; `operation` is an operationId of the contract, or `none`, `code` that of an error.

        A key that may not submit is refused by the edge, before anything that would tell of a rejection.
        """
        self._requests.series(operation, str(status)).inc()
        if code == Forbidden.code and operation == "create_task":
            self._rejected.series(Forbidden.code, NO_ENGINE).inc()

    def report_bug(self, where: str, error: BaseException) -> None:
        """Log an exception that nobody foresaw. Its message stays out: it may quote a request."""
        self._log.error("unforeseen_error", where=where, exc_info=error)

    def render(self, samples: Iterable[Sample]) -> bytes:
        """The text of a scrape (CONTENT_TYPE), with the gauges as they are now."""
        return self._metrics.render(chain(samples, self._own_gauges()))

    def _own_gauges(self) -> Iterator[Sample]:
        for flow, share in self._shares:
            yield Sample("admission_share", flow, share)
        for priority, (met, ended) in self._deadlines.items():
            yield Sample("deadlines_met_ratio", (priority,), met / ended)

    # Events

    def _observe_event(self, scope: RouteScope, event: ev.Event, now: float) -> None:
        match event:
            case ev.FirstToken():
                run = self._live.attempts.get(event.attempt_id)
                if run is not None and not run.is_over:
                    run.place.first_token.observe((now - run.accepted_at) * 1000)
            case ev.AttemptEnded():
                self._end_attempt(event)
            case ev.ReplicaChanged():
                self._note_replica(scope, event.replica)
            case ev.ShutdownRequested():
                self._log.info("shutdown_requested", route=scope.route_id, engine=scope.engine, grace_s=event.grace_s)
            case _:
                pass

    def _end_attempt(self, event: ev.AttemptEnded) -> None:
        run = self._live.attempts.pop(event.attempt_id, None)
        if run is not None:
            self._attempts.series(run.outcome(event.fault), *run.place.labels).inc()

    def _note_replica(self, scope: RouteScope, replica: Replica) -> None:
        before = self._replicas.get(replica.replica_id)
        self._replicas[replica.replica_id] = replica
        if before is not None and before.state is replica.state:
            return
        is_bad = replica.state in (ReplicaState.UNREADY, ReplicaState.FAILED)
        (self._log.warning if is_bad else self._log.info)(
            "replica_changed",
            route=scope.route_id,
            engine=scope.engine,
            pool_id=replica.pool_id,
            replica_id=replica.replica_id,
            was=before.state.value if before is not None else None,
            state=replica.state.value,
            slots=replica.slots,
            engine_version=replica.cohort.engine_version,
            model_digest=replica.cohort.model_digest,
            exact=replica.cohort.exact,
        )

    # Commands

    def _observe_command(self, scope: RouteScope, command: ev.Command, now: float) -> None:
        match command:
            case ev.Admit():
                self._enqueued.series(command.task.priority).inc()
            case ev.Start():
                self._start(scope, command, now)
            case ev.Finish():
                self._finish(scope, command.task)
            case ev.Abort():
                run = self._live.attempts.get(command.attempt.attempt_id)
                if run is not None:
                    run.is_aborted = True
            case ev.Requeue():
                self._requeue(scope, command)
            case ev.Reject():
                fault = command.fault
                self._reject(scope.engine, fault.kind.code, fault.policy_label, self._fields(scope, command.task))

    def _start(self, scope: RouteScope, command: ev.Start, now: float) -> None:
        task, attempt = command.task, command.attempt
        place = self._place(scope, self._replicas[attempt.replica_id], task.priority)
        run = _Run(attempt.attempt_id, place, task.accepted_at, (task.key[0], task.priority))
        before = self._live.tasks.get(task.key)
        self._live.attempts[attempt.attempt_id] = run
        self._live.tasks[task.key] = run
        if before is not None and before.made_room:
            self._resumptions.series(scope.engine).inc()
        if attempt.affinity is not None:
            self._affinity.series(attempt.affinity, scope.engine).inc()
        waited_ms = (now - task.accepted_at) * 1000
        if task.attempts == 1:
            place.started.inc()
            self._wait.series(task.priority).observe(waited_ms)
            self._shares.add(run.flow, scope.prompt_cost * task.prompt_tokens, now)
            if task.predicted_wait is not None:
                late_ms = waited_ms - task.predicted_wait.mean_s * 1000
                self._prediction.series(task.priority, "early" if late_ms < 0 else "late").observe(abs(late_ms))
        if self._tells_info:
            fields = self._task_fields(scope, task, run)
            fields["waited_ms"] = round(waited_ms, 1)
            self._write("info", "task_started", fields)

    def _place(self, scope: RouteScope, replica: Replica, priority: Priority) -> _Place:
        place = self._places.get((replica.replica_id, priority))
        if place is None or place.replica is not replica:
            labels = (scope.engine, replica.cohort.engine_version or UNVERIFIED, replica.pool_id)
            place = self._places[replica.replica_id, priority] = _Place(
                replica,
                labels,
                started=self._started.series(*labels, priority),
                tokens_in=self._tokens_in.series(*labels),
                tokens_out=self._tokens_out.series(*labels),
                tokens_replayed=self._tokens_replayed.series(*labels),
                first_token=self._first_token.series(*labels, priority),
                decode=self._decode.series(*labels, priority),
            )
        return place

    def _requeue(self, scope: RouteScope, command: ev.Requeue) -> None:
        run, fault = self._live.tasks.get(command.task.key), command.fault
        is_preempted = fault.policy_label == PREEMPTED.policy_label
        is_moved = fault.policy_label == MOVED.policy_label
        if is_preempted:
            self._preemptions.series("hard", scope.engine).inc()
        if is_moved:
            self._moved.series(scope.engine).inc()
        if run is not None:
            run.made_room = is_preempted or is_moved
        fields = self._task_fields(scope, command.task, run)
        write = self._log.info if is_preempted or is_moved else self._log.warning
        write("task_requeued", **fields, code=fault.kind.code, policy=fault.policy_label)

    def _finish(self, scope: RouteScope, task: Task) -> None:
        run = self._live.tasks.pop(task.key, None)
        fault = task.fault
        if run is not None:
            run.is_over, run.fault = True, fault
            engine, version, _ = run.place.labels
            self._finished.series(engine, version, task.state.value).inc()
            if task.state is TaskState.SUCCEEDED and task.first_token_at is not None and task.ended_at is not None:
                run.place.decode.observe((task.ended_at - task.first_token_at) * 1000)
            if task.state is not TaskState.CANCELED:
                self._slo.note((scope.route_id, run.place.replica.cohort, task.priority), _got(task))
        if task.state is TaskState.CANCELED:
            policy = fault.policy_label if fault is not None else None
            self._canceled.series(policy or "client").inc()
        elif fault is not None and fault.policy_label in DROPS:
            self._dropped.series(fault.policy_label, scope.engine).inc()
            if fault.policy_label == SHED:
                self._preemptions.series("soft", scope.engine).inc()
        if task.spec.deadline_s is not None:
            self._note_deadline(task)
        self._tell_end(scope, task, run)

    def _note_deadline(self, task: Task) -> None:
        is_late = _is_late(task)
        if is_late:
            self._missed.series(task.priority).inc()
        if task.state is not TaskState.CANCELED:
            counts = self._deadlines.setdefault(task.priority, [0, 0])
            counts[0] += task.state is TaskState.SUCCEEDED and not is_late
            counts[1] += 1

    def _tell_end(self, scope: RouteScope, task: Task, run: _Run | None) -> None:
        fault, is_bad = task.fault, task.state is TaskState.FAILED
        if not (self._tells_warnings if is_bad else self._tells_info):
            return
        fields = self._task_fields(scope, task, run)
        fields |= {
            "state": task.state.value,
            "code": fault.kind.code if fault is not None else None,
            "policy": fault.policy_label if fault is not None else None,
            "tokens_out": task.tokens_out,
            "first_token_ms": _ms(task.accepted_at, task.first_token_at),
            "took_ms": _ms(task.accepted_at, task.ended_at),
        }
        self._write("warning" if is_bad else "info", "task_ended", fields)

    def _reject(self, engine: str, code: str, policy: str | None, fields: Mapping[str, Any]) -> None:
        self._rejected.series(code, engine).inc()
        if policy is not None:
            self._backpressure.series(policy, engine).inc()
        self._log.info("task_rejected", **fields, code=code, policy=policy)

    # Log fields

    def _fields(self, scope: RouteScope, key: TaskKey) -> dict[str, Any]:
        tenant, task_id = key
        fields = {**self._describe(key), "tenant": tenant, "task_id": task_id}
        fields["route"], fields["engine"] = scope.route_id, scope.engine
        return fields

    def _task_fields(self, scope: RouteScope, task: Task, run: _Run | None) -> dict[str, Any]:
        """Who, what and, once it has started, where."""
        fields = self._fields(scope, task.key)
        fields["session_id"] = task.spec.session[1]
        fields["model"] = scope.model
        fields["priority"] = str(task.priority)
        fields["attempts"] = task.attempts
        if run is not None:
            replica = run.place.replica
            fields["engine_version"] = replica.cohort.engine_version
            fields["pool_id"] = replica.pool_id
            fields["replica_id"] = replica.replica_id
            fields["attempt"] = run.attempt_id
        return fields


def _got(task: Task) -> Got:
    assert task.ended_at is not None
    since = task.accepted_at
    return Got(
        ended_at=task.ended_at,
        first_token_s=None if task.first_token_at is None else task.first_token_at - since,
        total_s=task.ended_at - since if task.state is TaskState.SUCCEEDED else None,
        is_failed=task.state is TaskState.FAILED,
    )


def _is_late(task: Task) -> bool:
    """The task had a deadline, and it passed before the task ended, whatever ended it."""
    deadline_s = task.spec.deadline_s
    return deadline_s is not None and task.ended_at is not None and task.ended_at - task.accepted_at >= deadline_s


def _ms(since: float, until: float | None) -> float | None:
    return None if until is None else round((until - since) * 1000, 1)
