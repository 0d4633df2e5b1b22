"""The client and its pool, on real sockets: reuse, retry, closing, and what the network can do."""

import asyncio
import ssl
from pathlib import Path

import pytest

from llorch.adapters.http import HttpClient, Timeouts
from llorch.errors import ConfigError, DecodeTimeout, WorkerReset
from llorch.testing.fake_engine import FakeEngine, Faults
from tests.unit.adapters.scripted import (
    CHUNKED,
    COMPLETION,
    OK,
    answers,
    count_idle,
    count_open,
    scripted,
    until_closed,
)

CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""Certificate and key of 127.0.0.1, self-signed, made for this test and good for nothing else."""


async def test_whole_answer_is_returned_and_its_connection_reused() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        for _ in range(5):
            answer = await client.request("GET", "/health")
            assert (answer.status, answer.body) == (200, b'{"status":"ok"}')
        assert fake.connections_made == 1
        assert count_idle(client) == 1
        await client.aclose()
        await fake.wait_until(lambda: not fake.connections)


async def test_parallel_requests_have_connections_of_their_own() -> None:
    async with FakeEngine(slots=8) as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        streams = [asyncio.create_task(client.stream("POST", "/completion", COMPLETION)) for _ in range(8)]
        await fake.wait_until(lambda: fake.running == 8)
        fake.release(5)
        for each in streams:
            response = await each
            assert [chunk async for chunk in response]
        assert count_open(client) == count_idle(client) == 8
        await client.aclose()


async def test_closing_an_unfinished_answer_closes_the_connection_at_once() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        await response.aclose()
        assert count_open(client) == 0
        await fake.wait_until(lambda: len(fake.cancelled) == 1)
        await client.aclose()


async def test_closing_a_finished_answer_keeps_the_connection() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        assert [chunk async for chunk in response]
        await response.aclose()
        assert count_idle(client) == 1
        assert (await client.request("GET", "/health")).status == 200
        await response.aclose()
        assert count_idle(client) == 1
        await client.aclose()


@pytest.mark.parametrize("stage", ["connecting", "before the head", "in the body"])
async def test_cancelled_consumer_leaks_no_connection_peer_bug_05(stage: str) -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(stall=stage == "before the head", hold=True)
        client = HttpClient(fake.url)
        is_reading = asyncio.Event()

        async def consume() -> None:
            response = await client.stream("POST", "/completion", COMPLETION)
            is_reading.set()
            async with asyncio.timeout(None):
                try:
                    async for _ in response:
                        pass
                finally:
                    await response.aclose()

        task = asyncio.create_task(consume())
        if stage == "connecting":
            await asyncio.sleep(0)
        elif stage == "before the head":
            await fake.wait_until(lambda: fake.running == 1)
        else:
            await is_reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert count_open(client) == 0
        await fake.wait_until(lambda: fake.running == 0 and not fake.connections)
        await client.aclose()


async def test_idle_connection_is_dropped_before_the_engine_does_it() -> None:
    async with FakeEngine(keep_alive_s=1.0) as fake:
        client = HttpClient(fake.url)
        await client.request("GET", "/health")
        assert count_idle(client) == 1
        await fake.wait_until(lambda: not fake.connections)
        assert fake.idle_closed == 0
        assert count_open(client) == count_idle(client) == 0
        await client.aclose()


async def test_request_on_a_connection_that_died_idle_is_sent_once_more() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        await client.request("GET", "/health")
        fake.faults = Faults(drop_reused=True)
        assert (await client.request("GET", "/health")).status == 200
        assert fake.connections_made == 2
        await client.aclose()


async def test_connection_that_the_engine_closed_is_not_used_again() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        await client.request("GET", "/health")
        fake.drop_idle()
        assert (await client.request("GET", "/health")).status == 200
        await client.aclose()


async def test_new_connection_that_dies_is_not_retried() -> None:
    connections = 0

    async def hang_up(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1

    async with scripted(hang_up) as url:
        client = HttpClient(url, engine="llamacpp")
        with pytest.raises(WorkerReset) as caught:
            await client.request("GET", "/")
        assert caught.value.engine == "llamacpp"
        assert connections == 1
        await client.aclose()


async def test_reused_connection_that_dies_after_a_byte_of_the_answer_is_not_retried() -> None:
    requests = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")
        requests += 1
        writer.write(b"HTTP/1.1 2")

    async with scripted(script) as url:
        client = HttpClient(url)
        await client.request("GET", "/")
        with pytest.raises(WorkerReset, match="before its answer was complete"):
            await client.request("GET", "/")
        assert requests == 2
        await client.aclose()


async def test_engine_that_does_not_begin_in_time_is_decode_timeout() -> None:
    async with scripted(until_closed) as url:
        client = HttpClient(url, timeouts=Timeouts(first_byte_s=0.05, answer_s=0.05))
        with pytest.raises(DecodeTimeout, match="did not begin"):
            await client.stream("POST", "/", b"{}")
        with pytest.raises(DecodeTimeout, match="did not begin"):
            await client.request("GET", "/")
        assert count_open(client) == 0
        await client.aclose()


async def test_connect_refused_is_worker_reset() -> None:
    async with FakeEngine() as fake:
        url = fake.url
    client = HttpClient(url, engine="llamacpp")
    with pytest.raises(WorkerReset, match="cannot be reached") as caught:
        await client.request("GET", "/health")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.engine == "llamacpp"
    await client.aclose()


async def test_connection_reset_as_soon_as_it_stands_is_worker_reset() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(refuse=True)
        client = HttpClient(fake.url)
        with pytest.raises(WorkerReset):
            await client.request("GET", "/health")
        assert count_open(client) == 0
        await client.aclose()


async def test_ordinary_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.adapters.http.MAX_ANSWER_BYTES", 1000)
    async with scripted(answers(CHUNKED, *[b"64\r\n" + b"x" * 100 + b"\r\n"] * 20)) as url:
        client = HttpClient(url)
        with pytest.raises(WorkerReset, match="larger than the 1000 bytes"):
            await client.request("GET", "/")
        assert count_open(client) == 0
        await client.aclose()


async def test_closed_client_ends_answers_and_opens_nothing() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        await client.aclose()
        await client.aclose()
        with pytest.raises(WorkerReset):
            await anext(response)
        with pytest.raises(WorkerReset):
            await client.request("GET", "/health")
        await fake.wait_until(lambda: not fake.connections)


async def test_headers_and_path_prefix_are_sent() -> None:
    seen = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen = await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = HttpClient(f"http://127.0.0.1:{port}/engine/", headers={"Authorization": "Bearer k"})
    await client.request("POST", "/tokenize", b"{}")
    assert seen.startswith(b"POST /engine/tokenize HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{port}\r\n".encode() in seen
    assert b"Authorization: Bearer k\r\n" in seen
    assert b"Content-Length: 2\r\n" in seen
    await client.aclose()
    server.close()


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://a", "http://", "http://a/?b=1"])
def test_what_is_no_url_of_an_engine_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        HttpClient(url)


def test_header_that_would_split_the_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="Authorization"):
        HttpClient("http://a", headers={"Authorization": "Bearer a\r\nX: y"})


async def test_tls_is_verified_and_used() -> None:
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(CERTIFICATE)
    async with scripted(answers(OK), tls=server_context) as url:
        client = HttpClient(url, ssl_context=ssl.create_default_context(cafile=str(CERTIFICATE)))
        assert (await client.request("GET", "/")).body == b"ok"
        await client.aclose()
        stranger = HttpClient(url)
        with pytest.raises(WorkerReset, match="certificate"):
            await stranger.request("GET", "/")
        await stranger.aclose()
