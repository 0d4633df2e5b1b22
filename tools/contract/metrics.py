"""Writes `metrics.py`: the metric families of `openapi/metrics.yaml` as values."""

from typing import Any

from tools.contract.models import HEADER
from tools.contract.source import ContractError, Document

KINDS = ("counter", "gauge", "histogram")


def families(metrics: Document) -> list[Document]:
    """The declared families, each with its name. Raises ContractError for a fault in a declaration."""
    for key in ("overflow_label", "overflow_family"):
        if not isinstance(metrics.get(key), str):
            raise ContractError(f"metrics.yaml: `{key}` is missing")
    declared = metrics.get("families")
    if not isinstance(declared, list):
        raise ContractError("metrics.yaml: `families` must be a list")
    names = [family.get("name") for family in declared]
    doubled = sorted({str(name) for name in names if names.count(name) > 1})
    if doubled:
        raise ContractError(f"metrics.yaml: declared twice: {', '.join(doubled)}")
    return [_checked(family) for family in declared]


def _checked(family: Document) -> Document:
    where = f"metrics.yaml: {family.get('name', '?')}"
    for key in ("name", "type", "help", "max_series", "x-req-id"):
        if key not in family:
            raise ContractError(f"{where}: `{key}` is missing")
    if family["type"] not in KINDS:
        raise ContractError(f"{where}: type {family['type']!r} is none of {', '.join(KINDS)}")
    buckets = family.get("buckets", [])
    if (family["type"] == "histogram") != bool(buckets) or buckets != sorted(set(buckets)):
        raise ContractError(f"{where}: a histogram, and nothing else, has rising buckets")
    unknown = sorted(set(family.get("label_values", {})) - set(family.get("labels", [])))
    if unknown:
        raise ContractError(f"{where}: label_values names {', '.join(unknown)}, which is no label of it")
    return family


def metrics_source(metrics: Document) -> str:
    """Source of `metrics.py`."""
    entries = "".join(_family(family) for family in families(metrics))
    return f'''{HEADER}

"""The metric families that a scrape may show, with their cardinality budgets."""

from dataclasses import dataclass
from typing import Literal

OVERFLOW_LABEL = "{metrics["overflow_label"]}"
OVERFLOW_FAMILY = "{metrics["overflow_family"]}"


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """One family. `buckets` are upper bounds in `unit`, of histograms only; `max_series` bounds its label combinations.

    `label_values` holds the closed sets of values, in the order of `labels`; empty where the set is open.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    unit: str | None
    labels: tuple[str, ...]
    label_values: tuple[tuple[str, ...], ...]
    buckets: tuple[float, ...]
    max_series: int


FAMILIES: tuple[MetricFamily, ...] = (
{entries})
'''


def _family(family: Document) -> str:
    labels, closed = family.get("labels", []), family.get("label_values", {})
    fields: dict[str, Any] = {
        "name": family["name"],
        "kind": family["type"],
        "help": " ".join(str(family["help"]).split()),
        "unit": family.get("unit"),
        "labels": tuple(labels),
        "label_values": tuple(tuple(closed.get(label, ())) for label in labels),
        "buckets": tuple(float(bound) for bound in family.get("buckets", ())),
        "max_series": family["max_series"],
    }
    return "    MetricFamily(\n" + "".join(f"        {k}={v!r},\n" for k, v in fields.items()) + "    ),\n"
