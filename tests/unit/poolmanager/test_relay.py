"""A relay between real sockets, on both event loops: order, pace, ends and breaks of both sides, the cut, TLS."""

import asyncio
import hashlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llorch.adapters.http import HttpClient
from llorch.poolmanager import relay as relay_module
from llorch.poolmanager.relay import Relay
from llorch.testing.fake_engine import FakeEngine, Faults

CERTIFICATE = Path(__file__).parents[1] / "adapters" / "localhost.pem"

SOON_S = 0.1
"""How soon an end or a break must have reached the other side."""

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Engine:
    """The other side of the relay: connections as they arrive."""

    port: int = 0
    arrived: "asyncio.Queue[Pair]" = field(default_factory=asyncio.Queue)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.arrived.put_nowait((reader, writer))

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def engine_on_loopback() -> AsyncIterator[Engine]:
    engine = Engine()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.port = server.sockets[0].getsockname()[1]
    yield engine
    server.close()
    engine.close()


@asynccontextmanager
async def relayed(*, tls: bool = False, connections_max: int = 64) -> AsyncIterator[tuple[Relay, Engine]]:
    """A relay that points at an engine."""
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(CERTIFICATE)
    async with engine_on_loopback() as engine:
        relay = Relay(tls=context, connections_max=connections_max)
        await relay.listen("127.0.0.1")
        relay.point_at("127.0.0.1", engine.port)
        yield relay, engine
        await relay.aclose()


_clients: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
async def no_client_is_left() -> AsyncIterator[None]:
    yield
    for writer in _clients:
        writer.transport.abort()
    _clients.clear()


async def connect(relay: Relay) -> Pair:
    context = ssl.create_default_context(cafile=str(CERTIFICATE)) if relay.scheme == "https" else None
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, ssl=context)
    _clients.append(writer)
    return reader, writer


async def joined(relay: Relay, engine: Engine) -> tuple[Pair, Pair]:
    """The client's and the engine's side of one connection."""
    client = await connect(relay)
    return client, await asyncio.wait_for(engine.arrived.get(), 5)


async def is_reset(reader: asyncio.StreamReader, *, within_s: float = SOON_S) -> bool:
    """Whether the connection breaks off in time; an orderly end is none."""
    async with asyncio.timeout(within_s):
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            return True
    return False


def reset(writer: asyncio.StreamWriter) -> None:
    """Break off, as a process does that is killed with unread data."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def digest_of(reader: asyncio.StreamReader, *, piece: int, rest_every: int) -> tuple[int, str]:
    """Size and digest of everything until the end, read by somebody who stops now and then."""
    digest, size, pieces = hashlib.sha256(), 0, 0
    while data := await reader.read(piece):
        digest.update(data)
        size += len(data)
        pieces += 1
        if pieces % rest_every == 0:
            await asyncio.sleep(0.001)  # slowness is what is tested
    return size, digest.hexdigest()


async def send_all(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 50_000):
        writer.write(data[start : start + 50_000])
        await writer.drain()
    writer.write_eof()


async def until(holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 (a relay tells nobody)
            await asyncio.sleep(0.002)


async def gone(relay: Relay) -> None:
    """The relay has nothing left of any connection."""
    await until(lambda: relay.connections == 0)


def bytes_of(seed: str, size: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


async def test_bytes_arrive_whole_and_in_order_both_ways_under_slow_readers() -> None:
    up, down = bytes_of("up", 6_000_000), bytes_of("down", 7_000_000)
    async with relayed() as (relay, engine):
        (client_reader, client_writer), (engine_reader, engine_writer) = await joined(relay, engine)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(send_all(client_writer, up))
            group.create_task(send_all(engine_writer, down))
            at_engine = group.create_task(digest_of(engine_reader, piece=9_000, rest_every=20))
            at_client = group.create_task(digest_of(client_reader, piece=7_000, rest_every=30))
        assert at_engine.result() == (len(up), hashlib.sha256(up).hexdigest())
        assert at_client.result() == (len(down), hashlib.sha256(down).hexdigest())
        await gone(relay)


async def test_half_close_is_passed_on_and_the_answer_still_arrives() -> None:
    async with relayed() as (relay, engine):
        (client_reader, client_writer), (engine_reader, engine_writer) = await joined(relay, engine)
        client_writer.write(b"question")
        client_writer.write_eof()
        assert await asyncio.wait_for(engine_reader.read(), SOON_S) == b"question"
        engine_writer.write(b"answer")
        engine_writer.write_eof()
        assert await asyncio.wait_for(client_reader.read(), SOON_S) == b"answer"
        await gone(relay)


async def test_client_that_only_half_closes_keeps_no_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "HALF_CLOSED_S", 0.05)
    async with relayed() as (relay, engine):
        (client_reader, client_writer), (engine_reader, _) = await joined(relay, engine)
        client_writer.write_eof()
        assert await asyncio.wait_for(engine_reader.read(), SOON_S) == b""
        assert await is_reset(client_reader, within_s=5)
        await gone(relay)


async def test_client_that_goes_away_is_seen_by_the_engine_at_once() -> None:
    async with relayed() as (relay, engine):
        (_, client_writer), (engine_reader, _) = await joined(relay, engine)
        client_writer.close()
        assert await asyncio.wait_for(engine_reader.read(), SOON_S) == b""


async def test_break_of_the_client_breaks_the_connection_of_the_engine() -> None:
    async with relayed() as (relay, engine):
        (_, client_writer), (engine_reader, _) = await joined(relay, engine)
        reset(client_writer)
        assert await is_reset(engine_reader)
        await gone(relay)


async def test_break_of_the_engine_is_no_end_for_the_client() -> None:
    async with relayed() as (relay, engine):
        (client_reader, _), (_, engine_writer) = await joined(relay, engine)
        reset(engine_writer)
        assert await is_reset(client_reader)
        await gone(relay)


async def test_slow_client_gets_what_an_engine_sent_before_it_closed() -> None:
    sent = bytes_of("last words", 3_000_000)
    async with relayed() as (relay, engine):
        (client_reader, client_writer), (_, engine_writer) = await joined(relay, engine)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(send_all(engine_writer, sent)).add_done_callback(lambda _: engine_writer.close())
            at_client = group.create_task(digest_of(client_reader, piece=9_000, rest_every=20))
        assert at_client.result() == (len(sent), hashlib.sha256(sent).hexdigest())
        client_writer.close()
        await gone(relay)


async def test_engine_that_does_not_read_holds_its_client_back() -> None:
    async with relayed() as (relay, engine):
        (_, client_writer), (engine_reader, engine_writer) = await joined(relay, engine)
        engine_writer.transport.pause_reading()  # type: ignore[attr-defined]
        client_writer.transport.set_write_buffer_limits(high=0)
        client_writer.write(bytes(64_000_000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client_writer.drain(), 0.3)
        engine_writer.transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(30):
            assert len(await engine_reader.readexactly(64_000_000)) == 64_000_000


async def test_what_the_client_sent_before_the_engine_accepted_arrives_first() -> None:
    async with relayed() as (relay, engine):
        client_reader, client_writer = await connect(relay)
        client_writer.write(b"early")
        client_writer.write_eof()
        engine_reader, engine_writer = await asyncio.wait_for(engine.arrived.get(), 5)
        assert await asyncio.wait_for(engine_reader.read(), SOON_S) == b"early"
        engine_writer.close()
        assert await asyncio.wait_for(client_reader.read(), SOON_S) == b""
        await gone(relay)


async def test_segments_are_not_held_back_to_be_joined() -> None:
    async with relayed() as (relay, engine):
        await joined(relay, engine)
        (link,) = relay._links
        for end in (link.client, link.engine):
            assert end.transport is not None
            raw = end.transport.get_extra_info("socket")
            assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_cut_resets_both_sides_of_every_connection_until_it_is_mended(*, tls: bool) -> None:
    async with relayed(tls=tls) as (relay, engine):
        pairs = [await joined(relay, engine) for _ in range(5)]
        relay.cut()
        relay.cut()
        for (client_reader, _), (engine_reader, _) in pairs:
            assert await is_reset(client_reader)
            assert await is_reset(engine_reader)
        await gone(relay)
        assert relay.is_cut
        with pytest.raises(ConnectionError):
            await asyncio.wait_for((await connect(relay))[0].readexactly(1), 5)
        relay.mend()
        (client_reader, _), (_, engine_writer) = await joined(relay, engine)
        engine_writer.write(b"again")
        assert await client_reader.readexactly(5) == b"again"


async def test_cut_resets_what_waits_for_its_engine() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            relay = Relay()
            await relay.listen("127.0.0.1")
            relay.point_at(*full.getsockname())
            clients = [await connect(relay) for _ in range(3)]
            await until(lambda: relay.connections == 3)
            relay.cut()
            for reader, _ in clients:
                assert await is_reset(reader)
            await relay.aclose()
            assert relay.connections == 0


async def test_without_an_engine_connections_are_reset_at_once() -> None:
    async with relayed() as (relay, engine):
        (client_reader, _), (_, engine_writer) = await joined(relay, engine)
        relay.point_at(None)
        assert await is_reset((await connect(relay))[0])
        engine_writer.write(b"goes on")
        assert await client_reader.readexactly(7) == b"goes on"


async def test_engine_that_refuses_resets_its_client() -> None:
    async with relayed() as (relay, _):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            relay.point_at(*unused.getsockname())
            assert await is_reset((await connect(relay))[0])
        await gone(relay)


async def test_engine_that_never_accepts_costs_its_client_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "CONNECT_S", 0.05)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            relay = Relay()
            await relay.listen("127.0.0.1")
            relay.point_at(*full.getsockname())
            clients = [await connect(relay) for _ in range(3)]
            assert await is_reset(clients[-1][0], within_s=5)
            await relay.aclose()


async def test_one_connection_too_many_is_reset_and_the_others_stay() -> None:
    async with relayed(connections_max=2) as (relay, engine):
        pairs = [await joined(relay, engine) for _ in range(2)]
        assert await is_reset((await connect(relay))[0])
        for (client_reader, _), (_, engine_writer) in pairs:
            engine_writer.write(b"x")
            assert await client_reader.readexactly(1) == b"x"
        reset(pairs[0][0][1])
        await until(lambda: relay.connections == 1)
        await joined(relay, engine)


async def test_fixed_port_is_taken_and_given_back() -> None:
    first = Relay()
    await first.listen("127.0.0.1")
    port = first.port
    second = Relay()
    with pytest.raises(OSError, match="in use"):
        await second.listen("127.0.0.1", port)
    await first.aclose()
    await first.aclose()
    await second.aclose()
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_tls_carries_the_bytes_and_the_end_of_the_engine() -> None:
    up, down = bytes_of("up", 1_000_000), bytes_of("down", 3_000_000)
    async with relayed(tls=True) as (relay, engine):
        (client_reader, client_writer), (engine_reader, engine_writer) = await joined(relay, engine)
        client_writer.write(up)
        assert await asyncio.wait_for(engine_reader.readexactly(len(up)), 10) == up
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(send_all(engine_writer, down))
            at_client = group.create_task(digest_of(client_reader, piece=9_000, rest_every=20))
        assert at_client.result() == (len(down), hashlib.sha256(down).hexdigest())
        client_writer.close()
        await gone(relay)


async def test_tls_client_that_goes_away_is_seen_by_the_engine_at_once() -> None:
    async with relayed(tls=True) as (relay, engine):
        for leave in (lambda writer: writer.close(), reset):
            (_, client_writer), (engine_reader, _) = await joined(relay, engine)
            leave(client_writer)
            assert await is_reset(engine_reader) or engine_reader.at_eof()
        await gone(relay)


async def test_client_without_tls_reaches_no_engine() -> None:
    async with relayed(tls=True) as (relay, engine):
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"200" not in await asyncio.wait_for(reader.read(), 5)
        assert engine.arrived.empty()
        writer.close()


async def test_generation_through_the_relay_is_aborted_by_a_cut() -> None:
    """ORCH-2105."""
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        relay = Relay()
        await relay.listen("127.0.0.1")
        relay.point_at("127.0.0.1", int(fake.url.rpartition(":")[2]))
        client = HttpClient(f"http://127.0.0.1:{relay.port}")
        response = await client.stream("POST", "/completion", b'{"prompt": "a b", "n_predict": 5, "stream": true}')
        fake.release(1)
        assert b'"stop":false' in await anext(response)
        relay.cut()
        await fake.wait_until(lambda: len(fake.cancelled) == 1)
        await client.aclose()
        await relay.aclose()
