"""The streaming HTTP client, on real sockets: against FakeEngine, and against servers that follow a script."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llorch.adapters.connections import HIGH_WATER_BYTES, idle_lifetime_s
from llorch.adapters.http import HttpClient, Timeouts
from llorch.errors import Canceled, ConfigError, DecodeTimeout, WorkerReset
from llorch.testing.fake_engine import FakeEngine, Faults

COMPLETION = json.dumps({"prompt": "a b c", "n_predict": 5, "stream": True, "seed": 1}).encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""Certificate and key of 127.0.0.1, self-signed, made for this test and good for nothing else."""
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The URL of a server that lets the script have every connection, after the head of its first request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    server.close()


def answers(*parts: bytes) -> Script:
    """A script that sends the parts and closes."""

    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return script


async def until_closed(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """A script that answers nothing and returns when the client closes."""
    while await reader.read(1024):
        pass


async def test_whole_answer_is_returned_and_its_connection_reused() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        for _ in range(5):
            answer = await client.request("GET", "/health")
            assert (answer.status, answer.body) == (200, b'{"status":"ok"}')
        assert fake.connections_made == 1
        assert client.idle_connections == 1
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
        assert client.open_connections == client.idle_connections == 8
        await client.aclose()


async def test_everything_that_arrived_together_is_one_item() -> None:
    async with FakeEngine(tokens_per_segment=5) as fake:
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        chunks = [chunk async for chunk in response]
        assert chunks[0].count(b'"stop":false') == 5
        await client.aclose()


async def test_first_chunk_is_delivered_while_the_answer_goes_on_peer_bug_13() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        fake.release(1)
        assert b'"stop":false' in await anext(response)
        assert fake.running == 1
        await response.aclose()
        await client.aclose()


async def test_closing_an_unfinished_answer_closes_the_connection_at_once() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        await response.aclose()
        assert client.open_connections == 0
        await fake.wait_until(lambda: len(fake.cancelled) == 1)
        await client.aclose()


async def test_closing_a_finished_answer_keeps_the_connection() -> None:
    async with FakeEngine() as fake:
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        assert [chunk async for chunk in response]
        await response.aclose()
        assert client.idle_connections == 1
        assert (await client.request("GET", "/health")).status == 200
        await response.aclose()
        assert client.idle_connections == 1
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
        assert client.open_connections == 0
        await fake.wait_until(lambda: fake.running == 0 and not fake.connections)
        await client.aclose()


async def test_closing_from_another_task_ends_the_waiting_consumer() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(hold=True)
        client = HttpClient(fake.url)
        response = await client.stream("POST", "/completion", COMPLETION)
        consumer = asyncio.create_task(anext(response))
        await asyncio.sleep(0)
        await response.aclose()
        with pytest.raises(Canceled):
            await consumer
        await client.aclose()


async def test_idle_connection_is_dropped_before_the_engine_does_it() -> None:
    async with FakeEngine(keep_alive_s=1.0) as fake:
        client = HttpClient(fake.url)
        await client.request("GET", "/health")
        assert client.idle_connections == 1
        await fake.wait_until(lambda: not fake.connections)
        assert fake.idle_closed == 0
        assert client.open_connections == client.idle_connections == 0
        await client.aclose()


@pytest.mark.parametrize(
    ("header", "lifetime_s"),
    [(None, 4.0), (b"timeout=5, max=100", 4.0), (b"timeout=75", 4.0), (b"max=3, timeout=3", 2.0), (b"timeout=1", 0.5),
     (b"timeout=0", 0.0), (b"timeout=x", 4.0)],
)  # fmt: skip
def test_idle_lifetime_is_shorter_than_the_engine_says(header: bytes | None, lifetime_s: float) -> None:
    assert idle_lifetime_s(header) == lifetime_s


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
        assert client.open_connections == 0
        await client.aclose()


async def test_engine_that_falls_silent_is_decode_timeout_after_the_idle_time_only() -> None:
    async with FakeEngine() as fake:
        fake.faults = Faults(silent_after=2)
        client = HttpClient(fake.url, timeouts=Timeouts(first_byte_s=60.0, idle_s=0.1))
        response = await client.stream("POST", "/completion", COMPLETION)
        received: list[bytes] = []

        async def consume() -> None:
            async for chunk in response:
                received.append(chunk)  # noqa: PERF401 (what came before the error counts)

        start = asyncio.get_running_loop().time()
        with pytest.raises(DecodeTimeout, match="went silent"):
            await consume()
        assert b"".join(received).count(b'"stop":false') == 2
        assert asyncio.get_running_loop().time() - start < 5.0
        await fake.wait_until(lambda: len(fake.cancelled) == 1)
        await client.aclose()


async def test_slow_but_steady_engine_is_no_timeout() -> None:
    async with FakeEngine(token_interval_s=0.06) as fake:
        client = HttpClient(fake.url, timeouts=Timeouts(idle_s=0.2))
        response = await client.stream("POST", "/completion", COMPLETION)
        received = b"".join([chunk async for chunk in response])
        assert received.count(b'"stop":false') == 5
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
        assert client.open_connections == 0
        await client.aclose()


@pytest.mark.parametrize(
    "garbage",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", CHUNKED + b"zz\r\n", b"\x16\x03\x01"],
)
async def test_answer_that_is_not_http_is_worker_reset(garbage: bytes) -> None:
    async with scripted(answers(garbage)) as url:
        client = HttpClient(url)
        with pytest.raises(WorkerReset):
            await client.request("GET", "/")
        assert client.open_connections == 0
        await client.aclose()


@pytest.mark.parametrize("cut", [CHUNKED + b"2\r\nhi\r\n", CHUNKED + b"8\r\nhi", OK[:-1]])
async def test_end_of_the_connection_before_the_end_of_the_answer_is_worker_reset(cut: bytes) -> None:
    async with scripted(answers(cut)) as url:
        client = HttpClient(url)
        with pytest.raises(WorkerReset, match="before its answer was complete"):
            await client.request("GET", "/")
        await client.aclose()


async def test_what_arrived_before_the_end_of_the_connection_is_delivered_first() -> None:
    async with scripted(answers(CHUNKED + b"2\r\nhi\r\n")) as url:
        client = HttpClient(url)
        response = await client.stream("GET", "/")
        assert await anext(response) == b"hi"
        with pytest.raises(WorkerReset):
            await anext(response)
        await client.aclose()


async def test_body_without_length_ends_with_the_connection() -> None:
    async with scripted(answers(b"HTTP/1.1 200 OK\r\n\r\nall", b" of it")) as url:
        client = HttpClient(url)
        assert (await client.request("GET", "/")).body == b"all of it"
        assert client.idle_connections == 0
        await client.aclose()


async def test_informational_answers_are_passed_over() -> None:
    async with scripted(answers(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", OK)) as url:
        client = HttpClient(url)
        answer = await client.request("GET", "/")
        assert (answer.status, answer.body) == (200, b"ok")
        await client.aclose()


async def test_data_after_the_answer_leave_it_whole_and_close_the_connection() -> None:
    async with scripted(answers(OK + OK)) as url:
        client = HttpClient(url)
        assert (await client.request("GET", "/")).body == b"ok"
        assert client.idle_connections == 0
        await client.aclose()


async def test_connection_close_is_obeyed() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with scripted(answers(head)) as url:
        client = HttpClient(url)
        assert (await client.request("GET", "/")).body == b"ok"
        assert client.idle_connections == 0
        await client.aclose()


async def test_ordinary_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.adapters.http.MAX_ANSWER_BYTES", 1000)
    async with scripted(answers(CHUNKED, *[b"64\r\n" + b"x" * 100 + b"\r\n"] * 20)) as url:
        client = HttpClient(url)
        with pytest.raises(WorkerReset, match="larger than the 1000 bytes"):
            await client.request("GET", "/")
        assert client.open_connections == 0
        await client.aclose()


async def test_consumer_that_is_behind_stops_the_reading() -> None:
    sent = 0
    total = 64 * HIGH_WATER_BYTES
    is_stuck = asyncio.Event()

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n".encode())
        while sent < total:
            writer.write(b"x" * 65536)
            sent += 65536
            try:
                async with asyncio.timeout(0.3):
                    await writer.drain()
            except TimeoutError:
                is_stuck.set()
                await writer.drain()

    async with scripted(flood) as url:
        client = HttpClient(url, timeouts=Timeouts(idle_s=0.2))
        response = await client.stream("GET", "/")
        await is_stuck.wait()
        first = response.take()
        assert first is not None
        assert len(first) <= 3 * HIGH_WATER_BYTES
        assert sent < total // 2
        received = len(first)
        async for chunk in response:
            received += len(chunk)
        assert received == total
        await client.aclose()


async def test_answer_that_nobody_consumes_any_more_returns_its_connection() -> None:
    is_taken, is_ended = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"2\r\nhi\r\n")
        await is_taken.wait()
        writer.write(b"0\r\n\r\n")
        is_ended.set()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    async with scripted(script) as url:
        client = HttpClient(url)
        response = await client.stream("GET", "/")
        assert await anext(response) == b"hi"
        response.let_finish()
        await response.aclose()
        assert (client.open_connections, client.idle_connections) == (1, 0)
        is_taken.set()
        async with asyncio.timeout(5):
            await is_ended.wait()
            while not client.idle_connections:
                await asyncio.sleep(0)  # noqa: ASYNC110 (the client tells nobody)
        assert (await client.request("GET", "/")).body == b"ok"
        await client.aclose()


async def test_answer_that_nobody_consumes_and_that_does_not_end_is_closed() -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"2\r\nhi\r\n")
        await until_closed(reader, writer)
        closed.set()

    async with scripted(script) as url:
        client = HttpClient(url)
        response = await client.stream("GET", "/")
        await anext(response)
        response.let_finish()
        async with asyncio.timeout(5):
            await closed.wait()
        assert client.open_connections == 0
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
