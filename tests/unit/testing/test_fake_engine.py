"""FakeEngine keeps to the protocols it imitates: what the engine suite does not look at, and its life as a process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from llorch.testing.fake_engine import FakeEngine, Faults


@pytest.fixture
async def fake() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(slots=2, model="fake-model") as fake:
        yield fake


@pytest.fixture
async def http(fake: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fake.url, trust_env=False) as http:
        yield http


def events(text: str) -> list[Any]:
    """The data of a stream, decoded; the last of OpenAI's is the text [DONE]."""
    parts = text.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    return [part if (part := each[6:]) == "[DONE]" else json.loads(part) for each in parts]


async def test_tokens_depend_on_prompt_and_seed_alone(fake: FakeEngine) -> None:
    tokens = fake.expected_tokens("a", 1, 50)
    assert tokens == fake.expected_tokens("a", 1, 60)[:50]
    assert tokens != fake.expected_tokens("a", 2, 50)
    assert tokens != fake.expected_tokens("b", 1, 50)
    async with FakeEngine() as other:
        assert other.expected_tokens("a", 1, 50) == tokens


async def test_openai_completion_stream_is_framed_like_vllm(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    body = {"prompt": "a b", "max_tokens": 3, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    answer = await http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    *tokens, usage, done = events(answer.text)
    assert [each["choices"][0]["text"] for each in tokens] == fake.expected_tokens("a b", 5, 3)
    assert [each["choices"][0]["finish_reason"] for each in tokens] == [None, None, "length"]
    assert {each["object"] for each in [*tokens, usage]} == {"text_completion"}
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "total_tokens": 5, "completion_tokens": 3}
    assert done == "[DONE]"


async def test_openai_chat_stream_begins_with_the_role(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    first, *tokens, done = events((await http.post("/v1/chat/completions", json=body)).text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [each["choices"][0]["delta"]["content"] for each in tokens]
    assert texts == fake.expected_tokens(fake.last.prompt, 0, 2)
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


async def test_openai_answers_that_are_not_streamed_have_text_and_usage(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    text = "".join(fake.expected_tokens("a b", 0, 4))
    answer = (await http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 4})).json()
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["completion_tokens"] == 4
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = (await http.post("/v1/chat/completions", json=chat)).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["object"] == "chat.completion"


async def test_error_in_an_openai_stream_is_followed_by_done(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(error_after=1)
    answer = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, "stream": True})
    assert [next(iter(each)) for each in events(answer.text)[:-1]] == ["id", "error"]
    assert events(answer.text)[-1] == "[DONE]"


async def test_generations_beyond_the_slots_wait_in_line(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(hold=True)
    body = {"prompt": "a", "n_predict": 1, "stream": True}
    posts = [asyncio.create_task(http.post("/completion", json=body)) for _ in range(4)]
    await fake.wait_until(lambda: fake.running == 2 and fake.queued == 2)
    fake.release(1)
    await fake.wait_until(lambda: fake.running == 2 and fake.queued == 0)
    fake.release(1)
    assert [(await post).status_code for post in posts] == [200] * 4
    assert fake.max_running == 2
    assert [seen.state for seen in fake.seen] == ["finished"] * 4


async def test_one_generation_can_be_released_alone(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(hold=True)
    body = {"prompt": "a", "n_predict": 1, "stream": True}
    posts = [asyncio.create_task(http.post("/completion", json=body)) for _ in range(2)]
    await fake.wait_until(lambda: fake.running == 2)
    fake.release(1, generation=2)
    await fake.wait_until(lambda: fake.running == 1)
    assert {seen.id: seen.state for seen in fake.seen} == {1: "running", 2: "finished"}
    fake.release(1)
    await asyncio.gather(*posts)


async def test_stream_that_is_closed_frees_its_slot_and_a_whole_answer_does_not(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    """As llama.cpp does: without a stream it does not notice that nobody waits any more."""
    fake.faults = Faults(hold=True)
    for stream in (True, False):
        post = asyncio.create_task(http.post("/completion", json={"prompt": "a", "n_predict": 2, "stream": stream}))
        await fake.wait_until(lambda: fake.last.state == "running" if fake.seen else False)
        post.cancel()
        with pytest.raises(asyncio.CancelledError):
            await post
        if stream:
            await fake.wait_until(lambda: fake.last.state == "cancelled" and fake.running == 0)
        else:
            await fake.wait_until(lambda: len(fake.connections) == 0)
            assert fake.running == 1
            fake.release(2)
            await fake.wait_until(lambda: fake.running == 0)
            assert fake.last.state == "finished"
        fake.seen.clear()


async def test_faults_can_be_limited_to_the_next_generations(fake: FakeEngine, http: httpx.AsyncClient) -> None:
    fake.faults = Faults(error_status=500, times=2)
    statuses = [(await http.post("/completion", json={"prompt": "a", "n_predict": 1})).status_code for _ in range(3)]
    assert statuses == [500, 500, 200]


@pytest.mark.parametrize(
    ("prompt", "most", "end"),
    [
        ("say <out:3>", 9, (3, "eos")),
        ("say <out:9>", 4, (4, "limit")),
        ("<out:0>", 4, (0, "eos")),
        ("a", 2, (2, "limit")),
    ],
)
async def test_prompt_says_how_long_its_answer_shall_be(
    fake: FakeEngine, http: httpx.AsyncClient, prompt: str, most: int, end: tuple[int, str]
) -> None:
    answer = (await http.post("/completion", json={"prompt": prompt, "n_predict": most, "seed": 1})).json()
    assert (answer["tokens_predicted"], answer["stop_type"]) == end
    assert answer["content"] == "".join(fake.expected_tokens(prompt, 1, most))


async def test_answer_that_was_broken_off_is_continued_with_the_tokens_that_it_would_have_had(
    fake: FakeEngine, http: httpx.AsyncClient
) -> None:
    prompt = "a b <out:12>"
    whole = fake.expected_tokens(prompt, 7, 100)
    assert len(whole) == 12
    for cut in (1, 5, 12):
        body = {"prompt": prompt + "".join(whole[:cut]), "n_predict": 50, "seed": 7}
        answer = (await http.post("/completion", json=body)).json()
        assert answer["content"] == "".join(whole[cut:])


async def test_generation_takes_the_time_that_its_rates_say(http: httpx.AsyncClient, fake: FakeEngine) -> None:
    rates = {"overhead_s": 0.02, "prefill_token_s": 0.002, "decode_token_s": 0.004, "tokens_per_segment": 8}
    await http.post("/_fake", json=rates)
    prompt = " ".join(["word"] * 29) + " <out:20>"
    await http.post("/completion", json={"prompt": prompt, "n_predict": 99, "stream": True, "return_progress": True})
    seen = fake.last
    assert (seen.prompt_tokens, seen.tokens_sent) == (30, 20)
    assert seen.ended_at is not None
    took_s = seen.ended_at - seen.arrived_at
    assert 0.02 + 30 * 0.002 + 20 * 0.004 <= took_s + 0.002 < 0.66


async def test_process_announces_itself_and_obeys_its_admin_path() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llorch.testing.fake_engine"),
        *("--port", "0", "--slots", "3", "--token-interval-ms", "1", "--dialects", "llamacpp"),
        *("--overhead-ms", "1", "--prefill-token-ms", "0.1", "--decode-token-ms", "0.1", "--can-erase", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    announced = json.loads(await process.stdout.readline())
    assert announced["event"] == "listening"
    async with httpx.AsyncClient(base_url=announced["url"], trust_env=False) as http:
        assert (await http.get("/props")).json()["total_slots"] == 3
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 404
        assert (await http.post("/slots/0?action=erase", json={})).status_code == 501
        await http.post("/_fake", json={"can_erase": True})
        assert (await http.post("/slots/0?action=erase", json={})).status_code == 200
        assert (await http.post("/slots/3?action=erase", json={})).status_code == 400
        await http.post("/_fake", json={"set": {"eos_after": 1}})
        answer = (await http.post("/completion", json={"prompt": "a", "n_predict": 9})).json()
        assert (answer["stop_type"], answer["tokens_predicted"]) == ("eos", 1)
        report = (await http.get("/_fake?requests=1")).json()
        assert report["states"] == {"finished": 1}
        assert report["requests"][0]["prompt"] == "a"
        assert (await http.post("/_fake", json={"reset": True})).json()["generations"] == 0
    process.terminate()
    assert await process.wait() == 0
