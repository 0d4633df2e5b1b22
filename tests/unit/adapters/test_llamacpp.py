"""The llama.cpp client: what only a server that fails on demand can show. The rest is in tests/conformance."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from llorch.adapters.http import Timeouts
from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.errors import DecodeTimeout, InvalidParams, LlorchError, PoolUnready, WorkerReset
from llorch.service.ports import Completed, Generation, Message, Sampling, Usage
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


class Taken:
    """What a generation handed out: the tokens, and how they came together."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.is_first_there = asyncio.Event()

    def __call__(self, tokens: Sequence[str]) -> None:
        self.batches.append(list(tokens))
        self.is_first_there.set()

    @property
    def tokens(self) -> list[str]:
        return [token for batch in self.batches for token in batch]


async def tokens_of(engine: LlamaCppEngine, order: Generation = ORDER) -> list[str]:
    taken = Taken()
    await engine.generate(order, taken)
    return taken.tokens


async def test_only_what_was_asked_for_is_sent(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    await tokens_of(engine)
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
    await tokens_of(engine, order)
    body = fake.last.body
    assert (body["temperature"], body["top_p"], body["top_k"], body["stop"]) == (0.0, 0.5, 3, ["zz"])
    assert (body["grammar"], body["json_schema"]) == ('root ::= "x"', {"type": "object"})
    assert (body["seed"], body["id_slot"], body["cache_prompt"]) == (0, 3, True)


async def test_last_word_has_the_reason_and_the_usage(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    taken = Taken()
    completed = await engine.generate(ORDER, taken)
    assert taken.tokens == fake.expected_tokens("a b c", 1, 5)
    assert completed == Completed("length", Usage(3, 5, 0))


async def test_model_that_ends_by_itself_is_stop(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(eos_after=2)
    taken = Taken()
    assert await engine.generate(ORDER, taken) == Completed("stop", Usage(3, 2, 0))
    assert len(taken.tokens) == 2


@pytest.mark.parametrize("cut", [1, 3, 6, 30, 90])
async def test_events_are_joined_over_segments(fake: FakeEngine, engine: LlamaCppEngine, cut: int) -> None:
    fake.faults = Faults(split_at=(cut, cut + 1))
    assert await tokens_of(engine) == fake.expected_tokens("a b c", 1, 5)


async def test_tokens_of_one_segment_are_handed_out_at_once_and_together(
    fake: FakeEngine, engine: LlamaCppEngine
) -> None:
    fake.faults = Faults(hold=True)
    fake.tokens_per_segment = 2
    taken = Taken()
    run = asyncio.create_task(engine.generate(ORDER, taken))
    await fake.wait_until(lambda: fake.running == 1)
    fake.release(2)
    await asyncio.wait_for(taken.is_first_there.wait(), 5)
    assert taken.batches == [fake.expected_tokens("a b c", 1, 2)]
    fake.release(3)
    await run


async def test_prefill_progress_is_a_sign_of_life_and_no_token(fake: FakeEngine) -> None:
    fake.prefill_interval_s = 0.06
    patient = LlamaCppEngine(fake.url, timeouts=Timeouts(first_byte_s=0.25, idle_s=0.25))
    taken = Taken()
    await patient.generate(Generation("word " * 400, 1, 1, strict=True), taken)
    assert [len(batch) for batch in taken.batches] == [1]
    await patient.aclose()


async def test_connection_is_reused_from_task_to_task(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    for _ in range(5):
        await tokens_of(engine)
    assert fake.connections_made == 1


@pytest.mark.parametrize("sent", [0, 3])
async def test_end_of_the_connection_without_an_end_is_worker_reset(
    fake: FakeEngine, engine: LlamaCppEngine, sent: int
) -> None:
    fake.faults = Faults(close_after=sent)
    taken = Taken()
    with pytest.raises(WorkerReset):
        await engine.generate(ORDER, taken)
    assert taken.tokens == fake.expected_tokens("a b c", 1, sent)


async def test_error_in_mid_stream_is_worker_reset(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(error_after=2)
    with pytest.raises(WorkerReset, match="told to fail"):
        await tokens_of(engine)


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
        await tokens_of(engine)
    assert caught.value.engine == "llamacpp"
    fake.faults = Faults()
    assert await tokens_of(engine)


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
    assert (facts.slots, facts.ctx_per_slot, await engine.read_load()) == (None, None, None)
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


async def test_nothing_is_handed_out_after_a_cancel(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(hold=True)
    taken = Taken()
    run = asyncio.create_task(engine.generate(ORDER, taken))
    await fake.wait_until(lambda: fake.running == 1)
    fake.release(2)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    count = len(taken.tokens)
    await fake.wait_until(lambda: fake.running == 0)
    assert len(taken.tokens) == count
    assert fake.last.state == "cancelled"


async def test_consumer_that_fails_ends_the_generation_and_closes_its_connection(
    fake: FakeEngine, engine: LlamaCppEngine
) -> None:
    def refuse(_tokens: Sequence[str]) -> None:
        raise RuntimeError("no room")

    fake.faults = Faults(silent_after=1)
    with pytest.raises(RuntimeError, match="no room"):
        await engine.generate(ORDER, refuse)
    await fake.wait_until(lambda: fake.last.state == "cancelled")


async def test_slot_is_released_when_the_engine_has_let_go_of_it(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    fake.faults = Faults(hold=True, slow_abort_s=0.2)
    run = asyncio.create_task(engine.generate(ORDER, Taken()))
    await fake.wait_until(lambda: fake.running == 1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert fake.running == 1
    await engine.wait_released(0)
    assert fake.running == 0
    assert (fake.last.slot_freed_at or 0.0) - (fake.last.ended_at or 0.0) > 0.19


async def test_slot_of_an_engine_that_is_gone_counts_as_released(fake: FakeEngine, engine: LlamaCppEngine) -> None:
    await fake.aclose()
    await engine.wait_released(0)


async def test_cancelling_one_generation_leaves_its_neighbour_alone_peer_bug_01(
    fake: FakeEngine, engine: LlamaCppEngine
) -> None:
    fake.slots = 2
    fake.faults = Faults(hold=True)
    first = asyncio.create_task(tokens_of(engine))
    await fake.wait_until(lambda: fake.running == 1)
    neighbour = asyncio.create_task(tokens_of(engine))
    await fake.wait_until(lambda: fake.running == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await fake.wait_until(lambda: fake.running == 1)
    fake.release(5)
    assert await neighbour == fake.expected_tokens("a b c", 1, 5)
    assert [seen.state for seen in fake.seen] == ["cancelled", "finished"]


@pytest.mark.parametrize("seed", [-1, 4294967295])
async def test_seed_that_llamacpp_would_not_obey_opens_no_connection(
    fake: FakeEngine, engine: LlamaCppEngine, seed: int
) -> None:
    with pytest.raises(InvalidParams, match="seeds"):
        await tokens_of(engine, Generation("a", 1, seed, strict=True))
    assert fake.connections_made == 0


async def test_counting_a_long_prompt_does_not_hold_up_the_loop_peer_bug_14() -> None:
    """The engine tokenizes: with it in a process of its own, 2 MB of prompt are a fraction of a second of ours."""
    text = "word " * 400_000
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llorch.testing.fake_engine", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    engine = LlamaCppEngine(json.loads(await process.stdout.readline())["url"])
    start = time.process_time()
    assert await engine.count_tokens(text) == 400_000
    assert time.process_time() - start < 0.25
    await engine.aclose()
    process.terminate()
    assert await process.wait() == 0


async def test_messages_with_lone_surrogates_are_invalid_params(engine: LlamaCppEngine) -> None:
    with pytest.raises(InvalidParams, match="surrogates"):
        await engine.render_messages([Message("user", "\udcff")])
