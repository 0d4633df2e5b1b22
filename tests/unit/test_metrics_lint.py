"""OC-METRICS-7101: a scrape is compared with the contract, and each kind of difference is found."""

import copy
import io
from typing import Any

import pytest
import yaml

from llorch.telemetry_metrics import Metrics, Sample
from llorch_contract.metrics import FAMILIES, OVERFLOW_FAMILY, OVERFLOW_LABEL
from tools.metrics_lint import CONTRACT, lint, main


@pytest.fixture
def contract() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CONTRACT.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def scrape() -> str:
    """Of a server whose every family has moved."""
    metrics = Metrics(FAMILIES, overflow_label=OVERFLOW_LABEL, overflow_family=OVERFLOW_FAMILY)
    samples = []
    for family in FAMILIES:
        values = [next(iter(allowed), "x") for allowed in family.label_values]
        if family.kind == "gauge":
            samples.append(Sample(family.name, tuple(values), 1))
        elif family.name != OVERFLOW_FAMILY:
            series = metrics.instrument(family.name).series(*values)
            (series.inc if family.kind == "counter" else series.observe)(1)
    return metrics.render(samples).decode()


def change(contract: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    changed = copy.deepcopy(contract)
    next(family for family in changed["families"] if family["name"] == name).update(more)
    return changed


def test_scrape_of_the_declared_families_agrees(scrape: str, contract: dict[str, Any]) -> None:
    assert lint(scrape, contract) == []


def test_fresh_server_agrees_too(contract: dict[str, Any]) -> None:
    metrics = Metrics(FAMILIES, overflow_label=OVERFLOW_LABEL, overflow_family=OVERFLOW_FAMILY)
    assert lint(metrics.render([]).decode(), contract) == []


def test_folded_series_agree(contract: dict[str, Any]) -> None:
    metrics = Metrics(FAMILIES, overflow_label=OVERFLOW_LABEL, overflow_family=OVERFLOW_FAMILY)
    for number in range(1000):
        metrics.instrument("http_requests_total").series("create_task", str(number)).inc()
    assert lint(metrics.render([]).decode(), contract) == []


def test_undeclared_family_is_found(scrape: str, contract: dict[str, Any]) -> None:
    more = "# HELP invented_total x\n# TYPE invented_total counter\ninvented_total 1\n"
    assert lint(scrape + more, contract) == ["invented_total: not in the contract"]


def test_undeclared_samples_without_a_type_are_found(scrape: str, contract: dict[str, Any]) -> None:
    assert lint(scrape + "stray 1\n", contract) == ["stray: not in the contract"]


def test_missing_family_is_found(scrape: str, contract: dict[str, Any]) -> None:
    without = "\n".join(line for line in scrape.split("\n") if "slots_busy" not in line)
    assert lint(without, contract) == ["slots_busy: in the contract, but not in the scrape"]


@pytest.mark.parametrize(
    ("name", "more", "problem"),
    [
        ("queue_depth", {"type": "histogram"}, "is a gauge, the contract says histogram"),
        ("queue_depth", {"help": "Else."}, "its help text is not the contract's"),
        ("pool_allow_cpu", {"labels": ["who"]}, "has the labels ['pool'], the contract says ['who']"),
        ("task_wait_ms", {"buckets": [1, 2]}, "its buckets are not the contract's"),
        ("http_requests_total", {"max_series": 0}, "has 1 series, its budget is 0"),
        ("http_requests_total", {"label_values": {"status": ["200"]}}, "label status has the undeclared values ['x']"),
    ],
)  # fmt: skip
def test_difference_is_found(
    scrape: str, contract: dict[str, Any], name: str, more: dict[str, Any], problem: str
) -> None:
    assert lint(scrape, change(contract, name, **more)) == [f"{name}: {problem}"]


def test_text_that_is_no_scrape_is_found(contract: dict[str, Any]) -> None:
    assert lint("<html>", contract)[0].startswith("not the text of a scrape")


def test_command_exits_by_what_it_found(
    scrape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(scrape))
    assert main([]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("invented 1\n"))
    assert main([]) == 1
    assert "invented: not in the contract" in capsys.readouterr().out
