"""Fixtures of tests that run real processes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.deployment import started
from tests.support.engines import FakeEngineProcess, LlamaCppProcess
from tests.support.service import LlorchProcess


class Processes:
    """Starts what a test needs; everything has ended when the test has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ends = ExitStack()

    def fake(self, model: str = "fake", slots: int = 1, **options: float | str) -> FakeEngineProcess:
        """A FakeEngine of that model, with its options."""
        log = self.directory / f"engine-{model}-{len(list(self.directory.iterdir()))}.log"
        return started(self._ends, FakeEngineProcess(log, model=model, slots=slots, **options))

    def genuine(self, slots: int = 1, ctx: int = 1024) -> LlamaCppProcess:
        """A llama.cpp with the tiny model."""
        return started(self._ends, LlamaCppProcess(self.directory / "tiny.log", slots=slots, ctx=ctx))

    def serve(self, config: dict[str, object] | None, *, replicas: int = 1, **options: object) -> LlorchProcess:
        """A server with that configuration, once so many replicas are Ready."""
        service = started(self._ends, LlorchProcess(self.directory, config, **options))  # type: ignore[arg-type]
        service.wait_ready(replicas)
        return service

    def end(self) -> None:
        self._ends.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.end()


@pytest.fixture(scope="module")
def module_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    running = Processes(tmp_path_factory.mktemp("processes"))
    yield running
    running.end()
