"""ORCH-3031: what a reload changes is told as paths, never as values."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import config
from llorch.config_diff import Difference, difference

SECRET = "canary-6b1f"
KEY = {"id": "k", "tenant": "acme", "sha256": "a" * 64}


def tree() -> dict[str, Any]:
    return {
        "keys": [KEY],
        "tenants": [{"name": "acme", "weight": 2}],
        "nodes": [{"id": "n", "sha256": "b" * 64}],
        "sampler_profiles": {"v1": {"top_k": 3}},
        "pools": [
            {
                "id": "small", "engine": "llamacpp", "model": "m",
                "replicas": [{"url": "http://h:1", "api_key": "x"}, {"id": "own", "managed": {"env": {"A": "1"}}}],
            },
            {"id": "large", "engine": "llamacpp", "model": "n", "replicas": [{"url": "http://h:2"}]},
        ],
    }  # fmt: skip


def put(values: dict[str, Any], path: list[str | int], value: object) -> config.Settings:
    """The configuration with this value at the path."""
    values = copy.deepcopy(values)
    *way, last = path
    inner: Any = values
    for step in way:
        inner = inner.setdefault(step, {}) if isinstance(inner, dict) else inner[step]
    inner[last] = value
    return config.Settings.model_validate(values)


OLD = config.Settings.model_validate(tree())


def test_nothing_differs_from_itself() -> None:
    assert difference(OLD, config.Settings.model_validate(tree())) == Difference()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["pools", 0, "ctx"], 99, "pools[small].ctx"),
        (["pools", 1, "queue"], {"level_weights": {"batch": 2}}, "pools[large].queue.level_weights.batch"),
        (["pools", 0, "replicas", 0, "api_key"], SECRET, "pools[small].replicas[0].api_key"),
        (["pools", 0, "replicas", 1, "managed", "env", "A"], SECRET, "pools[small].replicas[own].managed.env.A"),
        (["pools", 0, "replicas", 1, "managed", "env", "B"], SECRET, "pools[small].replicas[own].managed.env.B"),
        (["pools", 0, "replicas", 1, "managed", "args"], [SECRET], "pools[small].replicas[own].managed.args"),
        (["pools", 0, "replicas", 1, "devices"], [1], "pools[small].replicas[own].devices"),
        (["tenants", 0, "weight"], 3, "tenants[acme].weight"),
        (["tenant_defaults", "rate"], {"batch": {"per_s": 1, "burst": 1}}, "tenant_defaults.rate.batch"),
        (["sampler_profiles", "v1", "top_k"], 4, "sampler_profiles.v1.top_k"),
        (["sampler_profiles", "v2"], {}, "sampler_profiles.v2"),
        (["keys", 0, "sha256"], "c" * 64, "keys[k].sha256"),
        (["nodes", 0, "pools"], ["small"], "nodes[n].pools"),
        (["sessions", "turns"], 3, "sessions.turns"),
    ],
)  # fmt: skip
def test_changed_setting_is_told_by_its_path(path: list[str | int], value: object, expected: str) -> None:
    found = difference(OLD, put(tree(), path, value))
    assert (found.changed, found.needs_restart) == ((expected,), ())
    assert SECRET not in repr(found)
    assert found.pools_changed == frozenset({str(tree()["pools"][path[1]]["id"])} if path[0] == "pools" else ())


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["server", "port"], 1, "server.port"),
        (["server", "limits"], {"body_bytes": 2048}, "server.limits.body_bytes"),
        (["log", "level"], "debug", "log.level"),
        (["streams", "heartbeat_s"], 2.0, "streams.heartbeat_s"),
        (["compat"], True, "compat"),
        (["node_lease_s"], 3.0, "node_lease_s"),
    ],
)
def test_what_is_read_at_the_start_needs_a_restart(path: list[str | int], value: object, expected: str) -> None:
    """ORCH-3253."""
    found = difference(OLD, put(tree(), path, value))
    assert found == Difference(changed=(expected,), needs_restart=(expected,))


def test_first_key_and_last_key_need_a_restart_and_others_do_not() -> None:
    """ORCH-3253."""
    keyless = config.Settings.model_validate(tree() | {"keys": []})
    assert difference(OLD, keyless) == Difference(changed=("keys[k]",), needs_restart=("keys",))
    assert difference(keyless, OLD) == Difference(changed=("keys[k]",), needs_restart=("keys",))
    assert difference(OLD, put(tree(), ["keys"], [KEY, KEY | {"id": "other", "sha256": "d" * 64}])) == Difference(
        changed=("keys[other]",)
    )


def test_pools_that_come_go_and_change_are_named() -> None:
    """ORCH-3251."""
    values = tree()
    small, large = values["pools"]
    values["pools"] = [large | {"id": "new"}, small | {"drain_s": 1.0}]
    found = difference(OLD, config.Settings.model_validate(values))
    assert found == Difference(
        changed=("pools[small].drain_s", "pools[large]", "pools[new]"),
        pools_added=frozenset({"new"}),
        pools_removed=frozenset({"large"}),
        pools_changed=frozenset({"small"}),
    )


def test_another_order_of_the_same_pools_is_a_change() -> None:
    values = tree()
    values["pools"].reverse()
    assert difference(OLD, config.Settings.model_validate(values)) == Difference(changed=("pools",))


CHOICES: list[tuple[list[str | int], list[Any]]] = [
    (["pools", 0, "ctx"], [2048, 4096]),
    (["pools", 0, "replicas", 1, "managed", "env"], [{}, {"A": "1"}, {"B": "1"}]),
    (["pools", 1, "replicas"], [[{"url": "http://h:2"}], [{"url": "http://h:2"}, {"url": "http://h:3"}]]),
    (["tenants"], [[], [{"name": "acme"}], [{"name": "acme", "weight": 2}]]),
    (["keys"], [[], [KEY]]),
    (["streams"], [{}, {"heartbeat_s": 1.0}]),
]


@st.composite
def configurations(draw: st.DrawFn) -> config.Settings:
    values = tree()
    for path, options in CHOICES:
        values = put(values, path, draw(st.sampled_from(options))).model_dump()
        values["pools"][0]["replicas"][0]["api_key"] = "x"
    if draw(st.booleans()):
        values["pools"].reverse()
    return config.Settings.model_validate(values)


@given(configurations(), configurations())
def test_a_difference_is_empty_exactly_when_both_are_equal_and_the_same_both_ways(
    one: config.Settings, other: config.Settings
) -> None:
    there, back = difference(one, other), difference(other, one)
    assert bool(there.changed) == (one != other)
    assert (sorted(there.changed), sorted(there.needs_restart)) == (sorted(back.changed), sorted(back.needs_restart))
    assert len(set(there.changed)) == len(there.changed)
    assert (there.pools_added, there.pools_changed) == (back.pools_removed, back.pools_changed)
