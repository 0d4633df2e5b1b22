"""FakeEngine as a process: it ends before its time as it is told, and siblings give the same tokens."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.engines import FakeEngineProcess
from tests.support.processes import Process, wait_for

MIB = 1024 * 1024


class Engines:
    """Starts FakeEngines; all have ended when the test has."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.all: list[Process] = []

    def start(self, **options: float | str) -> FakeEngineProcess:
        engine = FakeEngineProcess(self._directory / f"engine-{len(self.all)}.log", **options)  # type: ignore[arg-type]
        self.all.append(engine)
        return engine

    def launch(self, *words: str) -> Process:
        """A process that may end before it listens."""
        log = self._directory / f"engine-{len(self.all)}.log"
        self.all.append(Process(["-m", "llorch.testing.fake_engine", *words], log=log))
        return self.all[-1]


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(tmp_path)
    yield engines
    for engine in engines.all:
        engine.end()


def test_process_ends_before_it_listens_with_its_status_and_last_words(engines: Engines) -> None:
    process = engines.launch("--crash-after-s", "0", "--exit-code", "3", "--last-words", "CUDA error: out of memory")
    assert process.wait(30) == 3
    assert process.text == "CUDA error: out of memory\n"


def test_process_ends_so_long_after_it_listens(engines: Engines) -> None:
    engine = engines.start(crash_after_s=0.2, exit_code=7)
    assert engine.wait(10) == 7
    assert engine.text.endswith("told to crash\n")


def test_process_can_end_by_a_signal(engines: Engines) -> None:
    process = engines.launch("--crash-after-s", "0", "--exit-code", str(-signal.SIGSEGV))
    assert process.wait(30) == -signal.SIGSEGV


def test_process_ends_at_its_start_only_while_the_file_is_there(engines: Engines, tmp_path: Path) -> None:
    cause = tmp_path / "cause"
    cause.touch()
    assert engines.launch("--crash-file", str(cause)).wait(30) == 1
    cause.unlink()
    engine = engines.start(crash_file=str(cause))
    assert httpx.get(f"{engine.url}/health").status_code == 200
    assert engine.status is None


def test_taken_port_is_told_in_one_line(engines: Engines) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = engines.launch("--port", str(port))
        assert process.wait(30) == 1
    assert process.text.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in process.text


def test_process_loads_as_long_as_it_is_told(engines: Engines) -> None:
    engine = engines.start(load_s=0.5)
    start = time.monotonic()
    statuses = [httpx.get(f"{engine.url}/health").status_code]

    def look() -> bool:
        statuses.append(httpx.get(f"{engine.url}/health").status_code)
        return statuses[-1] == 200

    wait_for(look, "it is loaded")
    assert statuses[0] == 503
    assert 0.2 < time.monotonic() - start < 5


def test_process_can_be_frozen_from_its_start(engines: Engines, tmp_path: Path) -> None:
    process = engines.launch("--freeze")
    url = process.announcement("listening")["url"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{url}/health", timeout=0.2)
    httpx.post(f"{url}/_fake", json={"reset": True})
    assert httpx.get(f"{url}/health").status_code == 200


def test_process_can_hog_memory_from_its_start(engines: Engines) -> None:
    engine = engines.start(hog_mib=100)
    assert psutil.Process(engine.pid).memory_info().rss > 100 * MIB


def test_siblings_give_the_same_tokens_whole_and_continued(engines: Engines) -> None:
    """What a replay and a continuation on a sibling rest on: prompt, seed and max_tokens alone decide."""
    one, other = engines.start(slots=1), engines.start(slots=2, token_interval_ms=1)

    def complete(engine: FakeEngineProcess, prompt: str, count: int) -> str:
        body = {"prompt": prompt, "n_predict": count, "seed": 11, "temperature": 0.8}
        text: str = httpx.post(f"{engine.url}/completion", json=body).json()["content"]
        return text

    prompt = "tell me <out:24>"
    whole = complete(one, prompt, 30)
    assert len(whole.split()) == 24
    assert complete(other, prompt, 30) == whole
    assert complete(other, prompt, 10) == complete(one, prompt, 10)
    begun = complete(one, prompt, 10)
    assert whole.startswith(begun)
    assert begun + complete(other, prompt + begun, 20) == whole
