"""The metric families of the contract, with their cardinality budgets enforced, and the text of a scrape.

It is handed the declarations and knows neither what they mean nor when they move. What is not declared cannot be
counted, and a label set beyond a family's budget is folded into one series and counted as folded.
Everything moves on one thread, so that values are plain numbers: those of the client library take a lock, 1.4 us to
count and 3.8 us to observe, where these take 0.2 and 0.5. The library still writes the scrape.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

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


class _Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def observe(self, amount: float) -> None:  # noqa: ARG002 (a Series has both)
        raise TypeError("a counter takes no measurements")


class _Histogram:
    """Measurements, counted by the first upper bound that is not below them; the last count is of those above all."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def inc(self, amount: float = 1) -> None:  # noqa: ARG002 (a Series has both)
        raise TypeError("a histogram does not count")

    def observe(self, amount: float) -> None:
        self.counts[bisect_left(self._bounds, amount)] += 1
        self.sum += amount


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

    def __init__(self, family: Family, overflow_label: str, overflow: Series | None) -> None:
        self._family = family
        self._budget = _Budget(family, overflow_label)
        self._overflow = overflow
        self._series: dict[tuple[str, ...], _Counter | _Histogram] = {}
        if not family.labels:
            self.series()

    def series(self, *labels: str) -> Series:
        """The series of these label values, in the order of the declaration, or the one that they are folded into."""
        known = self._series.get(labels)
        if known is not None:
            return known
        kept = self._budget.admit(labels)
        series = self._series.get(kept)
        if series is None:
            is_counter = self._family.kind == "counter"
            series = self._series[kept] = _Counter() if is_counter else _Histogram(self._family.buckets)
        return series if kept == labels or self._overflow is None else _Folded(series, self._overflow)

    def collect(self) -> Metric:
        """The family as it is now."""
        family = self._family
        if family.kind == "counter":
            counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
            for labels, series in self._series.items():
                assert isinstance(series, _Counter)
                counter.add_metric(labels, series.value)
            return counter
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        bounds = [str(floatToGoString(bound)) for bound in (*family.buckets, float("inf"))]  # type: ignore[no-untyped-call]
        for labels, series in self._series.items():
            assert isinstance(series, _Histogram)
            histogram.add_metric(labels, list(zip(bounds, accumulate(series.counts), strict=True)), series.sum)
        return histogram


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
    """All families of one server."""

    def __init__(self, families: Sequence[Family], *, overflow_label: str, overflow_family: str) -> None:
        self._families = families
        declared = {family.name: family for family in families}
        overflow = Instrument(declared[overflow_family], overflow_label, None)
        self._instruments = {
            family.name: Instrument(family, overflow_label, overflow.series(family.name))
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
        counted = [instrument.collect() for instrument in (self._overflow, *self._instruments.values())]
        return generate_latest(_Scrape([*counted, *gauges]))

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
    """The families of the moment, as the writer of the text wants them."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        """All of them."""
        return self._families
