"""The engine suite, on the real llama.cpp with a tiny model and on FakeEngine."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from llorch.adapters.http import Timeouts
from llorch.errors import DecodeTimeout, LlorchError, PoolUnready, WorkerReset
from llorch.service.ports import Sampling
from llorch.testing.fake_engine import FakeEngine, Faults
from tests.conformance.engine_process import EngineProcess, launch_tiny
from tests.conformance.engine_suite import CTX, EngineSuite, Run, Target, collect, order, wait_idle

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[EngineProcess]:
    """One engine for all tests that leave it as they found it."""
    async with launch_tiny(ctx=CTX, alias="conformance") as process:
        yield process


def target_of(process: EngineProcess) -> Target:
    """The process as the suite needs it."""

    async def kill() -> None:
        process.signal(signal.SIGKILL)
        await process.wait()

    return Target(url=process.url, api_key=process.api_key, kill=kill)


class TestFakeEngine(EngineSuite):
    """The double keeps the same promises as the engine that it stands for."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def fake(self) -> AsyncIterator[FakeEngine]:
        async with FakeEngine(ctx=CTX, model="conformance", prefill_interval_s=0.02, token_interval_s=0.001) as fake:
            yield fake

    @pytest.fixture
    def target(self, fake: FakeEngine) -> Target:
        return Target(url=fake.url, api_key=None, kill=fake.aclose)

    @pytest.fixture
    def victim(self, target: Target) -> Target:
        return target

    async def test_engine_that_never_answers_is_decode_timeout(self, target: Target, fake: FakeEngine) -> None:
        fake.faults = Faults(stall=True)
        engine = target.connect(Timeouts(first_byte_s=0.1))
        with pytest.raises(DecodeTimeout, match="did not begin"):
            await collect(engine, order())
        await engine.aclose()

    async def test_idle_slot_is_erased_where_the_server_can(self, target: Target, fake: FakeEngine) -> None:
        engine = target.connect()
        assert await engine.erase(0) is True
        fake.can_erase = False
        assert await engine.erase(0) is False
        assert list(fake.erased) == [0]
        await engine.aclose()

    async def test_loading_engine_is_pool_unready(self, target: Target, fake: FakeEngine) -> None:
        fake.faults = Faults(loading=True)
        engine = target.connect()
        with pytest.raises(PoolUnready, match="Loading model"):
            await engine.check_health()
        with pytest.raises(PoolUnready, match="Loading model"):
            await collect(engine, order())
        await engine.aclose()


class TestLlamaCpp(EngineSuite):
    """The real server."""

    @pytest.fixture
    def target(self, process: EngineProcess) -> Target:
        return target_of(process)

    @pytest_asyncio.fixture(loop_scope="module")
    async def victim(self) -> AsyncIterator[Target]:
        async with launch_tiny(ctx=CTX, alias="conformance") as process:
            yield target_of(process)

    async def test_engine_that_never_answers_is_decode_timeout(self, target: Target, process: EngineProcess) -> None:
        engine = target.connect(Timeouts(first_byte_s=0.2))
        process.signal(signal.SIGSTOP)
        with pytest.raises(DecodeTimeout, match="did not begin"):
            await collect(engine, order())
        process.signal(signal.SIGCONT)
        await engine.aclose()

    async def test_engine_that_falls_silent_is_decode_timeout(self, target: Target, process: EngineProcess) -> None:
        engine = target.connect(Timeouts(idle_s=0.2))
        run = Run(engine, order(max_tokens=1900))
        await run.first_token()
        process.signal(signal.SIGSTOP)
        with pytest.raises(DecodeTimeout, match="went silent"):
            await run.task
        process.signal(signal.SIGCONT)
        await engine.aclose()

    async def test_loading_engine_is_pool_unready(self) -> None:
        process = launch_tiny(ctx=CTX, alias="conformance")
        await process.spawn()
        engine = target_of(process).connect()
        seen: set[type[LlorchError]] = set()
        async with asyncio.timeout(60):
            while True:
                try:
                    await engine.check_health()
                    break
                except (PoolUnready, WorkerReset) as exc:
                    seen.add(type(exc))
                await asyncio.sleep(0.01)
        assert PoolUnready in seen
        await engine.aclose()
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0

    async def test_wrong_key_is_pool_unready_and_says_so(self, target: Target) -> None:
        stranger = Target(target.url, "not-the-key", target.kill).connect()
        with pytest.raises(PoolUnready, match="refused llorch's key"):
            await collect(stranger, order())
        with pytest.raises(PoolUnready, match="refused llorch's key"):
            await stranger.read_load()
        await stranger.aclose()

    async def test_generation_that_is_not_strict_may_reuse_a_prefix(self, target: Target) -> None:
        engine = target.connect()
        await collect(engine, order("word " * 200, max_tokens=2))
        _, warm = await collect(engine, order("word " * 200, max_tokens=2, strict=False))
        assert (warm.usage.cached_tokens or 0) > 100
        await engine.aclose()

    async def test_slot_cannot_be_erased_without_a_place_for_saved_slots(self, target: Target) -> None:
        engine = target.connect()
        assert await engine.erase(0) is False
        await engine.aclose()

    async def test_json_schema_constrains_the_text(self, target: Target) -> None:
        engine = target.connect()
        sampling = Sampling(json_schema={"enum": ["yes", "no"]})
        tokens, completed = await collect(engine, order(max_tokens=20, sampling=sampling))
        assert "".join(tokens) in ('"yes"', '"no"')
        assert completed.finish_reason == "stop"
        await engine.aclose()

    async def test_idle_connections_do_not_starve_the_engine(self, target: Target) -> None:
        """Each idle connection holds a thread of llama.cpp's server; it must still answer when there are many."""
        crowd = [target.connect() for _ in range(40)]
        for each in crowd:
            await each.check_health()
        last = target.connect()
        await wait_idle(last)
        for each in [*crowd, last]:
            await each.aclose()
