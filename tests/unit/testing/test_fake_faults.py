"""FakeEngine goes wrong as supervision and chaos tests need it: while it loads, frozen, refusing, hogging memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import pytest

from llorch.testing.fake_engine import FakeEngine, Faults

MIB = 1024 * 1024
SILENCE_S = 0.15
"""How long nothing has to come before it is said that nothing comes."""


@pytest.fixture
async def fake() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(slots=2) as fake:
        yield fake


@pytest.fixture
async def http(fake: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fake.url, trust_env=False, timeout=10) as http:
        yield http


def ask(count: int, *, stream: bool = True, prompt: str = "a") -> dict[str, Any]:
    return {"prompt": prompt, "n_predict": count, "seed": 7, "stream": stream}


def text_of(stream: str) -> str:
    return "".join(json.loads(event.removeprefix("data: "))["content"] for event in stream.strip().split("\n\n"))


async def test_everything_is_503_for_the_time_that_loading_takes() -> None:
    async with FakeEngine(load_s=0.3) as fake, httpx.AsyncClient(base_url=fake.url, trust_env=False) as http:
        for path in ("/health", "/slots", "/props", "/v1/models"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")
            assert answer.json()["error"]["message"] == "Loading model"
        assert (await http.post("/completion", json=ask(1))).status_code == 503
        assert (await http.get("/_fake")).status_code == 200
        async with asyncio.timeout(5):
            while (await http.get("/health")).status_code == 503:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.01)
        assert (await http.post("/completion", json=ask(1))).status_code == 200


async def test_reset_of_the_faults_does_not_load_the_model() -> None:
    async with FakeEngine(load_s=60) as fake, httpx.AsyncClient(base_url=fake.url, trust_env=False) as http:
        await http.post("/_fake", json={"reset": True})
        assert (await http.get("/health")).status_code == 503


async def test_frozen_engine_accepts_and_answers_nothing_but_its_admin_path(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    await http.post("/_fake", json={"set": {"freeze": True}})
    asked = [asyncio.create_task(http.get("/health")), asyncio.create_task(http.post("/completion", json=ask(2)))]
    done, _ = await asyncio.wait(asked, timeout=SILENCE_S)
    assert not done
    assert len(fake.connections) == len(asked)
    assert (await http.get("/_fake")).json()["generations"] == 0
    await http.post("/_fake", json={"set": {"freeze": False}})
    assert [(await each).status_code for each in asked] == [200, 200]


async def test_frozen_stream_falls_silent_and_goes_on_with_the_next_token(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    fake.token_interval_s = 0.005
    post = asyncio.create_task(http.post("/completion", json=ask(40)))
    await fake.wait_until(lambda: bool(fake.seen) and fake.last.tokens_sent >= 3)
    fake.faults = Faults(freeze=True)
    sent = fake.last.tokens_sent
    await asyncio.wait([post], timeout=SILENCE_S)
    assert fake.last.tokens_sent == sent
    assert not post.done()
    fake.faults = Faults()
    assert text_of((await post).text) == "".join(fake.expected_tokens("a", 7, 40))


async def test_prefill_freezes_too(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.prefill_interval_s = 0.02
    prompt = " ".join(["word"] * 200)
    post = asyncio.create_task(http.post("/completion", json=ask(2, prompt=prompt)))
    await fake.wait_until(lambda: fake.running == 1)
    fake.faults = Faults(freeze=True)
    await asyncio.wait([post], timeout=SILENCE_S)
    assert fake.last.tokens_sent == 0
    fake.faults = Faults()
    assert (await post).status_code == 200


async def test_tokens_released_while_frozen_come_once_it_thaws(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(hold=True)
    post = asyncio.create_task(http.post("/completion", json=ask(2)))
    await fake.wait_until(lambda: fake.running == 1)
    fake.faults = Faults(hold=True, freeze=True)
    fake.release(1)
    fake.release(1)
    assert fake.last.tokens_sent == 0
    fake.faults = Faults(hold=True)
    assert text_of((await post).text) == "".join(fake.expected_tokens("a", 7, 2))


async def test_frozen_engine_keeps_the_slot_of_a_client_that_left_until_it_thaws(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    """A process that hangs does not hear that a connection was closed."""
    fake.faults = Faults(hold=True)
    post = asyncio.create_task(http.post("/completion", json=ask(2)))
    await fake.wait_until(lambda: fake.running == 1)
    fake.faults = Faults(hold=True, freeze=True)
    post.cancel()
    await fake.wait_until(lambda: not fake.connections)
    assert fake.running == 1
    fake.faults = Faults()
    await fake.wait_until(lambda: fake.running == 0)
    assert fake.last.state == "cancelled"


async def test_generations_are_503_at_once_while_health_is_200(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(error_status=503)
    for stream in (True, False):
        answer = await http.post("/completion", json=ask(1, stream=stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
        assert (await http.get("/health")).status_code == 200
    assert not fake.seen


async def test_hogged_memory_is_touched_and_given_back(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    await http.post("/_fake", json={"set": {"hog_mib": 64}})
    assert process.memory_info().rss - before > 60 * MIB
    await http.post("/_fake", json={"reset": True})
    assert process.memory_info().rss - before < 20 * MIB


async def test_slots_tell_which_are_busy_and_are_free_at_once_when_the_client_leaves(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    async def busy() -> list[bool]:
        return [slot["is_processing"] for slot in (await http.get("/slots")).json()]

    fake.faults = Faults(hold=True)
    assert await busy() == [False, False]
    post = asyncio.create_task(http.post("/completion", json=ask(5)))
    await fake.wait_until(lambda: fake.running == 1)
    assert await busy() == [True, False]
    post.cancel()
    await fake.wait_until(lambda: fake.running == 0)
    assert fake.last.ended_at is not None
    assert fake.last.slot_freed_at == pytest.approx(fake.last.ended_at, abs=0.05)
    assert await busy() == [False, False]
