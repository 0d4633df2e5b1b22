"""ORCH-3027, ORCH-3028, ORCH-3225: metrics and log lines follow the events."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llorch import telemetry_log
from llorch.domain import events as ev
from llorch.domain.faults import MOVED, PREEMPTED
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import QueuePolicy, RoutePolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import (
    ANYWHERE,
    Affinity,
    Attempt,
    Cohort,
    Estimate,
    Fault,
    Priority,
    Task,
    TaskKey,
    TaskSpec,
    TaskState,
)
from llorch.errors import AdmissionReject, DecodeTimeout, InvalidParams, WorkerReset
from llorch.telemetry import RouteScope, Sample, Telemetry
from llorch.telemetry_metrics import Family
from llorch_contract.metrics import FAMILIES

ROUTE = "llamacpp/m"
COHORT = Cohort("b1", "sha256:aa", exact=True)
PLACE = {"engine": "llamacpp", "engine_version": "b1", "pool": "p"}
Labels = dict[str, str]


@dataclass
class Watched:
    """A real scheduler whose every event and command the telemetry sees, as the dispatcher does it."""

    families: Sequence[Family] = FAMILIES
    capacity: int = 4
    now: float = 100.0
    out: io.BytesIO = field(default_factory=io.BytesIO)

    def __post_init__(self) -> None:
        policy = RoutePolicy(QueuePolicy(dict.fromkeys(Priority, self.capacity)), wall_s=60.0, attempts=2)
        self.scheduler = Scheduler(policy, Ledger(SessionLimits()))
        log = telemetry_log.make_logger("info", "json", stream=self.out)
        scope = RouteScope(ROUTE, "llamacpp", "m")
        self.telemetry = Telemetry(self.families, [scope], log, lambda key: {"correlation_id": f"of {key[1]}"})

    def post(self, event: ev.Event, *, after_s: float = 0.0) -> list[ev.Command]:
        self.now += after_s
        commands = self.scheduler.handle(event, self.now)
        self.telemetry.observe(ROUTE, event, commands, self.now)
        return commands

    def ready(self, name: str = "p/0", *, slots: int = 1, state: ReplicaState = ReplicaState.READY) -> None:
        self.post(ev.ReplicaChanged(Replica(name, "p", slots, COHORT, state)))

    def submit(self, name: str, priority: Priority = Priority.INTERACTIVE, **wishes: Any) -> int:
        """The attempt that the task got at once, or 0."""
        spec = TaskSpec(key(name), ("acme", "session"), priority, 16, 16, **wishes)
        commands = self.post(ev.TaskSubmitted(spec))
        return next((c.attempt.attempt_id for c in commands if isinstance(c, ev.Start)), 0)

    def end(self, name: str, attempt_id: int, kind: Any = None, *, after_s: float = 0.0) -> list[ev.Command]:
        fault = Fault(kind, "engine says: canary-prompt") if kind else None
        return self.post(ev.AttemptEnded(key(name), attempt_id, fault), after_s=after_s)

    def scrape(self, *samples: Sample) -> dict[str, list[tuple[Labels, float]]]:
        text = self.telemetry.render(samples).decode()
        return {
            sample.name: [(s.labels, s.value) for s in metric.samples if s.name == sample.name]
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(value for has, value in self.scrape().get(name, []) if labels.items() <= has.items())

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.out.getvalue().splitlines()]
        assert all(telemetry_log.WITHHELD not in line.values() for line in lines)
        return [line for line in lines if event in (None, line["event"])]


def key(name: str) -> TaskKey:
    return "acme", name


@pytest.fixture
def watched() -> Watched:
    return Watched()


# What moves when


def test_task_that_succeeds_is_counted_and_timed_from_acceptance(watched: Watched) -> None:
    watched.ready(state=ReplicaState.LOADING)
    watched.submit("a")
    watched.now += 0.5
    watched.ready()
    watched.post(ev.FirstToken(key("a"), 1), after_s=0.25)
    watched.post(ev.TokensProduced(key("a"), 1, 32))
    watched.telemetry.observe_usage(1, 7)
    watched.end("a", 1, after_s=1.0)
    assert watched.value("tasks_enqueued_total", priority="interactive") == 1
    assert watched.value("tasks_started_total", **PLACE, priority="interactive") == 1
    assert watched.value("task_wait_ms_sum") == pytest.approx(500)
    assert watched.value("latency_first_token_ms_sum", **PLACE) == pytest.approx(750)
    assert watched.value("latency_decode_ms_sum", **PLACE) == pytest.approx(1000)
    assert watched.value("tokens_out_total", **PLACE) == 32
    assert watched.value("tokens_in_total", **PLACE) == 7
    assert watched.value("attempts_total", **PLACE, outcome="completed") == 1
    assert watched.value("tasks_finished_total", engine_version="b1", outcome="succeeded") == 1


def test_retried_task_is_started_once_and_attempted_twice(watched: Watched) -> None:
    watched.ready()
    watched.ready("p/1")
    assert watched.submit("a") == 1
    commands = watched.end("a", 1, WorkerReset)
    assert [type(command) for command in commands] == [ev.Requeue, ev.Start]
    watched.end("a", 2)
    assert watched.value("tasks_started_total") == 1
    assert watched.value("attempts_total", outcome="WORKER_RESET") == 1
    assert watched.value("attempts_total", outcome="completed") == 1
    assert [line["code"] for line in watched.lines("task_requeued")] == ["WORKER_RESET"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (ev.CancelRequested(key("a")), "client"),
        (ev.SessionDeleted(("acme", "session")), "session"),
    ],
)
def test_cancel_is_counted_by_reason_and_its_attempt_as_aborted(watched: Watched, event: ev.Event, reason: str) -> None:
    watched.ready()
    attempt = watched.submit("a")
    watched.post(event)
    watched.end("a", attempt)  # the runner that was told to stop reports no fault
    assert watched.value("tasks_canceled_total", reason=reason) == 1
    assert watched.value("attempts_total", outcome="aborted") == 1
    assert watched.value("tasks_finished_total", outcome="canceled") == 1


def test_reader_that_left_is_a_reason_to_cancel(watched: Watched) -> None:
    watched.ready()
    watched.submit("a", cancel_unread=True)
    watched.post(ev.FollowerJoined(key("a")))
    watched.post(ev.FollowerLeft(key("a")))
    watched.post(ev.Tick(), after_s=11)
    assert watched.value("tasks_canceled_total", reason="reader-gone") == 1


def test_wall_timeout_is_a_timeout_of_the_attempt_whatever_its_runner_says(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("a")
    watched.post(ev.Tick(), after_s=61)
    watched.end("a", attempt)
    assert watched.value("attempts_total", outcome="DECODE_TIMEOUT") == 1
    assert watched.value("attempts_total") == 1


def test_nothing_of_a_finished_task_is_timed(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("a")
    watched.post(ev.CancelRequested(key("a")))
    watched.post(ev.FirstToken(key("a"), attempt))
    assert watched.value("latency_first_token_ms_count") == 0


def test_late_end_of_an_attempt_is_counted_once(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("a")
    watched.end("a", attempt)
    watched.end("a", attempt)
    watched.telemetry.observe_usage(attempt, 7)
    watched.post(ev.TokensProduced(key("a"), attempt, 5))
    assert watched.value("attempts_total") == 1
    assert watched.value("tokens_in_total") + watched.value("tokens_out_total") == 0


def test_missed_deadline_is_counted_whether_it_ended_the_task_or_not(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("finishes late", deadline_s=1.0)
    watched.submit("expires in the queue", Priority.BATCH, deadline_s=1.0)
    watched.post(ev.Tick(), after_s=2)
    watched.end("finishes late", attempt)
    assert watched.value("deadlines_missed_total", priority="interactive") == 1
    assert watched.value("deadlines_missed_total", priority="batch") == 1
    on_time = watched.submit("on time", deadline_s=1.0)
    watched.end("on time", on_time, after_s=0.5)
    assert watched.value("deadlines_missed_total") == 2


def test_full_queue_is_a_rejection_and_backpressure(watched: Watched) -> None:
    watched.ready(state=ReplicaState.LOADING)
    for number in range(5):
        watched.submit(str(number))
    assert watched.value("tasks_rejected_total", reason="ADMISSION_REJECT", engine="llamacpp") == 1
    assert watched.value("admission_backpressure_events_total", policy="reject", engine="llamacpp") == 1
    [line] = watched.lines("task_rejected")
    assert (line["task_id"], line["code"], line["policy"]) == ("4", "ADMISSION_REJECT", "reject")
    assert line["correlation_id"] == "of 4"


def test_refusal_before_the_scheduler_is_counted_too(watched: Watched) -> None:
    watched.telemetry.observe_rejection(None, "NOT_FOUND", tenant="acme", task_id="x", correlation_id="c")
    watched.telemetry.observe_rejection("llamacpp", "QUOTA_EXCEEDED", policy="open-streams")
    assert watched.value("tasks_rejected_total", reason="NOT_FOUND", engine="none") == 1
    assert watched.value("admission_backpressure_events_total", policy="open-streams") == 1
    assert watched.lines("task_rejected")[0]["tenant"] == "acme"


def make_room_and_go_on(watched: Watched) -> None:
    """What a scheduler orders for a task that is preempted, goes on beside its session's cache, and is shed."""
    spec = TaskSpec(key("batch"), ("acme", "session"), Priority.BATCH, 16, 16)
    task = Task(spec, 1, watched.now, ANYWHERE, predicted_wait=Estimate(1.0, 0.0))
    for number in (901, 902):
        task.attempts = number - 900
        attempt = Attempt(number, task.key, "p/0", 0, watched.now, affinity=Affinity.HIT)
        watched.telemetry.observe(ROUTE, ev.Tick(), [ev.Start(task, attempt), ev.Requeue(task, PREEMPTED)], watched.now)
    watched.telemetry.observe_replay(902, 3)
    task.state, task.fault = TaskState.FAILED, Fault(AdmissionReject, policy_label="shed-low-priority")
    task.ended_at = watched.now
    watched.telemetry.observe(ROUTE, ev.Tick(), [ev.Finish(task)], watched.now)


def keep_engines_alive(watched: Watched) -> None:
    """What becomes of managed engines and their hosts, and of a task whose replica is drained."""
    moved = Task(TaskSpec(key("moved"), ("acme", "session"), Priority.BATCH, 16, 16), 1, watched.now, ANYWHERE)
    watched.telemetry.observe(ROUTE, ev.Tick(), [ev.Requeue(moved, MOVED)], watched.now)
    engines = watched.telemetry.engines
    engines.count_failures("llamacpp", None, "p", "exit", 1)
    engines.note_preload("llamacpp", None, "p", 0.5)
    engines.note_test("llamacpp", None, "p", is_passed=True)
    engines.count_resets("local", 1)
    engines.note_reload("done")


def test_task_that_is_moved_is_counted_and_is_no_preemption(watched: Watched) -> None:
    """ORCH-3158."""
    keep_engines_alive(watched)
    assert watched.value("tasks_moved_total", engine="llamacpp") == 1
    assert watched.value("preemptions_total") == 0
    assert [(line["code"], line["policy"]) for line in watched.lines("task_requeued")] == [("CANCELED", "moved")]


def test_tasks_of_a_replica_set_are_kept_for_its_snapshot(watched: Watched) -> None:
    """ORCH-2104: a canceled one says nothing of the service."""
    watched.ready()
    first = watched.submit("a")
    watched.post(ev.FirstToken(key("a"), first), after_s=0.5)
    watched.end("a", first, after_s=1.0)
    watched.end("b", watched.submit("b"), InvalidParams)
    watched.submit("c")
    watched.post(ev.CancelRequested(key("c")))
    window = watched.telemetry.slo(ROUTE, COHORT, Priority.INTERACTIVE, watched.now)
    assert window is not None
    assert (window.tasks, window.error_ratio) == (2, 0.5)
    assert window.first_token_p95_s == pytest.approx(0.5)
    assert window.total_p95_s == pytest.approx(1.5)
    assert watched.telemetry.slo(ROUTE, COHORT, Priority.BATCH, watched.now) is None


def test_route_that_is_opened_later_has_its_own_labels(watched: Watched) -> None:
    """ORCH-3031."""
    watched.telemetry.set_routes([RouteScope("llamacpp/new", "llamacpp", "new")])
    watched.telemetry.observe("llamacpp/new", ev.ShutdownRequested(1.0), [], watched.now)
    watched.ready()
    assert watched.lines("shutdown_requested")[0]["route"] == "llamacpp/new"
    assert watched.lines("replica_changed")[0]["route"] == ROUTE


def test_every_counter_and_histogram_of_the_contract_moves(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("a", deadline_s=0.1)
    watched.post(ev.FirstToken(key("a"), attempt))
    watched.post(ev.TokensProduced(key("a"), attempt, 1))
    watched.telemetry.observe_usage(attempt, 1)
    watched.end("a", attempt, after_s=1)
    watched.submit("b")
    watched.post(ev.CancelRequested(key("b")))
    watched.telemetry.observe_rejection("other engine", "NOT_FOUND", policy="rate")
    watched.telemetry.observe_request("create_task", 202)
    make_room_and_go_on(watched)
    watched.telemetry.observe_rejection("llamacpp", "NO_SUCH_CODE")
    keep_engines_alive(watched)
    families = [family for family in FAMILIES if family.kind != "gauge"]
    suffix = {"counter": "", "histogram": "_count"}
    assert [family.name for family in families if watched.value(family.name + suffix[family.kind]) == 0] == []


def test_gauges_are_what_the_scrape_was_given(watched: Watched) -> None:
    scraped = watched.scrape(Sample("queue_depth", ("llamacpp", "m", "batch"), 3), Sample("open_streams", (), 2))
    assert scraped["queue_depth"] == [({"engine": "llamacpp", "model": "m", "priority": "batch"}, 3)]
    assert scraped["open_streams"] == [({}, 2)]
    assert "queue_depth" not in watched.scrape()


def test_undeclared_gauge_is_refused(watched: Watched) -> None:
    with pytest.raises(KeyError):
        watched.telemetry.render([Sample("invented", (), 1)])


def test_family_that_must_move_must_be_declared() -> None:
    with pytest.raises(KeyError):
        Watched(families=[family for family in FAMILIES if family.name != "attempts_total"])


def test_nothing_is_kept_of_tasks_and_attempts_that_ended(watched: Watched) -> None:
    watched.ready()
    for number in range(5):
        attempt = watched.submit(str(number))
        watched.post(ev.CancelRequested(key(str(number))))
        watched.end(str(number), attempt)
    assert (watched.telemetry._live.attempts, watched.telemetry._live.tasks) == ({}, {})


def test_series_is_looked_up_at_the_start_and_not_per_token(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.ready()
    attempt = watched.submit("a")

    def look_up(*_: str) -> None:
        raise AssertionError("a label lookup on the token path")

    monkeypatch.setattr("llorch.telemetry_metrics.Instrument.series", look_up)
    watched.post(ev.FirstToken(key("a"), attempt))
    watched.post(ev.TokensProduced(key("a"), attempt, 32))
    monkeypatch.undo()
    assert watched.value("tokens_out_total") == 32


# Log lines


def test_task_leaves_one_line_at_its_start_and_one_at_its_end(watched: Watched) -> None:
    watched.ready()
    attempt = watched.submit("a")
    watched.post(ev.FirstToken(key("a"), attempt), after_s=0.5)
    for _ in range(100):
        watched.post(ev.TokensProduced(key("a"), attempt, 32))
    watched.end("a", attempt, after_s=1.0)
    assert [line["event"] for line in watched.lines()] == ["replica_changed", "task_started", "task_ended"]
    start, end = watched.lines()[1:]
    place = {"pool_id": "p", "replica_id": "p/0", "attempt": attempt, "engine_version": "b1"}
    who = {"tenant": "acme", "task_id": "a", "session_id": "session", "correlation_id": "of a"}
    where = {"route": ROUTE, "engine": "llamacpp", "model": "m", "priority": "interactive", "attempts": 1}
    assert (place | who | where).items() <= start.items()
    told = {"state": "succeeded", "code": None, "tokens_out": 3200, "first_token_ms": 500.0, "took_ms": 1500.0}
    assert (place | who | where | told).items() <= end.items()


def test_fields_of_a_line_that_the_level_filters_are_not_even_asked_for(watched: Watched) -> None:
    def describe(_: TaskKey) -> dict[str, str]:
        raise AssertionError("asked for a line that nobody reads")

    log = telemetry_log.make_logger("warning", "json", stream=watched.out)
    watched.telemetry = Telemetry(FAMILIES, [RouteScope(ROUTE, "llamacpp", "m")], log, describe)
    watched.ready()
    watched.end("a", watched.submit("a"))
    assert watched.lines() == []
    assert watched.value("tasks_finished_total") == 1


def test_every_line_has_the_required_fields_first(watched: Watched) -> None:
    watched.ready()
    for text in watched.out.getvalue().splitlines():
        assert list(json.loads(text))[:4] == ["ts", "level", "event", "correlation_id"]
    [line] = watched.lines()
    assert line["correlation_id"] is None
    assert line["ts"].endswith("Z")


def test_replica_leaves_a_line_only_when_its_state_changes(watched: Watched) -> None:
    watched.ready(state=ReplicaState.LOADING)
    watched.ready()
    watched.ready(slots=2)
    watched.ready(state=ReplicaState.UNREADY)
    assert [(line["was"], line["state"], line["level"]) for line in watched.lines("replica_changed")] == [
        (None, "loading", "info"),
        ("loading", "ready", "info"),
        ("ready", "unready", "warning"),
    ]


def test_failed_task_is_a_warning_with_its_code_and_without_what_the_engine_said(watched: Watched) -> None:
    watched.ready()
    watched.end("a", watched.submit("a"), InvalidParams)
    [line] = watched.lines("task_ended")
    assert (line["level"], line["state"], line["code"]) == ("warning", "failed", "INVALID_PARAMS")
    assert b"canary-prompt" not in watched.out.getvalue()


def test_task_that_timed_out_says_so(watched: Watched) -> None:
    watched.ready()
    watched.end("a", watched.submit("a"), DecodeTimeout)
    assert watched.lines("task_ended")[0]["code"] == "DECODE_TIMEOUT"


def test_unforeseen_error_is_logged_with_its_place_and_without_its_message(watched: Watched) -> None:
    try:
        raise ValueError("canary-prompt") from OSError(111, "Connection refused")
    except ValueError as error:
        watched.telemetry.report_bug("attempt", error)
    [line] = watched.lines("unforeseen_error")
    assert (line["level"], line["where"], line["exception"]) == ("error", "attempt", "ValueError")
    assert line["stack"][0].startswith(f"{__file__}:")
    assert "caused by ConnectionRefusedError: Connection refused" in line["stack"]
    assert b"canary-prompt" not in watched.out.getvalue()
