"""Health checks on real sockets: what counts as an answer, and what does not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from llorch.poolmanager.attention import Enough, lost_gpus, used_gpus, watch_health
from llorch.poolmanager.health import ask
from llorch.service.launching import Cause, Gpu, HostFacts
from llorch.testing.fake_engine import FakeEngine, Faults
from tests.unit.poolmanager.supervised import order

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


@asynccontextmanager
async def server(answer: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answers with these bytes and hangs up, or never."""
    heard: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        if answer is not None:
            writer.write(answer)
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", heard
    for writer in writers:
        writer.close()
    listener.close()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 200),
        (b"HTTP/1.0 503 Service Unavailable\r\n\r\n", 503),
        (b"HTTP/1.1 204\r\n\r\n", 204),
        (b"SSH-2.0-OpenSSH 200\r\n", 0),
        (b"HTTP/1.1 yes\r\n", 0),
        (b"x" * 200_000, 0),
        (b"", None),
        (None, None),
    ],
)
async def test_answer_is_its_status(answer: bytes | None, status: int | None) -> None:
    async with server(answer) as (url, heard):
        assert await ask(f"{url}/ready?deep=1", api_key="k", timeout_s=0.3 if answer is None else 10) == status
        assert heard[0].startswith(b"GET /ready?deep=1 HTTP/1.1\r\n")
        assert b"\r\nAuthorization: Bearer k\r\n" in heard[0]


async def test_nobody_listens() -> None:
    async with server(b"") as (url, _):
        pass
    assert await ask(url, api_key="k", timeout_s=10) is None


async def test_engine_that_answers_in_time_is_let_alone_whatever_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.poolmanager.attention.HEALTH_S", 0.01)
    checks = asyncio.Semaphore(0)
    async with FakeEngine() as engine:
        watch = asyncio.create_task(
            watch_health(f"{engine.url}/health", api_key="k", limit_s=0.2, on_check=checks.release)
        )
        for faults in (Faults(), Faults(loading=True)):
            engine.faults = faults
            for _ in range(10):
                await asyncio.wait_for(checks.acquire(), 10)
        engine.faults = Faults(freeze=True)
        with pytest.raises(Enough) as raised:
            await asyncio.wait_for(watch, 10)
    assert raised.value.killed is not None
    assert raised.value.killed.cause is Cause.UNRESPONSIVE


async def test_silence_of_one_check_after_the_manager_stood_still_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept, a debugger: the clock jumps, and the check that was under way is lost with it."""
    monkeypatch.setattr("llorch.poolmanager.attention.HEALTH_S", 0.01)
    loop = asyncio.get_running_loop()
    asked: list[float] = []
    has_gone_on = asyncio.Event()
    leap, time = 0.0, loop.time

    async def stand_still(_url: str, *, api_key: str, timeout_s: float) -> int | None:
        nonlocal leap
        asked.append(timeout_s)
        if len(asked) == 6:
            has_gone_on.set()
        if len(asked) == 3:
            leap = 3600.0
            return None
        return 200

    monkeypatch.setattr("llorch.poolmanager.attention.ask", stand_still)
    monkeypatch.setattr(loop, "time", lambda: time() + leap)
    watch = asyncio.create_task(watch_health("http://x", api_key="k", limit_s=15, on_check=lambda: None))
    await asyncio.wait({watch, asyncio.ensure_future(has_gone_on.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert not watch.done()
    watch.cancel()


@pytest.mark.parametrize(
    ("devices", "allow_cpu", "used"),
    [
        ((), False, (0, 1)),
        ((1,), False, (1,)),
        ((2,), True, ()),
        ((), True, ()),
        ((0, 2), False, (0,)),
    ],
)
def test_gpus_of_a_process_are_those_of_its_mask_that_are_there(
    devices: tuple[int, ...], allow_cpu: bool, used: tuple[int, ...]
) -> None:
    facts = HostFacts(gpus=(Gpu(0, "a", 1, 0), Gpu(1, "b", 1, 0), Gpu(2, "c", 1, 0, is_lost=True)))
    assert used_gpus(order(devices=devices, allow_cpu=allow_cpu), facts) == used
    assert lost_gpus(used, facts) == ()
    assert lost_gpus(used, HostFacts()) == used
