"""The service with its engines, as journeys use it: started when first asked for, judged when it ends."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from llorch.launch.model_file import locate_demo_model
from tests.support.driver import Caller
from tests.support.engines import FakeEngineProcess, LlamaCppProcess
from tests.support.identities import ALICE, BATCHER, BOB, CAROL, DAVE, WATCHER, Identity
from tests.support.managed import WARNINGS, fake, pool
from tests.support.nodes import node_entry
from tests.support.processes import Process, wait_for
from tests.support.service import LlorchProcess, make_config, make_pool

Started = TypeVar("Started", bound=Process)

PEOPLE = {"Alice": ALICE, "Bob": BOB, "Carol": CAROL, "Dave": DAVE, "the batch key": BATCHER, "the operator": WATCHER}

MAIN: dict[str, Any] = {
    "server": {
        "limits": {"body_bytes": 65_536, "header_bytes": 8192, "prompt_chars": 20_000, "open_streams": 12},
        "shutdown_grace_s": 2,
    },
    "sessions": {"turns": 3},
    "streams": {"heartbeat_s": 0.4, "disconnect_grace_s": 0.5, "transcript_ttl_s": 60},
}
"""Limits within the reach of a test, and times that it can wait for."""

FLEETING: dict[str, Any] = {
    "server": {"shutdown_grace_s": 1},
    "sessions": {"ttl_s": 0.5},
    "streams": {"transcript_ttl_s": 0.2, "record_ttl_s": 1},
}
"""Everything is soon forgotten."""

POLICIES: dict[str, Mapping[str, Any]] = {
    "fair": {"queue": {"capacity": 24}},
    "ranked": {"queue": {"fairness": "strict"}},
    "dropping": {"queue": {"capacity": 2, "full_policy": {"interactive": "drop-lru"}}},
    "shedding": {"queue": {"capacity": 2, "full_policy": {"interactive": "shed-low-priority"}}},
    "urgent": {"queue": {"order": "edf", "edf_default_ms": 600_000}},
    "paced": {},
    "soft": {},
    "hard": {"preemption": {"mode": "hard", "per_minute": 1000}},
}
"""Pools of one slot, each with a policy of its own; `paced` takes 10 ms for a token."""

QUOTAS: list[dict[str, Any]] = [
    {"name": "acme", "max_queued": 2},
    {"name": "bluebell", "max_concurrent": 1},
    {"name": "crocus", "rate": {"interactive": {"per_s": 1, "burst": 2}}},
    {"name": "daffodil", "tokens_per_minute": 60},
]
"""One limit for each tenant."""


class Deployment:
    """A server and its engines by model."""

    def __init__(
        self, service: LlorchProcess, engines: Mapping[str, FakeEngineProcess | LlamaCppProcess], *, is_keyless: bool
    ) -> None:
        self.service = service
        self.engines = engines
        self._callers: dict[str, Caller] = {}
        self._is_keyless = is_keyless

    def caller(self, name: str) -> Caller:
        """The client of a person."""
        if name not in self._callers:
            who: Identity | None = None if self._is_keyless else PEOPLE[name]
            self._callers[name] = Caller(self.service, who)
        return self._callers[name]

    def fake(self, model: str) -> FakeEngineProcess:
        engine = self.engines[model]
        assert isinstance(engine, FakeEngineProcess), model
        return engine

    def genuine(self, model: str) -> LlamaCppProcess:
        engine = self.engines[model]
        assert isinstance(engine, LlamaCppProcess), model
        return engine

    def reset(self) -> None:
        """No faults, no tokens held, no record in the fake engines."""
        for engine in self.engines.values():
            if isinstance(engine, FakeEngineProcess):
                engine.command(release=1_000_000)
                engine.command(reset=True)

    def check_idle(self) -> None:
        """Raise AssertionError unless every slot comes free, at llorch and at the engines."""
        operator = self.caller("the operator")
        for engine in self.engines.values():
            pool = engine.model
            wait_for(lambda pool=pool: operator.count_busy(pool) == 0, f"no slot of {pool} is leased")  # type: ignore[misc]
            if isinstance(engine, FakeEngineProcess):
                engine.wait_running(0)

    def stop(self) -> None:
        """End the server; raises AssertionError when it did not end well, now or when a journey ended it."""
        for caller in self._callers.values():
            caller.close()
        self.service.stop()


def start_main(directory: Path, ends: ExitStack) -> Deployment:
    """Two FakeEngines: `solo` (one slot, room for two to wait) and `duo` (two). Two genuine ones: `tiny` (two slots)
    and `smollm2` (one).
    """
    solo = started(ends, FakeEngineProcess(directory / "solo.log", model="solo"))
    duo = started(ends, FakeEngineProcess(directory / "duo.log", model="duo", slots=2))
    tiny = started(ends, LlamaCppProcess(directory / "tiny.log", slots=2, ctx=2048))
    smollm2 = started(ends, LlamaCppProcess(directory / "smollm2.log", locate_demo_model(), ctx=2048))
    pools = [
        make_pool(solo, queue={"capacity": 2}),
        make_pool(duo),
        make_pool(tiny, allow_cpu=True, quant="f16"),
        make_pool(smollm2, allow_cpu=True),
    ]
    service = started(ends, LlorchProcess(directory, make_config(pools, **MAIN), expected=["task_ended"]))
    service.wait_ready(4)
    engines = {engine.model: engine for engine in (solo, duo, tiny, smollm2)}
    return Deployment(service, engines, is_keyless=False)


def start_fleeting(directory: Path, ends: ExitStack) -> Deployment:
    """Pool `duo`, with everything soon forgotten."""
    duo = started(ends, FakeEngineProcess(directory / "duo.log", model="duo", slots=2))
    config = make_config([make_pool(duo)], **FLEETING)
    service = started(ends, LlorchProcess(directory, config, expected=["task_ended"]))
    service.wait_ready()
    return Deployment(service, {"duo": duo}, is_keyless=False)


def start_policies(directory: Path, ends: ExitStack) -> Deployment:
    """A pool of one slot for each of POLICIES, and `twins` with two replicas: twins and the-twin. Carol weighs 2."""
    engines: dict[str, FakeEngineProcess | LlamaCppProcess] = {}
    pools = []
    for name, settings in POLICIES.items():
        interval_ms = 10 if name == "paced" else 0
        engine = FakeEngineProcess(directory / f"{name}.log", model=name, token_interval_ms=interval_ms)
        engines[name] = started(ends, engine)
        pools.append(make_pool(engine, **settings))
    twins = [started(ends, FakeEngineProcess(directory / f"twin-{each}.log", model="twins")) for each in range(2)]
    engines |= {"twins": twins[0], "the-twin": twins[1]}
    sections: dict[str, Any] = {"sessions": {"turns": 50}, "tenants": [{"name": "crocus", "weight": 2}]}
    config = make_config([*pools, make_pool(*twins)], **sections)
    service = started(ends, LlorchProcess(directory, config, expected=["task_ended"]))
    service.wait_ready(len(engines))
    return Deployment(service, engines, is_keyless=False)


def start_quotas(directory: Path, ends: ExitStack) -> Deployment:
    """Pools `solo` (one slot) and `duo` (two), whose tokens cost 1 each; the tenants have the limits of QUOTAS."""
    solo = started(ends, FakeEngineProcess(directory / "solo.log", model="solo"))
    duo = started(ends, FakeEngineProcess(directory / "duo.log", model="duo", slots=2))
    price = {"prompt_per_1k": 1000, "output_per_1k": 1000}
    config = make_config([make_pool(solo, price=price), make_pool(duo, price=price)], tenants=QUOTAS)
    service = started(ends, LlorchProcess(directory, config, expected=["task_ended"]))
    service.wait_ready(2)
    return Deployment(service, {"solo": solo, "duo": duo}, is_keyless=False)


def start_managed(directory: Path, ends: ExitStack) -> Deployment:
    """Engines that llorch starts: `lone` (one replica), `pair` (two), and `afar` on the node `far`; 20 ms a token."""
    replica = fake(1, token_interval_ms=20)
    there = {**replica, "managed": {**replica["managed"], "node": "far"}}
    pools = [
        pool("lone", replica, model="lone"),
        pool("pair", replica, replica, model="pair"),
        pool("afar", there, model="afar"),
    ]
    config = make_config(pools, nodes=[node_entry("far")], **FLEETING)
    expected = [*WARNINGS, "pool_change", "config_reload", "engine_failed", "node_changed"]
    service = started(ends, LlorchProcess(directory, config, expected=expected))
    service.wait_ready(3)
    return Deployment(service, {}, is_keyless=False)


def start_demonstration(directory: Path, ends: ExitStack) -> Deployment:
    """`llorch serve` without a configuration."""
    service = started(ends, LlorchProcess(directory, None, expected=["keyless", "cpu_demonstration"]))
    service.wait_ready()
    return Deployment(service, {}, is_keyless=True)


def started(ends: ExitStack, process: Started) -> Started:
    """The process, ended with the stack at the latest."""
    ends.callback(process.end)
    return process


START = {
    "main": start_main,
    "fleeting": start_fleeting,
    "policies": start_policies,
    "quotas": start_quotas,
    "demonstration": start_demonstration,
    "managed": start_managed,
}


class Deployments:
    """Every deployment of a run, each started when first asked for."""

    def __init__(self) -> None:
        self._ends = ExitStack()
        self._directory = Path(self._ends.enter_context(tempfile.TemporaryDirectory(prefix="llorch-journeys-")))
        self._all: list[Deployment] = []
        self._current: dict[str, Deployment] = {}
        self._broken: set[str] = set()

    def get(self, name: str) -> Deployment:
        """The deployment of that name; a new one when a journey has ended the last."""
        assert name not in self._broken, f"{name} could not be started"
        current = self._current.get(name)
        if current is None or current.service.status is not None:
            directory = self._directory / f"{name}-{len(self._all)}"
            directory.mkdir()
            self._broken.add(name)
            current = self._current[name] = START[name](directory, self._ends)
            self._broken.remove(name)
            self._all.append(current)
        return current

    def stop(self) -> None:
        """End all; raises the AssertionErrors of those that did not end well, after all have ended."""
        faults: list[AssertionError] = []
        for deployment in self._all:
            try:
                deployment.stop()
            except AssertionError as exc:
                faults.append(exc)
        self._ends.close()
        assert not faults, faults
