"""ORCH-3077: weights and quotas bind the tenant that they name, or are an error."""

from pathlib import Path

import pytest

from llorch import config
from llorch.errors import ConfigError

KEYS = """\
keys:
  - {id: one, tenant: alice, sha256: 1111111111111111111111111111111111111111111111111111111111111111}
  - {id: two, tenant: bob, sha256: 2222222222222222222222222222222222222222222222222222222222222222}
  - {id: three, tenant: alice, sha256: 3333333333333333333333333333333333333333333333333333333333333333}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llorch.yaml"


def settings(file: Path, text: str) -> config.Settings:
    file.write_text(text, encoding="utf-8")
    return config.load(file, {})


def problems(file: Path, text: str) -> list[str]:
    """The lines of the ConfigError, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        settings(file, text)
    return caught.value.message.replace(f"{file}:", "").split("\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("alcie", 'did you mean "alice"?'),
        ("ALICE-2", "name the tenant of a key, or add a key (`llorch keys new`)"),
        ("local", "name the tenant of a key, or add a key (`llorch keys new`)"),
        ("one", "name the tenant of a key, or add a key (`llorch keys new`)"),
    ],
)
def test_peer_bug_25_quota_of_a_name_that_no_key_has_is_an_error(file: Path, name: str, hint: str) -> None:
    text = f"{KEYS}tenants:\n  - name: bob\n  - name: {name}\n    max_queued: 3\n"
    assert problems(file, text) == [f"7: tenants[1].name: no key belongs to this tenant; {hint}"]


def test_peer_bug_25_without_keys_only_local_can_have_a_quota(file: Path) -> None:
    expected = '1: tenants[0].name: no key belongs to this tenant; without keys everybody is "local"'
    assert problems(file, "tenants: [{name: alice, max_queued: 3}]\n") == [expected]
    assert settings(file, "tenants: [{name: local, max_queued: 3}]\n").tenants[0].max_queued == 3


def test_peer_bug_25_misspelt_quota_is_an_error(file: Path) -> None:
    text = f"{KEYS}tenants: [{{name: bob, max_queue: 3}}]\n"
    assert problems(file, text) == ['5: tenants[0].max_queue: unknown key; did you mean "max_queued"?']


@pytest.mark.parametrize("keys", ["keys: [{id: one, tenant: alice, sha256: short}]\n", "keys: alice\n"])
def test_a_key_of_wrong_form_does_not_make_its_tenant_unknown(file: Path, keys: str) -> None:
    found = problems(file, f"{keys}tenants: [{{name: alice}}]\n")
    assert [line.split(": ")[1].partition("[")[0] for line in found] == ["keys"]


def test_one_tenant_has_one_entry(file: Path) -> None:
    text = f"{KEYS}tenants:\n  - {{name: bob, weight: 2}}\n  - {{name: bob, weight: 3}}\n"
    assert problems(file, text) == ["7: tenants[1].name: the same as tenants[0].name (6); each needs its own"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tenants: [{name: local, weight: 0}]\n", "tenants[0].weight: expected more than 0"),
        ("tenant_defaults: {weight: -1}\n", "tenant_defaults.weight: expected more than 0"),
        ("tenants: [{name: local, max_queued: 0}]\n", "tenants[0].max_queued: expected at least 1"),
        ("tenants: [{name: local, tokens_per_minute: 1.5}]\n", "tenants[0].tokens_per_minute: expected a whole number"),
        ("tenants: [{weight: 1}]\n", "tenants[0].name: is missing; it has no default"),
        (
            "tenant_defaults: {rate: {batch: {per_s: 1}}}\n",
            "tenant_defaults.rate.batch.burst: is missing; it has no default",
        ),
        (
            "tenant_defaults: {rate: {batch: {per_s: 1, burst: 0}}}\n",
            "tenant_defaults.rate.batch.burst: expected at least 1",
        ),
        (
            "tenant_defaults: {rate: {batch: {per_s: 0, burst: 1}}}\n",
            "tenant_defaults.rate.batch.per_s: expected more than 0",
        ),
        (
            "tenant_defaults: {rate: {betch: {per_s: 1, burst: 1}}}\n",
            'tenant_defaults.rate.betch: unknown key; did you mean "batch"?',
        ),
        ("tenant_defaults: {rat: {}}\n", 'tenant_defaults.rat: unknown key; did you mean "rate"?'),
        ("sessions: {bindings: 0}\n", "sessions.bindings: expected at least 1"),
        ("sessions: {detour_ms: -1}\n", "sessions.detour_ms: expected at least 0"),
    ],
)
def test_a_wrong_weight_or_quota_is_told_with_what_was_expected(file: Path, text: str, expected: str) -> None:
    assert problems(file, text) == [f"1: {expected}"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("queue: {full_policy: {bach: reject}}", 'queue.full_policy.bach: unknown key; did you mean "batch"?'),
        ("queue: {full_policy: reject}", "queue.full_policy: expected settings, as `name: value` lines"),
        ("queue: {fairness: fair}", "queue.fairness: expected one of wfq, strict"),
        ("queue: {order: lifo}", 'queue.order: expected one of fifo, edf; did you mean "fifo"?'),
        ("queue: {level_weights: {batch: 0}}", "queue.level_weights.batch: expected more than 0"),
        ("queue: {token_cost: {output: 0}}", "queue.token_cost.output: expected more than 0"),
        ("queue: {feasible_probability: 2}", "queue.feasible_probability: expected at most 1"),
        ("queue: {edf_default_ms: 0}", "queue.edf_default_ms: expected at least 1"),
        ("preemption: {mode: hrad}", 'preemption.mode: expected one of soft, hard; did you mean "hard"?'),
        (
            "preemption: {protected: [bath]}",
            'preemption.protected[0]: expected one of interactive, batch; did you mean "batch"?',
        ),
        ("preemption: {protected: [batch, batch]}", "preemption.protected: does not keep the rule uniqueItems"),
        ("price: {prompt_per_1k: -1}", "price.prompt_per_1k: expected at least 0"),
    ],
)
def test_a_wrong_rule_of_a_route_is_told_with_what_was_expected(file: Path, section: str, expected: str) -> None:
    pool = f"{{id: a, engine: llamacpp, model: m, replicas: [{{url: 'http://h:1'}}], {section}}}"
    assert problems(file, f"pools: [{pool}]\n") == [f"1: pools[0].{expected}"]


def test_tenants_are_those_of_the_keys_each_once(file: Path) -> None:
    assert config.tenant_names(settings(file, KEYS).keys) == ["alice", "bob"]
    assert config.tenant_names([]) == ["local"]
