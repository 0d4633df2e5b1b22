"""ORCH-3244: each part of the service is given its own piece of the configuration, in its own types."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llorch import config
from llorch.domain.backoff import RestartPolicy
from llorch.domain.policy import (
    NO_QUOTA,
    Fairness,
    FullPolicy,
    Order,
    PreemptionPolicy,
    Prices,
    QueuePolicy,
    Quota,
    Rate,
    RoutePolicy,
)
from llorch.domain.task import Priority
from llorch.service.launching import Headroom, LaunchOrder, Supervision
from llorch.service.nodes import NodeConfig
from llorch.settings import (
    client_limits,
    default_quota,
    key_records,
    launch_orders,
    node_configs,
    quotas,
    replica_id_of,
    route_policy,
    route_scopes,
    service_pool,
    session_limits,
)

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH

KEYS = [{"id": name, "tenant": name, "sha256": digit * 64} for name, digit in (("alice", "a"), ("bob", "b"))]


def pool(**more: Any) -> dict[str, Any]:
    return {"id": "p", "engine": "llamacpp", "model": "m", "replicas": [{"url": "http://h:1"}], **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llorch.yaml"


def load(file: Path, **parts: Any) -> config.Settings:
    file.write_text(yaml.safe_dump({"pools": [pool()], **parts}), encoding="utf-8")
    return config.load(file, {})


def test_what_is_not_configured_is_what_the_domain_does_by_itself(file: Path) -> None:
    settings = load(file)
    expected = RoutePolicy(queue=QueuePolicy(weights={"local": 1.0}))
    assert route_policy(settings, settings.pools[0]) == expected
    assert (quotas(settings), default_quota(settings)) == ({}, NO_QUOTA)


def test_rules_of_a_route_reach_the_scheduler_in_its_units(file: Path) -> None:
    """ORCH-3004, ORCH-3005, ORCH-3075, ORCH-3079, ORCH-3085, ORCH-3099."""
    queue = {
        "capacity": 7,
        "full_policy": {"interactive": "shed-low-priority", "batch": "reject"},
        "fairness": "strict",
        "order": "edf",
        "edf_default_ms": 1500,
        "level_weights": {"interactive": 3, "batch": 0.5},
        "token_cost": {"prompt": 0.25, "output": 4},
        "feasible_probability": 0.2,
    }
    own = pool(
        queue=queue,
        timeouts={"wall_s": 5},
        preemption={"mode": "hard", "per_minute": 2, "protected": []},
        price={"prompt_per_1k": 2, "output_per_1k": 6},
    )
    parts: dict[str, Any] = {
        "streams": {"disconnect_grace_s": 3},
        "sessions": {"bindings": 12, "detour_ms": 250},
        "keys": KEYS,
        "tenants": [{"name": "bob", "weight": 4}],
    }
    settings = load(file, pools=[own], **parts)
    assert route_policy(settings, settings.pools[0]) == RoutePolicy(
        queue=QueuePolicy(
            capacity={INTERACTIVE: 7, BATCH: 7},
            full_policy={INTERACTIVE: FullPolicy.SHED_LOW_PRIORITY, BATCH: FullPolicy.REJECT},
            fairness=Fairness.STRICT,
            order=Order.EDF,
            edf_default_s=1.5,
            level_weights={INTERACTIVE: 3.0, BATCH: 0.5},
            weights={"alice": 1.0, "bob": 4.0},
            prompt_cost=0.25,
            output_cost=4.0,
        ),
        wall_s=5.0,
        unread_grace_s=3.0,
        preemption=PreemptionPolicy(hard=True, per_minute=2, protected=frozenset()),
        prices=Prices(prompt=0.002, output=0.006),
        feasible_probability=0.2,
        detour_s=0.25,
        bindings=12,
    )


def test_every_word_of_the_configuration_is_one_of_the_scheduler(file: Path) -> None:
    words = {"full_policy": FullPolicy, "fairness": Fairness, "order": Order}
    settings = load(file)
    for name, known in words.items():
        setting = getattr(settings.pools[0].queue, name)
        values = type(setting.interactive if name == "full_policy" else setting)
        assert {value.value for value in values} == {value.value for value in known}
    assert {priority.value for priority in type(settings.pools[0].preemption.protected[0])} == set(Priority)


def test_tenant_takes_from_the_defaults_what_its_entry_leaves_out(file: Path) -> None:
    """ORCH-3006, ORCH-3076, ORCH-3077."""
    defaults = {
        "weight": 2,
        "max_queued": 10,
        "tokens_per_minute": 500,
        "rate": {"interactive": {"per_s": 1, "burst": 2}, "batch": {"per_s": 3, "burst": 4}},
    }
    own = {"name": "alice", "max_queued": 3, "kv_tokens": 9, "rate": {"batch": {"per_s": 0.5, "burst": 1}}}
    settings = load(file, keys=KEYS, tenants=[own], tenant_defaults=defaults)
    usual = {INTERACTIVE: Rate(1.0, 2.0), BATCH: Rate(3.0, 4.0)}
    assert default_quota(settings) == Quota(max_queued=10, rate=usual, tokens_per_minute=500)
    assert quotas(settings) == {
        "alice": Quota(
            max_queued=3, rate=usual | {BATCH: Rate(0.5, 1.0)}, tokens_per_minute=500, kv_tokens=9, max_concurrent=None
        )
    }
    assert route_policy(settings, settings.pools[0]).queue.weights == {"alice": 2.0, "bob": 2.0}


@pytest.mark.parametrize(("slots", "expected"), [((2, 4), False), ((2, 1), True)])
def test_route_can_be_strict_when_some_replica_of_it_has_one_slot(
    file: Path, slots: tuple[int, ...], expected: bool
) -> None:
    """ORCH-3147."""
    pools = [pool(id=f"p{n}", replicas=[{"url": f"http://h:{n}", "slots": n}]) for n in slots]
    settings = load(file, pools=pools)
    assert {service_pool(settings, each).route.can_be_strict for each in settings.pools} == {expected}


def test_what_is_not_configured_is_what_a_manager_does_by_itself(file: Path) -> None:
    """ORCH-3001."""
    settings = load(file, pools=[pool(model_path="/m.gguf", replicas=[{"managed": {}}])])
    [(node, order)] = launch_orders(settings)
    assert node is None
    assert order == LaunchOrder(
        replica_id="p/0",
        pool_id="p",
        engine="llamacpp",
        launcher="llamacpp",
        model="m",
        model_path="/m.gguf",
        model_digest=None,
        ctx=2048,
        slots=1,
    )


def test_order_of_a_replica_has_everything_that_is_configured_in_its_units(file: Path) -> None:
    """ORCH-3001, ORCH-3020, ORCH-3038, OC-POOL-3010."""
    supervision = {
        "start_s": 1, "self_test_s": 2, "unresponsive_s": 3, "stop_s": 4, "backoff_first_s": 5, "backoff_factor": 6,
        "backoff_max_s": 7, "storm_failures": 8, "cool_down_s": 9, "stable_s": 10,
    }  # fmt: skip
    managed = {
        "launcher": "command", "node": "far", "port": 9000, "threads": 3, "args": ["-x"], "command": ["my", "{port}"],
        "env": {"B": "2", "A": "1"}, "health_path": "/ready", "memory_limit_mib": 16,
    }  # fmt: skip
    replica = {"id": "pair", "slots": 4, "devices": [3, 1], "tensor_split": [2, 1], "managed": managed}
    own = pool(
        ctx=512,
        allow_cpu=True,
        model_path="/m.gguf",
        model_digest="sha256:" + "c" * 64,
        headroom={"vram_mib": 1, "ram_mib": 2, "kv_bytes_per_token": 3},
        supervision=supervision,
        drain_s=7,
        replicas=[{"url": "http://h:1"}, replica],
    )
    settings = load(file, pools=[own], nodes=[{"id": "far", "sha256": "f" * 64}])
    expected = LaunchOrder(
        replica_id="p/pair",
        pool_id="p",
        engine="llamacpp",
        launcher="command",
        model="m",
        model_path="/m.gguf",
        model_digest="sha256:" + "c" * 64,
        ctx=512,
        slots=4,
        allow_cpu=True,
        devices=(3, 1),
        tensor_split=(2.0, 1.0),
        port=9000,
        threads=3,
        arguments=("-x",),
        command=("my", "{port}"),
        environment=(("A", "1"), ("B", "2")),
        health_path="/ready",
        memory_limit_bytes=16 * 1024**2,
        headroom=Headroom(vram_bytes=1024**2, ram_bytes=2 * 1024**2, kv_bytes_per_token=3),
        supervision=Supervision(
            start_s=1.0, unresponsive_s=3.0, stop_s=4.0, restart=RestartPolicy(5.0, 6.0, 7.0, 8, 9.0, 10.0)
        ),
    )
    assert launch_orders(settings) == [("far", expected)]
    assert service_pool(settings, settings.pools[0]).drain_s == 7


def test_replicas_of_a_pool_have_ids_of_their_own_however_alike_they_are(file: Path) -> None:
    alike = {"managed": {}, "slots": 2}
    own = pool(allow_cpu=True, model_path="/m", replicas=[alike, alike | {"id": "named"}, alike])
    settings = load(file, pools=[own])
    ids = [order.replica_id for _, order in launch_orders(settings)]
    assert ids == ["p/0", "p/named", "p/2"] == [replica_id_of(settings.pools[0], index) for index in range(3)]


def test_node_that_names_no_pools_has_those_that_name_it(file: Path) -> None:
    """ORCH-3304."""
    here, there = {"managed": {}, "devices": [0]}, {"managed": {"node": "one"}, "devices": [0]}
    replicas = [[here], [here | {"devices": [1]}, there], [there | {"devices": [1]}]]
    pools = [pool(id=n, model=n, model_path="/m", replicas=some) for n, some in zip("abc", replicas, strict=True)]
    nodes = [
        {"id": "one", "sha256": "a" * 64},
        {"id": "two", "sha256": "b" * 64, "pools": ["a"], "networks": ["10.0.0.0/8"]},
        {"id": "idle", "sha256": "c" * 64},
    ]
    loopback = ("127.0.0.0/8", "::1/128")
    assert node_configs(load(file, pools=pools, nodes=nodes)) == [
        NodeConfig("one", "a" * 64, frozenset({"b", "c"}), loopback),
        NodeConfig("two", "b" * 64, frozenset({"a"}), ("10.0.0.0/8",)),
        NodeConfig("idle", "c" * 64, frozenset(), loopback),
    ]


def test_metrics_weigh_the_tokens_of_a_route_as_its_queue_does(file: Path) -> None:
    """ORCH-3226."""
    costly = pool(id="b", model="n", queue={"token_cost": {"prompt": 0.5}}, replicas=[{"url": "http://h:2"}])
    scopes = {scope.route_id: scope for scope in route_scopes(load(file, pools=[pool(), costly]))}
    assert sorted(scopes) == ["llamacpp/m", "llamacpp/n"]
    assert (scopes["llamacpp/m"].prompt_cost, scopes["llamacpp/m"].output_cost) == (1.0, 2.0)
    assert (scopes["llamacpp/n"].prompt_cost, scopes["llamacpp/n"].output_cost) == (0.5, 2.0)


def test_keys_and_limits_reach_the_edge(file: Path) -> None:
    settings = load(file, keys=[{**KEYS[0], "scopes": ["data", "control"], "priorities": ["batch"]}])
    [record] = key_records(settings)
    assert (record.tenant, record.scopes, record.priorities) == (
        "alice",
        frozenset({"data", "control"}),
        frozenset({BATCH}),
    )
    limits = client_limits(settings)
    assert (limits.max_tokens, limits.session_ttl_ms, limits.session_turns) == (8192 - 3, 600_000, 8)
    assert (session_limits(settings).ttl_s, session_limits(settings).turns) == (600.0, 8)
