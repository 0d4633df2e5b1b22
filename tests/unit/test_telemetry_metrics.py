"""ORCH-3028: cardinality budgets are enforced, and what is folded is counted."""

from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llorch.telemetry_metrics import Family, Metrics, Sample
from llorch_contract.metrics import MetricFamily


def small(kind: Any, name: str = "things_total", **more: Any) -> list[MetricFamily]:
    defaults = {
        "help": "Things.",
        "unit": "things",
        "labels": ("who",),
        "label_values": ((),),
        "buckets": (),
        "max_series": 2,
    }
    overflow = defaults | {"labels": ("family",), "max_series": 8}
    return [
        MetricFamily(name=name, kind=kind, **(defaults | more)),  # type: ignore[arg-type]
        MetricFamily(name="label_overflow_total", kind="counter", **overflow),  # type: ignore[arg-type]
    ]


def metrics(families: Sequence[Family]) -> Metrics:
    return Metrics(families, overflow_label="other", overflow_family="label_overflow_total")


def series(text: bytes, name: str) -> dict[str, float]:
    """Value by the label's value."""
    found = [s for m in text_string_to_metric_families(text.decode()) for s in m.samples if s.name == name]
    return {"/".join(sample.labels.values()): sample.value for sample in found}


def test_peer_bug_17_label_sets_beyond_the_budget_are_folded_and_counted() -> None:
    some = metrics(small("counter"))
    for number in range(1000):
        some.instrument("things_total").series(f"w{number}").inc()
    some.instrument("things_total").series("w0").inc()
    text = some.render([])
    assert series(text, "things_total") == {"w0": 2, "w1": 1, "other": 998}
    assert series(text, "label_overflow_total") == {"things_total": 998}


def test_peer_bug_17_every_movement_of_a_kept_series_counts_as_folded() -> None:
    some = metrics(small("histogram", "size", buckets=(1.0,), max_series=1))
    some.instrument("size").series("a").observe(1)
    folded = some.instrument("size").series("b")
    folded.observe(1)
    folded.observe(2)
    text = some.render([])
    assert series(text, "size_count") == {"a": 1, "other": 2}
    assert series(text, "label_overflow_total") == {"size": 2}


def test_peer_bug_17_gauges_beyond_the_budget_are_added_up() -> None:
    some = metrics(small("gauge", "depth"))
    text = some.render([Sample("depth", (name,), 5) for name in "abcd"])
    assert series(text, "depth") == {"a": 5, "b": 5, "other": 10}
    assert series(text, "label_overflow_total") == {"depth": 2}
    assert series(some.render([Sample("depth", ("a",), 1)]), "depth") == {"a": 1}


def test_value_outside_a_closed_set_is_folded() -> None:
    some = metrics(small("counter", label_values=(("cat", "dog"),)))
    some.instrument("things_total").series("cat").inc()
    some.instrument("things_total").series("wolf").inc()
    text = some.render([])
    assert series(text, "things_total") == {"cat": 1, "other": 1}
    assert series(text, "label_overflow_total") == {"things_total": 1}


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = metrics(small("counter")), metrics(small("counter"))
    one.instrument("things_total").series("a").inc()
    assert b'things_total{who="a"}' not in other.render([])


def test_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="things_total has the labels"):
        metrics(small("counter")).instrument("things_total").series("a", "b")
