"""Wire passes bytes like a cable, and a cut in it is silent to both ends."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.engines import FakeEngineProcess
from tests.support.network import Wire
from tests.support.processes import free_port, wait_for

SILENCE_S = 0.15
STEP_S = 5.0


class Peer:
    """A server of one connection at a time, whose bytes the test itself sends and reads."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(STEP_S)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        accepted, _ = self.listener.accept()
        accepted.settimeout(STEP_S)
        return accepted


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.listener.close()


@pytest.fixture
def wire(peer: Peer) -> Iterator[Wire]:
    with Wire(peer.url) as wire:
        yield wire


def connect(wire: Wire) -> socket.socket:
    return socket.create_connection(("127.0.0.1", wire.port), STEP_S)


def hears_nothing(end: socket.socket) -> bool:
    end.settimeout(SILENCE_S)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(STEP_S)
    return False


def test_bytes_pass_both_ways_and_an_end_that_closes_closes_the_other(wire: Wire, peer: Peer) -> None:
    with connect(wire) as near, peer.accept() as far:
        near.sendall(b"to")
        assert far.recv(10) == b"to"
        far.sendall(b"fro")
        assert near.recv(10) == b"fro"
        near.shutdown(socket.SHUT_WR)
        assert far.recv(10) == b""
        far.sendall(b"last")
        far.close()
        assert near.recv(10) == b"last"
        assert near.recv(10) == b""
    assert wire.bytes_passed == len(b"to" + b"fro" + b"last")


def test_large_transfer_is_whole(wire: Wire, peer: Peer) -> None:
    size = 4 * 1024 * 1024
    with connect(wire) as near, peer.accept() as far:
        near.settimeout(STEP_S)
        received = 0
        near.setblocking(False)
        block = b"x" * 65_536
        sent = 0
        while received < size:
            try:
                sent += near.send(block[: size - sent])
            except BlockingIOError:
                pass
            received += len(far.recv(1_000_000))
        assert (sent, received) == (size, size)


def test_cut_is_silent_to_both_ends_even_when_one_closes(wire: Wire, peer: Peer) -> None:
    with connect(wire) as near, peer.accept() as far:
        near.sendall(b"a")
        assert far.recv(1) == b"a"
        wire.cut()
        near.sendall(b"b")
        assert hears_nothing(far)
        far.sendall(b"c")
        assert hears_nothing(near)
        near.close()
        assert hears_nothing(far)
    assert wire.bytes_passed == 1


def test_connection_made_while_cut_hangs_and_never_reaches_the_target(wire: Wire, peer: Peer) -> None:
    wire.cut()
    with connect(wire) as near:
        near.sendall(b"hello")
        assert hears_nothing(near)
        peer.listener.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            peer.accept()


def test_healing_resets_what_stood_while_cut_and_new_connections_pass(wire: Wire, peer: Peer) -> None:
    with connect(wire) as near, peer.accept() as far:
        wire.cut()
        with connect(wire) as during:
            near.sendall(b"lost")
            wire.heal()
            for end in (near, far, during):
                with pytest.raises(ConnectionResetError):
                    end.recv(10)
    with connect(wire) as near, peer.accept() as far:
        near.sendall(b"new")
        assert far.recv(10) == b"new"


def test_target_that_does_not_listen_resets() -> None:
    with Wire(f"http://127.0.0.1:{free_port()}") as wire, pytest.raises(ConnectionResetError):
        with connect(wire) as near:
            near.recv(1)


def test_wire_can_be_cut_and_healed_time_and_again(wire: Wire, peer: Peer) -> None:
    for number in range(5):
        with connect(wire) as near, peer.accept() as far:
            far.sendall(b"%d" % number)
            assert near.recv(1) == b"%d" % number
            wire.cut()
            wire.cut()
            wire.heal()
            with pytest.raises(ConnectionResetError):
                near.recv(1)


def test_closing_resets_everything_and_is_idempotent(peer: Peer) -> None:
    wire = Wire(peer.url)
    with connect(wire) as near, peer.accept():
        wire.close()
        wire.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(wire)


def test_engine_behind_a_wire_loses_its_client_only_when_it_heals(tmp_path: Path) -> None:
    """A generation whose client is cut off is not told, and runs on."""
    engine = FakeEngineProcess(tmp_path / "engine.log")
    try:
        engine.command(set={"hold": True})
        with Wire(engine.url) as wire, httpx.Client(base_url=wire.url, timeout=STEP_S) as http:
            body = {"prompt": "a", "n_predict": 5, "stream": True}
            with http.stream("POST", "/completion", json=body) as answer:
                engine.release(1)
                chunks = answer.iter_raw()
                assert next(chunks)
                wire.cut()
                engine.release(1)
                assert engine.report()["running"] == 1
                wire.heal()
                wait_for(lambda: engine.report()["states"] == {"cancelled": 1}, "the engine heard of it")
                with pytest.raises(httpx.ReadError):
                    next(chunks)
            assert http.get("/health").status_code == 200
    finally:
        engine.end()
