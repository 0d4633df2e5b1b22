"""The declaration of a simulation: defaults, changes by --set, and errors that name the setting."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch.domain import policy
from llorch.errors import ConfigError
from llorch.simulator.spec import load_spec, parse_spec
from tests.unit.simulator.stage import BATCH, INTERACTIVE, make_spec

TREE: dict[str, Any] = {
    "seed": 7,
    "tasks": 10,
    "load": 0.5,
    "replicas": {"decode_s_per_token": 0.01},
    "tenants": {"a": {"traffic": {"prompt_tokens": 5, "output_tokens": 5}}, "b": {"weight": 2, "count": 10}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_an_empty_queue_section_is_the_route_as_by_default() -> None:
    assert make_spec().route_policy().queue == policy.QueuePolicy()
    assert make_spec().route_policy() == policy.RoutePolicy()


def test_settings_reach_the_policy_of_the_route() -> None:
    spec = make_spec(
        wall_s=5,
        queue={
            "capacity": {"batch": 3}, "full_policy": "shed-low-priority", "fairness": "strict", "order": "edf",
            "edf_default_ms": 2000, "level_weights": {"batch": 2}, "token_cost": {"prompt": 3, "output": 4},
            "feasible_probability": 0.2,
        },
        preemption={"mode": "hard", "per_minute": 2, "protected": []},
        tenants={"a": {"weight": 4}},
    )  # fmt: skip
    assert spec.route_policy() == policy.RoutePolicy(
        queue=policy.QueuePolicy(
            capacity={INTERACTIVE: 256, BATCH: 3},
            full_policy=dict.fromkeys((INTERACTIVE, BATCH), policy.FullPolicy.SHED_LOW_PRIORITY),
            fairness=policy.Fairness.STRICT,
            order=policy.Order.EDF,
            edf_default_s=2.0,
            level_weights={INTERACTIVE: 8.0, BATCH: 2.0},
            weights={"a": 4.0},
            prompt_cost=3.0,
            output_cost=4.0,
        ),
        wall_s=5.0,
        preemption=policy.PreemptionPolicy(hard=True, per_minute=2, protected=frozenset()),
        feasible_probability=0.2,
    )


def test_quotas_are_of_those_who_have_some() -> None:
    limits = {"max_queued": 3, "rate": {"batch": {"per_s": 1, "burst": 2}}}
    spec = make_spec(tenants={"a": limits, "b": {"weight": 3}})
    assert spec.quotas() == {"a": policy.Quota(max_queued=3, rate={BATCH: policy.Rate(1.0, 2.0)})}


def test_many_tenants_alike_are_numbered(file: Path) -> None:
    names = list(load_spec(file).names())
    assert names == ["a", *(f"b-{number:02}" for number in range(1, 11))]


def test_changes_are_put_over_the_file(file: Path) -> None:
    spec = load_spec(file, ["tenants.a.weight=4", "queue.order=edf", "tenants.a.traffic.prompt_tokens=9"])
    assert spec.tenants["a"].weight == 4
    assert spec.queue.order is policy.Order.EDF
    assert spec.tenants["a"].traffic[0].prompt_tokens.model_dump() == {"distribution": "fixed", "value": 9.0}


def test_a_workload_file_is_beside_the_spec(file: Path) -> None:
    assert load_spec(file, ["workload=w.jsonl"]).workload == file.parent / "w.jsonl"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tenants.a.wait=4", "tenants.a.wait"),
        ("replicas.decode_s_per_token=0", "replicas.0.decode_s_per_token"),
        ("tenants.a.traffic.prompt_tokens={distribution: normal}", "tenants.a.traffic.0.prompt_tokens"),
        ("queue.full_policy=drop", "queue.full_policy"),
        ("tasks=null", "one of `tasks` and `duration_s`"),
        ("load=null", "expected `load`"),
        ("tenants={}", "tenants with traffic"),
        ("tenants.nobody.weight=4", "no tenant nobody; it has a"),
        ("seed.x=4", "--set seed.x=4"),
        ("seed", "--set seed"),
        ("seed=[", "--set seed=["),
    ],
)
def test_a_bad_setting_is_named(file: Path, change: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_spec(file, [change])
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", "\t"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"spec\.yaml"):
        load_spec(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_spec(tmp_path / "none.yaml")


def test_every_problem_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec({**TREE, "seed": -1, "tasks": 0}, "f")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["seed", "tasks"]
