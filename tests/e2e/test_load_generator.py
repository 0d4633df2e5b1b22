"""FAULT-23: the load of the chaos suite sees what the service does, and fails when anything of it is wrong."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from tests.conftest import Processes
from tests.support.engines import FakeEngineProcess
from tests.support.identities import ALICE, WATCHER
from tests.support.load import KEEPING, Load, StreamSet, Want, fake_answer
from tests.support.network import Wire
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config, make_pool

WANTS = (
    Want("solo", is_strict=True, max_tokens=(1, 12)),
    Want("duo", max_tokens=(1, 24), share=2),
    Want("duo", priority="batch", max_tokens=(8, 32)),
)


class Site:
    """A server with a pool of one slot (`solo`, exact) and one of two replicas with four slots each (`duo`)."""

    def __init__(self, processes: Processes) -> None:
        self.solo = processes.fake("solo", token_interval_ms=2)
        self.duo = [processes.fake("duo", slots=4, token_interval_ms=2) for _ in range(2)]
        pools = [make_pool(self.solo, queue={"capacity": 64}), make_pool(*self.duo, queue={"capacity": 64})]
        config = make_config(pools, streams={**KEEPING, "heartbeat_s": 0.5})
        warnings = ["task_ended", "task_requeued", "attempt_ended", "replica_changed"]
        self.service = processes.serve(config, replicas=3, expected=warnings)
        self.url = self.service.url

    @property
    def engines(self) -> list[FakeEngineProcess]:
        return [self.solo, *self.duo]

    def hold(self) -> None:
        """Generations that come from now on send nothing."""
        for engine in self.engines:
            engine.command(set={"hold": True})

    def let_go(self) -> None:
        """Generations run as ever, those that were held as well."""
        for engine in self.engines:
            engine.command(set={"hold": False}, release=1_000_000)


@pytest.fixture(scope="module")
def running(module_processes: Processes) -> Iterator[Site]:
    site = Site(module_processes)
    yield site
    site.service.stop()


@pytest.fixture
def site(running: Site) -> Iterator[Site]:
    yield running
    for engine in running.engines:
        engine.command(reset=True)
        wait_for(lambda engine=engine: engine.command(release=1_000_000)["running"] == 0, "the engine is idle")  # type: ignore[misc]


def count_readers(service: LlorchProcess) -> float:
    with service.client(WATCHER) as http:
        lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("open_streams "))


def test_load_on_a_healthy_service_finds_nothing_and_counts_everything(site: Site) -> None:
    with Load(site.url, WANTS, clients=10, oracle=fake_answer, resumes=0.5) as load:
        load.wait_succeeded(100)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}
    assert report.outcomes["succeeded"] == report.accepted == report.statuses["submit", 202] >= 100
    assert report.statuses["stream", 200] == 2 * report.accepted + report.resumes
    assert report.statuses["look", 200] == 2 * report.accepted
    assert report.resumes > 0
    assert (report.open, report.failures, report.refused) == (0, {}, {})
    assert 0 < report.longest_gap_s < 10
    kinds = {(ticket.body["model_ref"], ticket.body["priority"]) for ticket in load.tickets}
    assert kinds == {("solo", "interactive"), ("duo", "interactive"), ("duo", "batch")}


def test_load_sees_every_byte_while_attempts_are_broken_off_and_continued(site: Site) -> None:
    with Load(site.url, WANTS, clients=10, oracle=fake_answer, may_fail=["WORKER_RESET"]) as load:
        for number in range(6):
            site.engines[number % 3].command(set={"close_after": number % 4, "times": 2})
            load.wait_succeeded(8)
        report = load.stop()
    assert report.outcomes["succeeded"] >= 48
    assert len(report.failures) == report.outcomes.get("WORKER_RESET", 0)


def test_peer_bug_23_text_that_is_not_the_oracles_is_found(site: Site) -> None:
    def lie(prompt: str, seed: int, count: int) -> str:
        return fake_answer(prompt, seed + 1, count)

    check_finds(Load(site.url, WANTS, clients=2, oracle=lie), "which should be")


def test_peer_bug_23_token_that_comes_falsified_is_found_without_an_oracle(site: Site) -> None:
    with LyingWire(site.url) as wire:
        check_finds(Load(wire.url, [Want("duo", max_tokens=(64, 64))], clients=2), "its stream had")


class LyingWire(Wire):
    """Falsifies one word in streams, and leaves the output in the task as it is."""

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65_536):
            await loop.sock_sendall(sink, data.replace(b'"t":" of"', b'"t":" fo"'))
        sink.shutdown(socket.SHUT_WR)


def check_finds(load: Load, what: str) -> None:
    """The load tells this while it runs, and again at its end."""
    with load:
        with pytest.raises(AssertionError, match=what):
            load.wait_succeeded(1_000_000)
        with pytest.raises(AssertionError, match=what):
            load.stop()


def test_peer_bug_23_refusal_is_found_unless_it_is_allowed(site: Site) -> None:
    wants = [Want("solo", max_tokens=(1, 4))]
    site.hold()
    with Load(site.url, wants, clients=70, people=[ALICE]) as load:
        with pytest.raises(AssertionError, match="submit: 429"):
            load.wait_succeeded(1)
        site.let_go()
        with pytest.raises(AssertionError, match="submit: 429"):
            load.stop()
    site.hold()
    with Load(site.url, wants, clients=70, people=[ALICE], allowed=[429]) as load:
        with pytest.raises(AssertionError, match="not within"):
            load.wait_succeeded(1, within_s=1)
        site.let_go()
        report = load.stop()
    assert report.refused == {"ADMISSION_REJECT": report.statuses["submit", 429]}
    assert report.longest_gap_s > 1


def test_peer_bug_23_failure_is_found_unless_it_is_expected(site: Site) -> None:
    late = Want("solo", max_tokens=(8, 8), fields={"deadline_ms": 1000, "on_deadline": "abort"})
    site.hold()
    check_finds(Load(site.url, [late], clients=1), "failed: DEADLINE_UNMET")
    with Load(site.url, [late], clients=1, may_fail=["DEADLINE_UNMET"]) as load:
        with pytest.raises(AssertionError, match="not within"):
            load.wait_succeeded(1, within_s=2)
        report = load.stop()
    assert report.failures
    assert report.outcomes == {"DEADLINE_UNMET": len(report.failures)}
    assert all(text.startswith("DEADLINE_UNMET") for text in report.failures.values())


def test_peer_bug_23_task_that_does_not_end_is_found(site: Site) -> None:
    site.hold()
    with Load(site.url, [Want("solo")], clients=2) as load:
        load.wait_open(2)
        with pytest.raises(AssertionError, match="still running"):
            load.stop(within_s=0.5)
    assert load.report().open == 2


def test_peer_bug_23_connection_that_breaks_is_found(site: Site) -> None:
    site.hold()
    with Wire(site.url) as wire, Load(wire.url, [Want("duo")], clients=3) as load:
        load.wait_open(3)
        wire.cut()
        wire.heal()
        with pytest.raises(AssertionError, match="ConnectionResetError"):
            load.wait_succeeded(1)
        site.let_go()
        with pytest.raises(AssertionError, match="3 findings"):
            load.stop()
    assert load.report().open == 0


def test_stream_set_keeps_its_streams_open(site: Site) -> None:
    with StreamSet(site.url, Want("duo", max_tokens=(40, 60)), 20, oracle=fake_answer) as streams:
        for _ in range(5):
            site.let_go()
            streams.wait_succeeded(10)
            assert count_readers(site.service) <= 20
            site.hold()  # so that none of them is just between two tasks
            wait_for(lambda: count_readers(site.service) == 20, "20 streams are open")
        site.let_go()
        report = streams.stop()
    assert report.outcomes == {"succeeded": report.accepted}
    assert report.accepted >= 50


def test_peer_bug_23_load_that_nobody_stops_ends_by_itself(site: Site) -> None:
    load = Load(site.url, WANTS, clients=2, most_s=0.2).start()
    wait_for(lambda: not load.is_running, "the load has ended")
    with pytest.raises(AssertionError, match="nobody stopped"):
        load.stop()
