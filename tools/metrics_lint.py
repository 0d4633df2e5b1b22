"""Compares a live scrape of /metrics with the contract: name, type, help, labels, buckets, budgets (OC-METRICS-7101).

Usage: python tools/metrics_lint.py [SCRAPE]        a file with the text of a scrape; default: standard input
Prints one line for each difference and exits 1 when there is one.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

CONTRACT = Path(__file__).resolve().parents[1] / "openapi" / "metrics.yaml"

Declaration = Mapping[str, Any]


def lint(text: str, contract: Mapping[str, Any]) -> list[str]:
    """Every difference between the scrape and the contract, as lines for people; empty when they agree."""
    declared = {family["name"]: family for family in contract["families"]}
    other = contract["overflow_label"]
    try:
        scraped = {_name(metric): metric for metric in text_string_to_metric_families(text)}
    except ValueError as error:
        return [f"not the text of a scrape: {error}"]
    problems = [f"{name}: not in the contract" for name in scraped if name not in declared]
    for name, family in declared.items():
        if name not in scraped:
            problems.append(f"{name}: in the contract, but not in the scrape")
        else:
            problems += [f"{name}: {problem}" for problem in _compare(scraped[name], family, other)]
    return problems


def _name(metric: Metric) -> str:
    """The name in the scrape; the parser takes `_total` off those of counters."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _compare(metric: Metric, family: Declaration, other: str) -> Iterator[str]:
    if metric.type != family["type"]:
        yield f"is a {metric.type}, the contract says {family['type']}"
        return
    if metric.documentation != family["help"]:
        yield "its help text is not the contract's"
    labels = set(family["labels"])
    own = {"le"} if family["type"] == "histogram" else set()
    series = set()
    for sample in metric.samples:
        present = sample.labels.keys() - (own if sample.name.endswith("_bucket") else set())
        if present != labels:
            yield f"has the labels {sorted(present)}, the contract says {sorted(labels)}"
            return
        series.add(tuple(sample.labels[label] for label in family["labels"]))
    yield from _check_series(series, family, other)
    if family["type"] == "histogram":
        yield from _check_buckets(metric, family)


def _check_series(series: set[tuple[str, ...]], family: Declaration, other: str) -> Iterator[str]:
    overflow = (other,) * len(family["labels"])
    count = len(series - {overflow}) if family["labels"] else len(series)
    if count > family["max_series"]:
        yield f"has {count} series, its budget is {family['max_series']}"
    for label, values in family.get("label_values", {}).items():
        index = family["labels"].index(label)
        strange = {labels[index] for labels in series} - {*values, other}
        if strange:
            yield f"label {label} has the undeclared values {sorted(strange)}"


def _check_buckets(metric: Metric, family: Declaration) -> Iterator[str]:
    expected = {float(bound) for bound in family["buckets"]} | {float("inf")}
    bounds: dict[tuple[str, ...], set[float]] = {}
    for sample in metric.samples:
        if sample.name.endswith("_bucket"):
            labels = tuple(sample.labels[label] for label in family["labels"])
            bounds.setdefault(labels, set()).add(float(sample.labels["le"]))
    if any(found != expected for found in bounds.values()):
        yield "its buckets are not the contract's"


def main(arguments: list[str]) -> int:
    """Lint the scrape in the named file, or on standard input."""
    text = Path(arguments[0]).read_text(encoding="utf-8") if arguments else sys.stdin.read()
    problems = lint(text, yaml.safe_load(CONTRACT.read_text(encoding="utf-8")))
    print("\n".join(problems) if problems else "the scrape agrees with the contract")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
