"""Workloads by seed: the same again, as heavy as asked, and each tenant's own."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from llorch.simulator.generators import generate, mean_service_s, offered_load, workload_of
from llorch.simulator.spec import Spec, load_spec, parse_spec
from llorch.simulator.workload import Workload, write_workload
from tests.support.processes import ROOT

COMMITTED = sorted((ROOT / "bench" / "workloads").glob("*.yaml"))
LENGTHS = {"prompt_tokens": 10, "output_tokens": {"distribution": "exponential", "mean": 100}}


def declared(tenants: Mapping[str, Any], **settings: Any) -> Spec:
    common = {"seed": 5, "replicas": {"decode_s_per_token": 0.01, "slots": 2}, "tasks": 5000, "load": 0.8}
    return parse_spec({**common, "tenants": tenants, **settings}, "test")


def of_tenant(workload: Workload, name: str) -> list[object]:
    return [entry for entry in workload.entries() if entry.tenant == name]


def one(**traffic: Any) -> Workload:
    return generate(declared({"a": {"traffic": {**LENGTHS, **traffic}}}))


def test_the_same_seed_is_the_same_workload() -> None:
    spec = declared({"a": {"traffic": LENGTHS}, "b": {"count": 3, "traffic": LENGTHS}}, tasks=300)
    again = spec.model_copy(update={"seed": 6})
    assert list(generate(spec).entries()) == list(generate(spec).entries())
    assert list(generate(spec).entries()) != list(generate(again).entries())


def test_a_further_tenant_leaves_the_others_tasks_as_they_were() -> None:
    paced = {**LENGTHS, "arrivals": {"rate_per_s": 5}}
    alone = generate(declared({"a": {"traffic": paced}}, tasks=None, duration_s=20))
    both = generate(declared({"b": {"traffic": paced}, "a": {"traffic": paced}}, tasks=None, duration_s=20))
    assert of_tenant(alone, "a") == of_tenant(both, "a")
    assert len(both) > len(alone) > 50


@pytest.mark.parametrize("process", ["poisson", "bursty", "even"])
def test_the_load_is_as_asked(process: str) -> None:
    arrivals = {"process": process, "on_s": 0.5, "off_s": 0.5}
    spec = declared({"a": {"traffic": {**LENGTHS, "arrivals": arrivals}}}, tasks=20_000)
    assert offered_load(spec, generate(spec)) == pytest.approx(0.8, rel=0.05)


def test_the_load_is_of_all_replicas() -> None:
    replicas = [{"decode_s_per_token": 0.01, "count": 2}, {"decode_s_per_token": 0.02, "slots": 3}]
    spec = declared({"a": {"traffic": {"prompt_tokens": 0, "output_tokens": 100}}}, replicas=replicas)
    workload = generate(spec)
    assert mean_service_s(spec, workload) == pytest.approx(5 / (2 / 1.0 + 3 / 2.0))
    assert len(workload) / workload.arrival_s[-1] == pytest.approx(0.8 * 3.5, rel=0.05)


def test_shares_are_of_arriving_tasks() -> None:
    tenants = {"a": {"traffic": {**LENGTHS, "share": 3}}, "b": {"traffic": LENGTHS}}
    workload = generate(declared(tenants))
    assert workload.tenant.count(0) / len(workload) == pytest.approx(0.75, abs=0.02)


def test_tasks_at_once_come_in_the_proportion_of_shares() -> None:
    now = {**LENGTHS, "arrivals": {"process": "at_once"}}
    workload = generate(declared({"a": {"traffic": {**now, "share": 3}}, "b": {"traffic": now}}, tasks=40))
    assert set(workload.arrival_s) == {0.0}
    assert [workload.tenant[:20].count(tenant) for tenant in (0, 1)] == [15, 5]


def test_poisson_gaps_have_the_deviation_of_their_mean_and_bursts_more() -> None:
    for arrivals, low, high in (("poisson", 0.95, 1.05), ("bursty", 1.5, math.inf), ("even", -1.0, 0.001)):
        workload = one(arrivals={"process": arrivals, "on_s": 5, "off_s": 20})
        gaps = [later - earlier for earlier, later in itertools.pairwise(workload.arrival_s)]
        assert low < pstdev(gaps) / fmean(gaps) < high


@pytest.mark.parametrize(
    ("distribution", "mean", "cv"),
    [
        (250, 250, 0.0),
        ({"distribution": "uniform", "low": 100, "high": 300}, 200, 0.289),
        ({"distribution": "exponential", "mean": 500}, 500, 1.0),
        ({"distribution": "lognormal", "mean": 500, "cv": 0.5}, 500, 0.5),
    ],
)
def test_lengths_have_their_mean_and_deviation(distribution: object, mean: float, cv: float) -> None:
    outputs = one(output_tokens=distribution).output_tokens
    assert fmean(outputs) == pytest.approx(mean, rel=0.05)
    assert pstdev(outputs) / mean == pytest.approx(cv, abs=0.05)


def test_outputs_stay_within_max_tokens_and_expectations_are_as_asked() -> None:
    bound = {"distribution": "exponential", "mean": 100, "max": 150}
    told = {expected: one(output_tokens=bound, expected=expected) for expected in ("exact", "mean", "max", 50)}
    assert max(told["exact"].output_tokens) == 150
    assert set(told["exact"].max_tokens) == {150}
    assert told["exact"].expected_tokens == told["exact"].output_tokens
    assert set(told["mean"].expected_tokens) == {round(fmean(told["exact"].output_tokens))} or (
        abs(told["mean"].expected_tokens[0] - fmean(told["exact"].output_tokens)) < 3
    )
    assert set(told["max"].expected_tokens) == {150}
    assert set(told[50].expected_tokens) == {50}


def test_deadlines_are_slack_times_the_usual_service_and_extra() -> None:
    workload = one(deadline={"slack": 3, "extra_s": 2, "fraction": 0.5})
    given = [index for index, deadline in enumerate(workload.deadline_s) if not math.isnan(deadline)]
    assert len(given) / len(workload) == pytest.approx(0.5, abs=0.03)
    usual = fmean(workload.output_tokens)
    for index in given[:50]:  # nobody knows beforehand how long this one answer will be
        assert workload.deadline_s[index] == pytest.approx(3 * usual * 0.01 + 2, rel=0.1)


def test_turns_share_a_session() -> None:
    workload = one(turns=4)
    assert [workload.session_name(index) for index in range(8)] == ["0-0"] * 4 + ["0-1"] * 4


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_workloads_are_as_heavy_as_they_say(file: Path) -> None:
    spec = load_spec(file, ["tasks=12000"])
    assert spec.load is not None
    assert offered_load(spec, generate(spec)) == pytest.approx(spec.load, rel=0.1)


def test_a_saved_workload_is_played_as_the_generated_one(tmp_path: Path) -> None:
    spec = declared({"a": {"traffic": LENGTHS}}, tasks=50)
    write_workload(generate(spec), tmp_path / "w.jsonl")
    read = workload_of(spec.model_copy(update={"workload": tmp_path / "w.jsonl"}))
    assert list(read.entries()) == list(generate(spec).entries())
