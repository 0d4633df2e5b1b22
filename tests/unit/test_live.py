"""What changes in one instant with the configuration (ORCH-3031, ORCH-3159); what is told of engines and changes."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from llorch import config, telemetry_log
from llorch.api.auth import Keys
from llorch.deployment import deployment_of
from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.policy import NO_QUOTA
from llorch.domain.scheduler import Scheduler
from llorch.errors import NotFound, Unauthenticated
from llorch.live import EngineReporter, Live
from llorch.service.configurations import Deployment
from llorch.service.inventory import ConfigChange, PoolChange
from llorch.service.launching import Cause, HostFacts, LastError, LaunchReport, Phase
from llorch.service.nodes import Nodes
from llorch.service.probes import Watched
from llorch.settings import default_quota, key_records, node_configs, quotas, route_scopes, session_limits
from llorch.telemetry import Telemetry
from llorch.testing.clock import FakeClock
from llorch_contract.metrics import FAMILIES
from tests.unit.service.estate import managed
from tests.unit.service.estate import pool as pool_of

POOLS = [
    {"id": name, "engine": "llamacpp", "model": name, "replicas": [{"url": f"http://h:{port}"}]}
    for name, port in (("a", 1), ("b", 2))
]


def key(name: str) -> dict[str, Any]:
    return {"id": name, "tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}


def node(name: str) -> dict[str, Any]:
    return {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}


class Posted:
    """Takes events as the dispatcher does, and keeps them; its schedulers are real."""

    def __init__(self, deployment: Deployment, ledger: Ledger) -> None:
        self.schedulers = {name: Scheduler(policy, ledger) for name, policy in deployment.policies.items()}
        self.posted: list[tuple[str, ev.Event]] = []

    def post(self, route_id: str, event: ev.Event) -> None:
        self.posted.append((route_id, event))

    def post_to_all(self, event: ev.Event) -> None:
        for route_id in self.schedulers:
            self.post(route_id, event)


class Lifting(Ledger):
    """A ledger in which a change of limits frees the tenants that the test names."""

    freed: tuple[str, ...] = ()

    def take_lifted(self) -> list[str]:
        return list(self.freed)


class Parts:
    """The parts of a service that live by the configuration."""

    def __init__(self, tmp_path: Path, **sections: Any) -> None:
        self._file = tmp_path / "llorch.yaml"
        self.deployment = self.read(**sections)
        settings = cast("config.Settings", self.deployment.source)
        self.ledger = Lifting(session_limits(settings), quotas(settings), default_quota(settings))
        self.dispatcher = Posted(self.deployment, self.ledger)
        self.keys = Keys(key_records(settings), node_configs(settings))
        self.nodes = Nodes(
            node_configs(settings), version="1.0.0", clock=FakeClock(), lease_s=10.0, report=lambda _: None,
            new_id=lambda: "lease",
        )  # fmt: skip
        self.out = io.BytesIO()
        log = telemetry_log.make_logger("info", "json", stream=self.out)
        self.telemetry = Telemetry(FAMILIES, route_scopes(settings), log, lambda _: {})
        self.reporter = EngineReporter(self.telemetry, log)
        self.pools = cast("Any", type("Routed", (), {"routes": None})())
        self.live = Live(
            dispatcher=cast("Any", self.dispatcher), ledger=self.ledger, pools=self.pools, nodes=self.nodes,
            keys=self.keys, telemetry=self.telemetry, log=log,
        )  # fmt: skip

    def read(self, **sections: Any) -> Deployment:
        self._file.write_text(yaml.safe_dump({"pools": POOLS, **sections}), encoding="utf-8")
        return deployment_of(config.load(self._file, {}))

    def value(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.telemetry.render([]).decode())
        found = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in found if labels.items() <= sample.labels.items())

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path, keys=[key("alice")], nodes=[node("n1")])


# One instant


def test_policy_is_posted_only_where_it_differs(parts: Parts) -> None:
    """ORCH-3159."""
    changed = parts.read(pools=[{**POOLS[0], "queue": {"capacity": 3}}, POOLS[1]], keys=[key("alice")])
    parts.live.commit(changed)
    [(route_id, event)] = parts.dispatcher.posted
    assert (route_id, event) == ("llamacpp/a", ev.ConfigChanged(changed.policies["llamacpp/a"]))
    assert {route.route_id for route in parts.pools.routes} == {"llamacpp/a", "llamacpp/b"}


def test_same_configuration_posts_nothing(parts: Parts) -> None:
    """ORCH-3031."""
    parts.live.commit(parts.deployment)
    assert parts.dispatcher.posted == []


def test_tenants_that_a_new_limit_freed_are_told_of_on_every_route(parts: Parts) -> None:
    """ORCH-3159."""
    parts.ledger.freed = ("alice",)
    parts.live.commit(parts.deployment)
    assert parts.dispatcher.posted == [(route_id, ev.LimitLifted("alice")) for route_id in parts.dispatcher.schedulers]


def test_keys_quotas_and_nodes_of_the_new_configuration_count(parts: Parts) -> None:
    """ORCH-3031."""
    new = parts.read(keys=[key("bob")], nodes=[node("n2")], tenants=[{"name": "bob", "max_concurrent": 1}])
    parts.live.prepare(parts.deployment, new)
    assert [view.node_id for view in parts.nodes.list()] == ["n2", "n1"], "those that go stay until all else is done"
    parts.live.commit(new)
    assert parts.keys.identify(b"Bearer bob").tenant == "bob"
    with pytest.raises(Unauthenticated):
        parts.keys.identify(b"Bearer alice")
    assert quotas(cast("config.Settings", new.source))["bob"] != NO_QUOTA
    parts.live.finish(new)
    assert [view.node_id for view in parts.nodes.list()] == ["n2"]
    with pytest.raises(NotFound):
        parts.nodes.manager("n1")


def test_outcome_of_a_reload_is_counted_and_logged_without_values(parts: Parts) -> None:
    """ORCH-3031."""
    parts.live.observe("done", ConfigChange("done", 1.0, changed=("pools[a].queue.capacity",)))
    parts.live.observe("refused", ConfigChange("failed", 1.0, message="no such setting"))
    assert parts.value("config_reloads_total", outcome="done") == parts.value("config_reloads_total", outcome="refused")
    assert [(line["event"], line["level"], line["outcome"], line["reason"]) for line in parts.lines()] == [
        ("config_reload", "info", "done", None),
        ("config_reload", "warning", "refused", "no such setting"),
    ]


# Engines

UP = LaunchReport("a/0", 0, Phase.UP, incarnation=1, load_s=0.5)
STARTING = LaunchReport("a/0", 0, Phase.STARTING, incarnation=1)
ERROR = LastError("WORKER_RESET", "it ended with status 1", 1.0)


def engine(node_id: str | None = None) -> Watched:
    return Watched(replace(managed(pool_of("a", "a")), node=node_id), FakeClock())


def test_each_failure_is_counted_once_by_its_cause(parts: Parts) -> None:
    """ORCH-3038: a manager tells totals, and begins anew when it does."""
    totals: list[dict[Cause, int]] = [
        {Cause.EXIT: 2}, {Cause.EXIT: 2}, {Cause.EXIT: 3, Cause.PORT: 1}, {Cause.EXIT: 1},
    ]  # fmt: skip
    before = None
    for restarts in totals:
        now = replace(STARTING, restarts=restarts)
        parts.reporter.on_launch(engine(), before, now)
        before = now
    assert parts.value("replica_restarts_total", pool="a", cause="exit") == 4
    assert parts.value("replica_restarts_total", pool="a", cause="port") == 1


def test_start_counts_as_succeeded_once_and_as_failed_when_it_never_came_up(parts: Parts) -> None:
    """ORCH-3049."""
    waiting = replace(STARTING, phase=Phase.WAITING, cause=Cause.EXIT)
    loading = replace(STARTING, phase=Phase.LOADING)
    history = [STARTING, UP, UP, waiting, STARTING, waiting, loading, waiting, replace(UP, incarnation=2)]
    for before, now in zip([None, *history], history, strict=False):
        parts.reporter.on_launch(engine(), before, now)
    assert parts.value("preloads_total", outcome="succeeded") == 2
    assert parts.value("preloads_total", outcome="failed") == 2
    assert parts.value("preload_duration_ms_sum") == pytest.approx(1000)


def test_self_tests_are_counted(parts: Parts) -> None:
    """ORCH-3049."""
    parts.reporter.on_test(engine(), True)
    parts.reporter.on_test(engine(), False)
    assert parts.value("self_tests_total", outcome="passed") == parts.value("self_tests_total", outcome="failed") == 1


def test_failure_on_a_node_is_logged_once_and_one_of_this_host_by_its_own_manager(parts: Parts) -> None:
    """ORCH-3038, ORCH-2107."""
    failed = replace(STARTING, phase=Phase.WAITING, cause=Cause.EXIT, error=ERROR, next_start_s=1.5)
    for watched in (engine("gpu-host"), engine()):
        parts.reporter.on_launch(watched, STARTING, failed)
        parts.reporter.on_launch(watched, failed, failed)
    [line] = parts.lines()
    assert (line["event"], line["level"], line["node"], line["pool_id"]) == (
        "engine_failed",
        "warning",
        "gpu-host",
        "a",
    )
    assert (line["replica_id"], line["cause"], line["code"], line["next_start_s"]) == ("a/0", "exit", ERROR.code, 1.5)


def test_driver_resets_are_counted_once_and_from_nothing_when_a_manager_begins_anew(parts: Parts) -> None:
    """ORCH-3053."""
    for resets in (0, 2, 2, 3, 1):
        parts.reporter.count_resets({"local": HostFacts(driver_resets=resets), "gpu-host": HostFacts()})
    assert parts.value("driver_resets_total", node="local") == 4
    assert parts.value("driver_resets_total", node="gpu-host") == 0


def test_steps_of_a_change_are_logged_and_those_that_failed_as_warnings(parts: Parts) -> None:
    """ORCH-2106."""
    for state in ("running", "done", "failed", "rolled_back"):
        parts.reporter.on_change("a", PoolChange("drain", state, 1.0, replicas_total=2, replicas_done=1, moved=3))
    assert [line["level"] for line in parts.lines()] == ["info", "info", "warning", "warning"]
    line = parts.lines()[0]
    assert (line["event"], line["kind"], line["replicas"], line["moved"]) == ("pool_change", "drain", "1/2", 3)
