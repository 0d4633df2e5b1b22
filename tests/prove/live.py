"""A real `llorch serve` before real FakeEngine processes, started for one bar and judged at its end."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.deployment import started
from tests.support.driver import Caller
from tests.support.engines import FakeEngineProcess
from tests.support.identities import WATCHER, Identity
from tests.support.service import LlorchProcess, make_config, make_pool

STREAMS = {"disconnect_grace_s": 0, "records_per_tenant": 100_000}
"""A load that leaves takes its tasks with it."""


@dataclass(frozen=True, slots=True)
class Site:
    """One pool to be: its model, its engines, and its settings in the configuration."""

    model: str
    slots: int
    engines: int = 1
    options: Mapping[str, float] | None = None
    """Of the FakeEngine: token_interval_ms, …"""
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """The running server."""

    service: LlorchProcess
    operator: Caller

    @property
    def port(self) -> int:
        return self.service.port

    def wait_idle(self, within_s: float = 60.0) -> None:
        """Return once nothing waits and nothing runs. Raises AssertionError when that does not come."""
        late = time.monotonic() + within_s
        while True:
            pools = self.operator.http.get("/v1/replica-sets").json()["replica_sets"]
            open_tasks = sum(each["load"]["slots_busy"] + each["load"]["queued"] for each in pools)
            if open_tasks == 0:
                return
            assert time.monotonic() < late, f"{open_tasks} tasks or slots are still open after {within_s:g} s"
            time.sleep(0.1)


@contextmanager
def deployed(
    sites: Sequence[Site],
    people: Sequence[Identity],
    tenants: Sequence[Mapping[str, Any]] = (),
    **sections: Any,
) -> Iterator[Live]:
    """Engines, the server and an operator. Its log is judged at the end."""
    with tempfile.TemporaryDirectory(prefix="llorch-prove-") as name, ExitStack() as ends:
        directory = Path(name)
        pools = [_pool(directory, ends, site) for site in sites]
        config = make_config(pools, keys=[*people, WATCHER], **{"streams": STREAMS, **sections})
        if tenants:
            config["tenants"] = [dict(tenant) for tenant in tenants]
        service = started(ends, LlorchProcess(directory, config, expected=["task_ended"]))
        service.wait_ready(sum(site.engines for site in sites))
        operator = Caller(service, WATCHER)
        yield Live(service, operator)
        operator.close()
        service.stop()


def make_people(names: Sequence[str]) -> list[Identity]:
    """A key for each of these tenants."""
    return [Identity(name, name) for name in names]


def _pool(directory: Path, ends: ExitStack, site: Site) -> dict[str, Any]:
    engines = [
        started(
            ends,
            FakeEngineProcess(
                directory / f"{site.model}-{number}.log", model=site.model, slots=site.slots, **(site.options or {})
            ),
        )
        for number in range(site.engines)
    ]
    return make_pool(*engines, **(site.settings or {}))
