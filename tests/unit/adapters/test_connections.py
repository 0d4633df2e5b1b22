"""One connection and its answer, on real sockets: framing, delivery, backpressure, deadlines."""

import asyncio

import pytest

from llorch.adapters.connections import HIGH_WATER_BYTES, idle_lifetime_s
from llorch.adapters.http import HttpClient, Timeouts
from llorch.errors import Canceled, DecodeTimeout, WorkerReset
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


@pytest.mark.parametrize(
    ("header", "lifetime_s"),
    [(None, 4.0), (b"timeout=5, max=100", 4.0), (b"timeout=75", 4.0), (b"max=3, timeout=3", 2.0), (b"timeout=1", 0.5),
     (b"timeout=0", 0.0), (b"timeout=x", 4.0)],
)  # fmt: skip
def test_idle_lifetime_is_shorter_than_the_engine_says(header: bytes | None, lifetime_s: float) -> None:
    assert idle_lifetime_s(header) == lifetime_s


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


@pytest.mark.parametrize(
    "garbage",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", CHUNKED + b"zz\r\n", b"\x16\x03\x01"],
)
async def test_answer_that_is_not_http_is_worker_reset(garbage: bytes) -> None:
    async with scripted(answers(garbage)) as url:
        client = HttpClient(url)
        with pytest.raises(WorkerReset):
            await client.request("GET", "/")
        assert count_open(client) == 0
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
        assert count_idle(client) == 0
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
        assert count_idle(client) == 0
        await client.aclose()


async def test_connection_close_is_obeyed() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with scripted(answers(head)) as url:
        client = HttpClient(url)
        assert (await client.request("GET", "/")).body == b"ok"
        assert count_idle(client) == 0
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
        assert (count_open(client), count_idle(client)) == (1, 0)
        is_taken.set()
        async with asyncio.timeout(5):
            await is_ended.wait()
            while not count_idle(client):  # noqa: ASYNC110 (the client tells nobody)
                await asyncio.sleep(0)
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
        assert count_open(client) == 0
        await client.aclose()
