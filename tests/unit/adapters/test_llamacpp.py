"""The llama.cpp client: what only a server that fails on demand can show. The rest is in tests/conformance."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from llorch.adapters.http import Timeouts
from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.errors import Canceled, DecodeTimeout, InvalidParams, LlorchError, PoolUnready, WorkerReset
from llorch.service.ports import Batch, Completed, Generation, Message, Sampling, Usage
from llorch.testing.fake_engine import FakeEngine, Faults

ORDER = Generation(prompt="a b c", max_tokens=5, seed=1, strict=True)


@pytest.fixture
async def fake() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as fake:
        yield fake


@pytest.fixture
async def engine(fake: FakeEngine) -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(fake.url)
    yield engine
    await engine.aclose()


async def collect(stream: AsyncIterator[Batch]) -> list[Batch]:
    return [batch async for batch in stream]


def tokens_of(batches: list[Batch]) -> list[str]:
    return [token for batch in batches for token in batch.tokens]


async def test_only_what_was_asked_for_is_sent(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    await collect(engine.generate(ORDER))
    body = dict(fake.last.body)
    assert body.pop("response_fields")
    assert body == {
        "prompt": "a b c",
        "n_predict": 5,
        "seed": 1,
        "id_slot": 0,
        "stream": True,
        "return_progress": True,
        "cache_prompt": False,
    }


async def test_sampling_parameters_are_passed_on(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    sampling = Sampling(
        temperature=0.0, top_p=0.5, top_k=3, stop=("zz",), grammar='root ::= "x"', json_schema={"type": "object"}
    )
    order = Generation(prompt="a", max_tokens=2, seed=0, strict=False, slot=3, sampling=sampling)
    await collect(engine.generate(order))
    body = fake.last.body
    assert (body["temperature"], body["top_p"], body["top_k"], body["stop"]) == (0.0, 0.5, 3, ["zz"])
    assert (body["grammar"], body["json_schema"]) == ('root ::= "x"', {"type": "object"})
    assert (body["seed"], body["id_slot"], body["cache_prompt"]) == (0, 3, True)


async def test_last_batch_has_the_end_and_the_usage(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    batches = await collect(engine.generate(ORDER))
    assert tokens_of(batches) == fake.expected_tokens("a b c", 1, 5)
    assert batches[-1].completed == Completed("length", Usage(3, 5, 0))
    assert [batch.completed for batch in batches[:-1]] == [None] * (len(batches) - 1)


async def test_model_that_ends_by_itself_is_stop(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(eos_after=2)
    batches = await collect(engine.generate(ORDER))
    assert len(tokens_of(batches)) == 2
    assert batches[-1].completed == Completed("stop", Usage(3, 2, 0))


@pytest.mark.parametrize("cut", [1, 3, 6, 30, 90])
async def test_events_are_joined_over_segments(fake: FakeEngine, engine: LlamaCppEngine, cut: int) -> None:
    fake.faults = Faults(split_at=(cut, cut + 1))
    assert tokens_of(await collect(engine.generate(ORDER))) == fake.expected_tokens("a b c", 1, 5)


async def test_events_of_one_segment_are_one_batch(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(hold=True)
    fake.tokens_per_segment = 2
    stream = engine.generate(ORDER)
    assert await anext(stream) == Batch([])
    fake.release(2)
    assert await anext(stream) == Batch(fake.expected_tokens("a b c", 1, 2))
    await stream.aclose()


async def test_prefill_progress_is_a_sign_of_life(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.prefill_interval_s = 0.06
    patient = LlamaCppEngine(fake.url, timeouts=Timeouts(first_byte_s=0.25, idle_s=0.25))
    batches = await collect(patient.generate(Generation("word " * 400, 1, 1, strict=True)))
    assert sum(batch == Batch([]) for batch in batches) >= 6
    assert len(tokens_of(batches)) == 1
    await patient.aclose()


async def test_connection_is_reused_from_task_to_task(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    for _ in range(5):
        await collect(engine.generate(ORDER))
    assert fake.connections_made == 1


@pytest.mark.parametrize("sent", [0, 3])
async def test_end_of_the_connection_without_an_end_is_worker_reset(
    fake: FakeEngine, engine: LlamaCppEngine, sent: int
) -> None:
    fake.faults = Faults(close_after=sent)
    received: list[str] = []
    with pytest.raises(WorkerReset):
        async for batch in engine.generate(ORDER):
            received += batch.tokens
    assert received == fake.expected_tokens("a b c", 1, sent)


async def test_error_in_mid_stream_is_worker_reset(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(error_after=2)
    with pytest.raises(WorkerReset, match="told to fail"):
        await collect(engine.generate(ORDER))


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": {"code": 400, "message": "no", "type": "invalid_request_error"}}, InvalidParams),
        (401, {"error": {"code": 401, "message": "Invalid API Key"}}, PoolUnready),
        (404, {"error": {"code": 404, "message": "File Not Found"}}, PoolUnready),
        (500, {"error": {"code": 500, "message": "boom"}}, WorkerReset),
        (502, {"unlike": "llama.cpp"}, WorkerReset),
        (503, {"error": {"code": 503, "message": "Loading model"}}, PoolUnready),
    ],
)
async def test_statuses_are_typed_errors(
    fake: FakeEngine, engine: LlamaCppEngine, status: int, body: dict[str, object], error: type[LlorchError]
) -> None:
    fake.faults = Faults(error_status=status, error_body=body)
    with pytest.raises(error) as caught:
        await collect(engine.generate(ORDER))
    assert caught.value.engine == "llamacpp"
    fake.faults = Faults()
    assert tokens_of(await collect(engine.generate(ORDER)))


async def test_wrong_key_is_pool_unready_and_is_not_told(fake: FakeEngine) -> None:
    fake.api_key = "right"
    engine = LlamaCppEngine(fake.url, api_key="wrong-secret")
    with pytest.raises(PoolUnready, match="refused llorch's key") as caught:
        await engine.read_facts()
    assert "secret" not in str(caught.value)
    await engine.aclose()
    engine = LlamaCppEngine(fake.url, api_key="right")
    assert (await engine.read_facts()).slots == 1
    await engine.aclose()


async def test_other_server_is_worker_reset_not_nonsense(fake: FakeEngine) -> None:
    fake.speaks = ("openai",)
    engine = LlamaCppEngine(fake.url)
    facts = await engine.read_facts()
    assert (facts.slots, facts.ctx_per_slot, await engine.count_busy_slots()) == (None, None, None)
    with pytest.raises(PoolUnready):
        await engine.count_tokens("a")
    await engine.aclose()


async def test_probe_of_a_silent_engine_is_decode_timeout(fake: FakeEngine) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    engine = LlamaCppEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeouts=Timeouts(probe_s=0.05))
    with pytest.raises(DecodeTimeout):
        await engine.check_health()
    await engine.aclose()
    server.close()


async def test_closing_from_another_task_ends_the_consumer(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(hold=True)
    stream = engine.generate(ORDER)
    consumer = asyncio.create_task(collect(stream))
    await fake.wait_until(lambda: fake.running == 1)
    await stream.aclose()
    with pytest.raises(Canceled):
        await consumer
    await fake.wait_until(lambda: fake.running == 0)


async def test_cancelling_one_generation_leaves_its_neighbour_alone_peer_bug_01(
    fake: FakeEngine, engine: LlamaCppEngine
) -> None:
    fake.slots = 2
    fake.faults = Faults(hold=True)
    first = asyncio.create_task(collect(engine.generate(ORDER)))
    await fake.wait_until(lambda: fake.running == 1)
    neighbour = asyncio.create_task(collect(engine.generate(ORDER)))
    await fake.wait_until(lambda: fake.running == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await fake.wait_until(lambda: fake.running == 1)
    fake.release(5)
    assert tokens_of(await neighbour) == fake.expected_tokens("a b c", 1, 5)
    assert [seen.state for seen in fake.seen] == ["cancelled", "finished"]


async def test_generation_that_was_never_iterated_opens_nothing(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    stream = engine.generate(ORDER)
    await stream.aclose()
    assert await collect(stream) == []
    assert fake.connections_made == 0


async def test_counting_a_long_prompt_costs_this_process_little_peer_bug_14(
    fake: FakeEngine, engine: LlamaCppEngine
) -> None:
    """The engine shares this loop, so what counts is the processor time of the client's part: 2 MB, 400,000 tokens."""
    text = "word " * 400_000
    body = len(text)
    start = time.process_time()
    assert await engine.count_tokens(text) == 400_000
    with_engine = time.process_time() - start
    start = time.process_time()
    fake_only = len(text.split())
    assert fake_only == 400_000
    assert with_engine < 5.0
    assert body == 2_000_000


async def test_messages_with_lone_surrogates_are_invalid_params(engine: LlamaCppEngine) -> None:
    with pytest.raises(InvalidParams, match="surrogates"):
        await engine.render_messages([Message("user", "\udcff")])
