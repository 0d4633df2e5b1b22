"""Counters about engine processes and the hosts that they run on: starts, failures, self-tests, resets, reloads.

It is told what happened in plain words and numbers; what they mean is known to whoever tells.
"""

from llorch.telemetry_metrics import Metrics


class EngineMetrics:
    """The families of `metrics.yaml` that move with managed engines. An `engine_version` of None is unverified."""

    def __init__(self, metrics: Metrics, unverified: str) -> None:
        self._unverified = unverified
        instrument = metrics.instrument
        self._restarts = instrument("replica_restarts_total")
        self._preloads = instrument("preloads_total")
        self._preload_ms = instrument("preload_duration_ms")
        self._tests = instrument("self_tests_total")
        self._resets = instrument("driver_resets_total")
        self._reloads = instrument("config_reloads_total")

    def count_failures(self, engine: str, engine_version: str | None, pool: str, cause: str, count: int) -> None:
        """The process failed that often, for this cause, and is to be started again."""
        self._restarts.series(engine, engine_version or self._unverified, pool, cause).inc(count)

    def note_preload(self, engine: str, engine_version: str | None, pool: str, load_s: float | None) -> None:
        """A start came to answer that it is ready after `load_s` seconds; None: it never did."""
        labels = (engine, engine_version or self._unverified, pool)
        self._preloads.series(*labels, "failed" if load_s is None else "succeeded").inc()
        if load_s is not None:
            self._preload_ms.series(*labels).observe(load_s * 1000)

    def note_test(self, engine: str, engine_version: str | None, pool: str, *, is_passed: bool) -> None:
        """A replica was tested before it was to become Ready."""
        outcome = "passed" if is_passed else "failed"
        self._tests.series(engine, engine_version or self._unverified, pool, outcome).inc()

    def count_resets(self, node: str, count: int) -> None:
        """The driver of a host gave GPUs up that often."""
        self._resets.series(node).inc(count)

    def note_reload(self, outcome: str) -> None:
        """A change of the configuration is over, or was refused."""
        self._reloads.series(outcome).inc()
