"""ORCH-3027: what the policies of the queue do shows in metrics; told by events and commands made by hand."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llorch import telemetry_log
from llorch.domain import events as ev
from llorch.domain.faults import CANCELED, LATE, PREEMPTED
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import ANYWHERE, Affinity, Attempt, Cohort, Estimate, Fault, Priority, Task, TaskSpec, TaskState
from llorch.errors import AdmissionReject, LlorchError, QueueFullDropLru
from llorch.telemetry import RouteScope, Telemetry
from llorch_contract.metrics import FAMILIES

ROUTE = "llamacpp/m"


class Desk:
    """A telemetry that is told what a scheduler would decide."""

    def __init__(self) -> None:
        self.out = io.BytesIO()
        log = telemetry_log.make_logger("info", "json", stream=self.out)
        scope = RouteScope(ROUTE, "llamacpp", "m", prompt_cost=1.0, output_cost=2.0)
        self.telemetry = Telemetry(FAMILIES, [scope], log, lambda _: {})
        self.attempts = 0
        replica = Replica("p/0", "p", 8, Cohort("b1", None, exact=False), ReplicaState.READY)
        self.tell(ev.ReplicaChanged(replica))

    def tell(self, event: ev.Event, *commands: ev.Command, now: float = 100.0) -> None:
        self.telemetry.observe(ROUTE, event, commands, now)

    def task(self, name: str = "t", tenant: str = "acme", priority: Priority = Priority.BATCH, **wishes: Any) -> Task:
        spec = TaskSpec((tenant, name), (tenant, "s"), priority, 16, 16, **wishes)
        return Task(spec, 1, 100.0, ANYWHERE)

    def start(self, task: Task, now: float = 100.0, **known: Any) -> Attempt:
        self.attempts += 1
        attempt = Attempt(self.attempts, task.key, "p/0", 0, now, **known)
        task.state, task.attempt = TaskState.RUNNING, attempt
        task.attempts += 1
        self.tell(ev.Tick(), ev.Start(task, attempt), now=now)
        return attempt

    def produce(self, attempt: Attempt, count: int, now: float = 100.0) -> None:
        self.tell(ev.TokensProduced(attempt.task, attempt.attempt_id, count), now=now)

    def finish(self, task: Task, state: TaskState, fault: Fault | None = None, now: float = 101.0) -> None:
        task.state, task.fault, task.ended_at = state, fault, now
        self.tell(ev.Tick(), ev.Finish(task), now=now)

    def series(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        for family in text_string_to_metric_families(self.telemetry.render([]).decode()):
            for sample in family.samples:
                if sample.name == name:
                    yield sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float:
        return sum(value for has, value in self.series(name) if labels.items() <= has.items())


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_shares_follow_the_weighted_tokens_of_each_flow(desk: Desk) -> None:
    """ORCH-3076."""
    asker, writer = desk.task("a", "asker"), desk.task("w", "writer", Priority.INTERACTIVE)
    asker.prompt_tokens = 60
    desk.start(asker)
    desk.produce(desk.start(writer), 10)
    assert desk.value("admission_share", tenant="asker", priority="batch") == pytest.approx(0.75)
    assert desk.value("admission_share", tenant="writer", priority="interactive") == pytest.approx(0.25)


def test_prompt_counts_once_however_often_the_task_starts(desk: Desk) -> None:
    again, other = desk.task("a", "again"), desk.task("o", "other-one")
    again.prompt_tokens = other.prompt_tokens = 50
    for _ in range(3):
        desk.start(again)
    desk.start(other)
    assert desk.value("admission_share", tenant="again") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("state", "fault", "ended_at", "ratio"),
    [
        (TaskState.SUCCEEDED, None, 104.9, 1.0),
        (TaskState.SUCCEEDED, None, 105.1, 0.0),
        (TaskState.FAILED, LATE, 105.0, 0.0),
        (TaskState.FAILED, Fault(AdmissionReject), 101.0, 0.0),
    ],
)
def test_deadline_is_met_by_success_in_time_alone(
    desk: Desk, state: TaskState, fault: Fault | None, ended_at: float, ratio: float
) -> None:
    """ORCH-3081."""
    assert list(desk.series("deadlines_met_ratio")) == []
    desk.finish(desk.task("canceled", deadline_s=5.0), TaskState.CANCELED, CANCELED)
    desk.finish(desk.task("no deadline"), TaskState.FAILED, Fault(AdmissionReject))
    assert list(desk.series("deadlines_met_ratio")) == []
    desk.finish(desk.task(deadline_s=5.0), state, fault, ended_at)
    assert list(desk.series("deadlines_met_ratio")) == [({"priority": "batch"}, ratio)]


@pytest.mark.parametrize(
    ("kind", "policy", "soft"),
    [
        (QueueFullDropLru, "drop-lru", 0),
        (AdmissionReject, "fair-share", 0),
        (AdmissionReject, "shed-low-priority", 1),
    ],
)
def test_task_that_loses_its_place_is_dropped_by_its_policy(
    desk: Desk, kind: type[LlorchError], policy: str, soft: int
) -> None:
    """ORCH-3004, ORCH-3005, ORCH-3085."""
    desk.finish(desk.task(), TaskState.FAILED, Fault(kind, policy_label=policy))
    assert desk.value("tasks_dropped_total", policy=policy, engine="llamacpp") == 1
    assert desk.value("tasks_dropped_total") == 1
    assert desk.value("preemptions_total", mode="soft", engine="llamacpp") == soft


def test_refused_submission_is_no_dropped_task(desk: Desk) -> None:
    desk.tell(ev.Tick(), ev.Reject(("acme", "t"), Fault(AdmissionReject, policy_label="drop-lru")))
    assert desk.value("tasks_dropped_total") == 0
    assert desk.value("admission_backpressure_events_total", policy="drop-lru", engine="llamacpp") == 1


def test_preempted_task_that_goes_on_is_counted_at_both_ends(desk: Desk) -> None:
    """ORCH-3086, ORCH-3087."""
    task = desk.task()
    first = desk.start(task)
    desk.tell(ev.AttemptEnded(task.key, first.attempt_id), ev.Requeue(task, PREEMPTED))
    assert desk.value("preemptions_total", mode="hard", engine="llamacpp") == 1
    assert desk.value("resumptions_total") == 0
    second = desk.start(task, tokens_before=5)
    desk.telemetry.observe_replay(second.attempt_id, 5)
    desk.telemetry.observe_replay(99, 5)
    assert desk.value("resumptions_total", engine="llamacpp") == 1
    assert desk.value("tokens_replayed_total", pool="p") == 5
    assert desk.value("tokens_out_total") == 0
    [line] = [json.loads(line) for line in desk.out.getvalue().splitlines() if b"task_requeued" in line]
    assert (line["level"], line["policy"]) == ("info", "preempted")


def test_retry_is_no_resumption(desk: Desk) -> None:
    task = desk.task()
    first = desk.start(task)
    desk.tell(ev.AttemptEnded(task.key, first.attempt_id), ev.Requeue(task, Fault(LlorchError)))
    desk.start(task)
    assert desk.value("preemptions_total") == desk.value("resumptions_total") == 0


@pytest.mark.parametrize("result", list(Affinity))
def test_affinity_is_counted_for_sessions_that_had_a_replica(desk: Desk, result: Affinity) -> None:
    """ORCH-3023."""
    desk.start(desk.task("first"))
    assert desk.value("session_affinity_total") == 0
    desk.start(desk.task("second"), affinity=result)
    assert desk.value("session_affinity_total", result=result.value, engine="llamacpp") == 1


@pytest.mark.parametrize(("predicted_s", "direction", "error_ms"), [(2.0, "early", 500), (1.0, "late", 500)])
def test_error_of_a_prediction_is_recorded_once_the_task_starts(
    desk: Desk, predicted_s: float, direction: str, error_ms: float
) -> None:
    """ORCH-3029."""
    task = desk.task()
    task.predicted_wait = Estimate(predicted_s, 0.0)
    desk.start(task, now=101.5)
    desk.start(task, now=130.0)
    name = "predicted_start_error_ms"
    assert desk.value(f"{name}_count", priority="batch") == 1
    assert desk.value(f"{name}_sum", priority="batch", direction=direction) == pytest.approx(error_ms)


def test_start_that_was_not_predicted_has_no_error(desk: Desk) -> None:
    desk.start(desk.task())
    assert desk.value("predicted_start_error_ms_count") == 0


def test_submission_that_the_edge_forbids_is_a_rejected_task(desk: Desk) -> None:
    forbidden = "FORBIDDEN"
    for operation, status, code in (
        ("create_task", 403, forbidden),
        ("create_task", 202, None),
        ("get_task", 403, forbidden),
    ):
        desk.telemetry.observe_request(operation, status, code)
    assert desk.value("tasks_rejected_total", reason="FORBIDDEN", engine="none") == 1
    assert desk.value("tasks_rejected_total") == 1


LIMITS = ("rate", "max-queued", "tokens-per-minute", "session-cost", "fair-share", "deadline")


@pytest.mark.parametrize("policy", LIMITS)
def test_every_limit_that_pushes_back_has_its_own_label(desk: Desk, policy: str) -> None:
    desk.tell(ev.Tick(), ev.Reject(("acme", "t"), Fault(AdmissionReject, policy_label=policy)))
    assert desk.value("admission_backpressure_events_total", policy=policy) == 1
