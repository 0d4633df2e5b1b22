"""ORCH-3027, ORCH-3053, ORCH-3049, ORCH-3031: counters about engine processes and their hosts."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llorch.telemetry_engines import EngineMetrics
from llorch.telemetry_metrics import Metrics
from llorch_contract.metrics import FAMILIES, OVERFLOW_FAMILY, OVERFLOW_LABEL

PLACE = {"engine": "llamacpp", "engine_version": "unverified", "pool": "p"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(FAMILIES, overflow_label=OVERFLOW_LABEL, overflow_family=OVERFLOW_FAMILY)


@pytest.fixture
def engines(metrics: Metrics) -> EngineMetrics:
    return EngineMetrics(metrics, "unverified")


def value(metrics: Metrics, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(metrics.render([]).decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


def test_failures_are_counted_by_cause(metrics: Metrics, engines: EngineMetrics) -> None:
    engines.count_failures("llamacpp", None, "p", "exit", 2)
    engines.count_failures("llamacpp", None, "p", "vram-oom", 1)
    engines.count_failures("llamacpp", "b1", "p", "exit", 1)
    assert value(metrics, "replica_restarts_total", **PLACE, cause="exit") == 2
    assert value(metrics, "replica_restarts_total", **PLACE, cause="vram-oom") == 1
    assert value(metrics, "replica_restarts_total", engine_version="b1", cause="exit") == 1


def test_start_that_came_up_is_timed_and_one_that_did_not_is_only_counted(
    metrics: Metrics, engines: EngineMetrics
) -> None:
    engines.note_preload("llamacpp", None, "p", 0.612)
    engines.note_preload("llamacpp", None, "p", 0.0)
    engines.note_preload("llamacpp", None, "p", None)
    assert value(metrics, "preloads_total", **PLACE, outcome="succeeded") == 2
    assert value(metrics, "preloads_total", **PLACE, outcome="failed") == 1
    assert value(metrics, "preload_duration_ms_count", **PLACE) == 2
    assert value(metrics, "preload_duration_ms_sum", **PLACE) == pytest.approx(612)


def test_self_tests_resets_and_reloads_are_counted_by_outcome(metrics: Metrics, engines: EngineMetrics) -> None:
    for is_passed in (True, False, False):
        engines.note_test("llamacpp", None, "p", is_passed=is_passed)
    engines.count_resets("gpu-host", 3)
    for outcome in ("done", "refused", "rolled_back", "failed"):
        engines.note_reload(outcome)
        assert value(metrics, "config_reloads_total", outcome=outcome) == 1
    assert value(metrics, "self_tests_total", **PLACE, outcome="passed") == 1
    assert value(metrics, "self_tests_total", **PLACE, outcome="failed") == 2
    assert value(metrics, "driver_resets_total", node="gpu-host") == 3
