"""The real scheduler at the desk: it sees what a dispatcher would post, and what it orders is what happens."""

import gc
import json
import math

import msgspec
import pytest

from llorch.domain import events as ev
from llorch.domain.task import Priority
from llorch.simulator.compare import POLICIES, compare, heading_of
from llorch.simulator.generators import generate
from llorch.simulator.ours import SchedulerDesk
from llorch.simulator.outcome import Outcome
from llorch.simulator.replicas import Floor, engines_of
from llorch.simulator.report import as_json, as_text
from llorch.simulator.run import simulate
from llorch.simulator.spec import Spec, parse_spec
from llorch.simulator.workload import Workload
from tests.unit.simulator.stage import fates, make_spec, make_workload, play, starts, task

BUSY = {
    "seed": 3, "tasks": 400, "load": 1.3, "queue": {"capacity": 20},
    "replicas": {"count": 2, "slots": 2, "decode_s_per_token": 0.01, "prefill_s_per_token": 0.001},
    "tenants": {
        "a": {"traffic": {
            "prompt_tokens": 50, "output_tokens": {"distribution": "exponential", "mean": 50},
            "deadline": {"slack": {"distribution": "uniform", "low": 1, "high": 6}, "extra_s": 0.2},
        }},
        "b": {"count": 3, "traffic": {
            "prompt_tokens": 20, "priority": "batch",
            "output_tokens": {"distribution": "lognormal", "mean": 60, "cv": 2},
        }},
    },
}  # fmt: skip


class Watched(SchedulerDesk):
    """Keeps the scheduler honest, and what it was told."""

    def __init__(self, spec: Spec, workload: Workload, floor: Floor, outcome: Outcome) -> None:
        self.events: list[ev.Event] = []
        super().__init__(spec, workload, floor, outcome)

    def _decide(self, event: ev.Event, now: float) -> None:
        self.events.append(event)
        super()._decide(event, now)
        self._scheduler.check_invariants()


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    assert starts(play("ours", task(0.0, 5), task(1.0, 2), task(2.0, 1))) == [0, 5, 7]


def test_every_task_has_one_fate_and_every_invariant_holds() -> None:
    spec = parse_spec(BUSY, "test")
    workload = generate(spec)
    desks: list[Watched] = []

    def make(*parts: object) -> Watched:
        desks.append(Watched(*parts))  # type: ignore[arg-type]
        return desks[0]

    outcome = simulate(spec, workload, make)
    assert outcome.open == outcome.waiting == 0
    assert not outcome.fate.count(0)
    assert not desks[0]._scheduler.tasks
    assert not desks[0]._scheduler.attempts
    assert not desks[0]._keys
    ends = sum(isinstance(event, ev.AttemptEnded) for event in desks[0].events)
    assert ends == len(workload) - sum(map(math.isnan, outcome.started_at))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_finished_has_all_its_tokens_and_its_slot_time(policy: str) -> None:
    spec = parse_spec(BUSY, "test")
    workload = generate(spec)
    outcome = simulate(spec, workload, POLICIES[policy])
    [engine] = set(engines_of(spec.replicas))
    finished = [index for index, fate in enumerate(fates(outcome)) if fate == "finished"]
    assert len(finished) > 100
    service = [engine.service_s(workload.prompt_tokens[index], workload.output_tokens[index]) for index in finished]
    assert outcome.busy_s == pytest.approx(sum(service))
    for index, took in zip(finished, service, strict=True):
        assert outcome.tokens[index] == workload.output_tokens[index]
        assert outcome.ended_at[index] - outcome.started_at[index] == pytest.approx(took)


def test_the_same_seed_gives_the_same_bytes() -> None:
    reports = []
    for _ in range(2):
        spec = parse_spec(BUSY, "test")
        workload = generate(spec)
        results = compare(spec, workload, list(POLICIES))
        heading = heading_of(spec, workload)
        reports.append((as_json(heading, results), as_text(heading, results)))
    assert reports[0] == reports[1]
    assert json.loads(reports[0][0])["seed"] == 3


def test_a_full_queue_refuses_by_the_policy_of_the_route() -> None:
    outcome = play("ours", task(0.0, 9), task(1.0, 1), task(2.0, 1), queue={"capacity": 1, "full_policy": "reject"})
    assert fates(outcome) == ["finished", "finished", "rejected"]
    assert outcome.reasons == {"ADMISSION_REJECT reject": 1}


def test_a_deadline_that_passes_in_the_queue_expires_the_task() -> None:
    outcome = play("ours", task(0.0, 9), task(1.0, 1, deadline_s=4.0), task(5.0, 1))
    assert fates(outcome) == ["finished", "expired", "finished"]
    assert (outcome.ended_at[1], outcome.reasons) == (5.0, {"DEADLINE_UNMET": 1})


def test_a_session_has_its_turns_and_no_more() -> None:
    turns = [msgspec.structs.replace(task(float(at), 1), session="s") for at in range(4)]
    outcome = play("ours", *turns, sessions={"turns": 3})
    assert fates(outcome) == ["finished"] * 3 + ["rejected"]
    assert outcome.reasons == {"BUDGET_EXHAUSTED session-turns": 1}


def test_a_wall_timeout_fails_the_task_and_keeps_the_slot_until_released() -> None:
    replicas = {"decode_s_per_token": 1.0, "release_s": 2.0}
    outcome = play("ours", task(0.0, 50), task(1.0, 1), wall_s=10, replicas=replicas)
    assert (fates(outcome), starts(outcome)) == (["failed", "finished"], [0, 12])
    assert outcome.tokens[0] == 10
    assert outcome.reasons == {"DECODE_TIMEOUT": 1}


@pytest.mark.parametrize("policy", ["ours", "fcfs"])
def test_a_replica_that_breaks_down_loses_its_runs_and_comes_back(policy: str) -> None:
    replicas = {"decode_s_per_token": 0.1, "overhead_s": 1.0, "count": 3, "mtbf_s": 20.0, "repair_s": 5.0}
    tasks = [task(at * 1.0, 10, priority=list(Priority)[at % 2]) for at in range(200)]
    spec = make_spec(replicas=replicas)
    outcome = simulate(spec, make_workload(*tasks), POLICIES[policy])
    counts = {fate: fates(outcome).count(fate) for fate in ("finished", "failed")}
    assert sum(counts.values()) == 200
    assert counts["failed"] > 5
    assert counts["finished"] > 100
    assert outcome.retries > 2
    assert not outcome.waiting


def test_a_preempted_task_goes_on_from_the_tokens_that_it_had() -> None:
    tasks = [task(0.0, 20, priority=Priority.BATCH), task(5.0, 3)]
    outcome = play("ours", *tasks, preemption={"mode": "hard", "per_minute": 6})
    assert outcome.preemptions == 1
    assert starts(outcome) == [0, 5]
    assert list(outcome.ended_at) == [23, 8]
    assert list(outcome.tokens) == [20, 3]
    assert outcome.busy_s == 23


def test_quotas_and_weights_reach_the_scheduler() -> None:
    tasks = [task(0.0, 4, "a"), task(0.0, 4, "a"), task(1.0, 4, "b")]
    tenants = {"a": {"max_concurrent": 1}}
    outcome = play("ours", *tasks, tenants=tenants, replicas={"decode_s_per_token": 1.0, "slots": 2})
    assert starts(outcome) == [0, 4, 1]


def test_nothing_of_a_simulation_waits_for_the_collector_of_cycles() -> None:
    spec = parse_spec(BUSY, "test")
    workload = generate(spec)
    simulate(spec, workload, SchedulerDesk)
    gc.collect()
    gc.disable()
    try:
        simulate(spec, workload, SchedulerDesk)
        unreachable = gc.collect()
    finally:
        gc.enable()
    assert unreachable < len(workload)  # the parts of one scheduler may hold each other, no task may
