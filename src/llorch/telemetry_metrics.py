"""The metric families of the contract, with their cardinality budgets enforced, and the text of a scrape.

It is handed the declarations and knows neither what they mean nor when they move. What is not declared cannot be
counted, and a label set beyond a family's budget is folded into one series and counted as folded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family(Protocol):
    """The declaration of one family. `max_series` is the most label sets it may have besides the overflow one.

    `label_values` holds, label by label, the closed set of values; empty where the set is open. `buckets` are upper
    bounds in `unit`, of histograms only.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def label_values(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def buckets(self) -> tuple[float, ...]: ...
    @property
    def max_series(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """A gauge as it is at the moment of a scrape; `labels` in the order of the declaration."""

    family: str
    labels: tuple[str, ...]
    value: float


class Series(Protocol):
    """One series of a counter or histogram; keep it where it moves often."""

    def inc(self, amount: float = 1) -> None:
        """Count; of counters only."""
        ...

    def observe(self, amount: float) -> None:
        """Take a measurement into the histogram; of histograms only."""
        ...


class _Folded:
    """A series that stands for label sets beyond the budget: every movement is counted as folded, too."""

    def __init__(self, series: Series, overflow: Series) -> None:
        self._series = series
        self._overflow = overflow

    def inc(self, amount: float = 1) -> None:
        self._series.inc(amount)
        self._overflow.inc()

    def observe(self, amount: float) -> None:
        self._series.observe(amount)
        self._overflow.inc()


class Instrument:
    """A counter or histogram of the contract."""

    def __init__(
        self, family: Family, metric: Counter | Histogram, overflow_label: str, overflow: Series | None
    ) -> None:
        self._budget = _Budget(family, overflow_label)
        self._metric = metric
        self._overflow = overflow
        self._series: dict[tuple[str, ...], Series] = {}

    def series(self, *labels: str) -> Series:
        """The series of these label values, in the order of the declaration, or the one that they are folded into."""
        known = self._series.get(labels)
        if known is not None:
            return known
        kept = self._budget.admit(labels)
        series: Series = self._metric.labels(*kept) if kept else self._metric  # type: ignore[assignment]
        if kept != labels and self._overflow is not None:
            return _Folded(series, self._overflow)
        self._series[kept] = series
        return series


class _Budget:
    """Which label sets of one family have a series of their own."""

    def __init__(self, family: Family, overflow_label: str) -> None:
        self._family = family
        self._allowed = [frozenset(values) for values in family.label_values]
        self._overflow_label = overflow_label
        self._admitted: set[tuple[str, ...]] = set()

    def admit(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The label set to use: values outside a closed set are replaced, and all of them once the budget is spent."""
        if len(labels) != len(self._family.labels):
            raise ValueError(f"{self._family.name} has the labels {self._family.labels}")
        other = self._overflow_label
        kept = tuple(
            value if not allowed or value in allowed else other
            for value, allowed in zip(labels, self._allowed, strict=True)
        )
        if kept not in self._admitted:
            if len(self._admitted) >= self._family.max_series:
                return (other,) * len(labels)
            self._admitted.add(kept)
        return kept


class Metrics:
    """All families of one server, in a registry of its own."""

    def __init__(self, families: Sequence[Family], *, overflow_label: str, overflow_family: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._families = families
        self._overflow_label = overflow_label
        declared = {family.name: family for family in families}
        overflow = self._instrument(declared[overflow_family], None)
        self._instruments = {
            family.name: self._instrument(family, overflow.series(family.name))
            for family in families
            if family.kind != "gauge" and family.name != overflow_family
        }
        self._overflow = overflow
        self._gauges = {family.name: _Budget(family, overflow_label) for family in families if family.kind == "gauge"}

    def instrument(self, name: str) -> Instrument:
        """The counter or histogram of that name; raises KeyError when the contract does not declare it."""
        return self._instruments[name]

    def render(self, samples: Iterable[Sample]) -> bytes:
        """The text of a scrape, with these gauges. Raises KeyError for a gauge that is not declared."""
        gauges = self._collect_gauges(samples)
        return generate_latest(_Scrape(self._registry, gauges))

    def _instrument(self, family: Family, overflow: Series | None) -> Instrument:
        metric: Counter | Histogram
        if family.kind == "counter":
            metric = Counter(family.name, family.help, family.labels, registry=self._registry)
        else:
            metric = Histogram(family.name, family.help, family.labels, registry=self._registry, buckets=family.buckets)
        return Instrument(family, metric, self._overflow_label, overflow)

    def _collect_gauges(self, samples: Iterable[Sample]) -> list[Metric]:
        values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in self._gauges}
        for sample in samples:
            kept = self._gauges[sample.family].admit(sample.labels)
            if kept != sample.labels:
                self._overflow.series(sample.family).inc()
            series = values[sample.family]
            series[kept] = series.get(kept, 0.0) + sample.value
        return [_gauge(family, values[family.name]) for family in self._families if family.name in values]


def _gauge(family: Family, series: Mapping[tuple[str, ...], float]) -> Metric:
    metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in series.items():
        metric.add_metric(labels, value)
    return metric


class _Scrape:
    """What the registry holds and the gauges of the moment, as one collector."""

    def __init__(self, registry: CollectorRegistry, gauges: list[Metric]) -> None:
        self._registry = registry
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """The families without the creation times that the client library adds: the contract does not declare them."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
        yield from self._gauges
