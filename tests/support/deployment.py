"""The service with its engines, as journeys use it: started when first asked for, judged when it ends."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.driver import Caller
from tests.support.engines import FakeEngineProcess, LlamaCppProcess
from tests.support.identities import ALICE, BATCHER, BOB, WATCHER, Identity
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config, make_pool

PEOPLE = {"Alice": ALICE, "Bob": BOB, "the batch key": BATCHER, "the operator": WATCHER}

MAIN = {
    "server": {
        "limits": {"body_bytes": 65_536, "header_bytes": 8192, "prompt_chars": 20_000, "open_streams": 12},
        "shutdown_grace_s": 2,
    },
    "sessions": {"turns": 3},
    "streams": {"heartbeat_s": 0.4, "disconnect_grace_s": 0.5, "transcript_ttl_s": 60},
}
"""Limits within the reach of a test, and times that it can wait for."""

FLEETING = {
    "server": {"shutdown_grace_s": 1},
    "sessions": {"ttl_s": 0.5},
    "streams": {"transcript_ttl_s": 0.2, "record_ttl_s": 1},
}
"""Everything is soon forgotten."""


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
        for model, engine in self.engines.items():
            wait_for(lambda model=model: operator.count_busy(model) == 0, f"no slot of {model} is leased")  # type: ignore[misc]
            if isinstance(engine, FakeEngineProcess):
                engine.wait_running(0)

    def stop(self) -> None:
        """End everything; raises AssertionError when the server did not end well."""
        for caller in self._callers.values():
            caller.close()
        try:
            if self.service.status is None:
                self.service.stop()
        finally:
            for engine in self.engines.values():
                engine.end()


def start_main(directory: Path) -> Deployment:
    """Pools `solo` (one held slot, room for two), `duo` (two slots), and `tiny`, a genuine llama.cpp with two."""
    solo = FakeEngineProcess(directory / "solo.log", model="solo")
    duo = FakeEngineProcess(directory / "duo.log", model="duo", slots=2)
    tiny = LlamaCppProcess(directory / "tiny.log", slots=2, ctx=8192)
    pools = [
        make_pool(solo, queue={"capacity": 2}),
        make_pool(duo),
        make_pool(tiny, allow_cpu=True, ctx=8192, quant="f16"),
    ]
    service = LlorchProcess(directory, make_config(pools, **MAIN), expected=["task_ended"])
    service.wait_ready(3)
    return Deployment(service, {"solo": solo, "duo": duo, "tiny": tiny}, is_keyless=False)


def start_fleeting(directory: Path) -> Deployment:
    """Pool `duo`, with everything soon forgotten."""
    duo = FakeEngineProcess(directory / "duo.log", model="duo", slots=2)
    config = make_config([make_pool(duo)], **FLEETING)
    service = LlorchProcess(directory, config, expected=["task_ended"])
    service.wait_ready()
    return Deployment(service, {"duo": duo}, is_keyless=False)


def start_demonstration(directory: Path) -> Deployment:
    """`llorch serve` without a configuration."""
    service = LlorchProcess(directory, None, expected=["keyless", "cpu_demonstration", "task_ended"])
    service.wait_ready()
    return Deployment(service, {}, is_keyless=True)


START = {"main": start_main, "fleeting": start_fleeting, "demonstration": start_demonstration}


class Deployments:
    """Every deployment of a run, each started when first asked for."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="llorch-journeys-"))
        self._running: dict[str, Deployment] = {}

    def get(self, name: str) -> Deployment:
        running = self._running.get(name)
        if running is None or running.service.status is not None:
            if running is not None:
                running.stop()
            directory = self.directory / f"{name}-{len(list(self.directory.iterdir()))}"
            directory.mkdir()
            running = self._running[name] = START[name](directory)
        return running

    def stop(self) -> None:
        """End all; raises the AssertionErrors of those that did not end well, after all have ended."""
        faults: list[Any] = []
        for deployment in self._running.values():
            try:
                deployment.stop()
            except AssertionError as exc:
                faults.append(exc)
        assert not faults, faults
