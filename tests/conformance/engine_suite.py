"""What every engine client has to keep of the Engine port, whatever server is behind it (ORCH-3054..3058).

A subclass gives a `target`; the suite speaks to it over real sockets. What an engine does in its own time is waited
for by asking the engine, with a bound.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
import pytest_asyncio

from llorch.adapters.http import Timeouts
from llorch.adapters.llamacpp import SEED_MAX, LlamaCppEngine
from llorch.errors import DeterminismViolation, InvalidParams, WorkerReset
from llorch.service.ports import Completed, Engine, Generation, Message, Sampling

CTX = 2048
LONG_PROMPT = "word " * 1500
ENDLESS = 100_000


@dataclass(frozen=True, slots=True)
class Target:
    """A running server with one slot of CTX tokens, and how to kill it."""

    url: str
    api_key: str | None
    kill: Callable[[], Awaitable[None]]

    def connect(self, timeouts: Timeouts | None = None) -> LlamaCppEngine:
        """A client of this server; the caller closes it."""
        return LlamaCppEngine(self.url, api_key=self.api_key, timeouts=timeouts)


def order(
    prompt: str = "Once upon a time",
    *,
    max_tokens: int = 12,
    seed: int = 7,
    strict: bool = True,
    sampling: Sampling | None = None,
) -> Generation:
    """A generation with what a test does not care about filled in."""
    return Generation(prompt=prompt, max_tokens=max_tokens, seed=seed, strict=strict, sampling=sampling or Sampling())


async def collect(engine: Engine, generation: Generation) -> tuple[list[str], Completed]:
    """Run a generation to its end: its tokens, and the engine's last word."""
    tokens: list[str] = []
    completed = await engine.generate(generation, tokens.extend)
    return tokens, completed


class Run:
    """A generation under way."""

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self.tokens: list[str] = []
        self._has_token = asyncio.Event()
        self.task = asyncio.create_task(self._run(engine, generation))

    async def _run(self, engine: Engine, generation: Generation) -> Completed:
        return await engine.generate(generation, self._take)

    def _take(self, tokens: Sequence[str]) -> None:
        assert tokens, "the engine handed out nothing"
        self.tokens += tokens
        self._has_token.set()

    async def first_token(self) -> str:
        """The first token; raises what the generation raised when it ended without one."""
        waiting = asyncio.create_task(self._has_token.wait())
        await asyncio.wait((waiting, self.task), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self.tokens:
            await self.task
        return self.tokens[0]

    async def cancel(self) -> None:
        """Cancel it; nothing may come afterwards."""
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def busy_slots(engine: LlamaCppEngine) -> int:
    load = await engine.read_load()
    assert load is not None
    assert load.kv_usage is None or 0 <= load.kv_usage <= 1
    return load.busy_slots


async def wait_idle(engine: LlamaCppEngine, bound_s: float = 10.0) -> float:
    """Seconds until the engine says that no slot is busy; TimeoutError after the bound."""
    start = time.monotonic()
    async with asyncio.timeout(bound_s):
        while await busy_slots(engine):
            pass
    return time.monotonic() - start


class EngineSuite:
    """The promises. `engine` is a client of `target`; `victim` is a target that a test may kill."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def engine(self, target: Target) -> AsyncIterator[LlamaCppEngine]:
        engine = target.connect()
        await wait_idle(engine)
        yield engine
        await engine.aclose()

    async def test_healthy_engine_passes_the_health_check(self, engine: LlamaCppEngine) -> None:
        await engine.check_health()

    async def test_facts_tell_slots_and_context_and_never_invent_a_version(self, engine: LlamaCppEngine) -> None:
        facts = await engine.read_facts()
        assert facts.slots == 1
        assert facts.ctx_per_slot == CTX
        assert facts.model_name == "conformance"
        assert facts.engine_version is None
        assert facts.model_digest is None
        assert {"grammar", "json_schema", "tokenize", "chat_template", "slots"} <= facts.features

    async def test_generation_ends_at_max_tokens_with_usage(self, engine: LlamaCppEngine) -> None:
        prompt = "Once upon a time"
        tokens, completed = await collect(engine, order(prompt, max_tokens=12))
        assert completed.finish_reason == "length"
        assert 0 < len(tokens) <= 12
        assert all(tokens)
        assert completed.usage.completion_tokens == 12
        assert completed.usage.prompt_tokens == await engine.count_tokens(prompt)
        assert completed.usage.cached_tokens == 0

    async def test_same_seed_gives_the_same_tokens_and_another_seed_others(self, engine: LlamaCppEngine) -> None:
        first, _ = await collect(engine, order(seed=1))
        again, _ = await collect(engine, order(seed=1))
        other, _ = await collect(engine, order(seed=2))
        assert first == again
        assert first != other

    async def test_stop_sequence_ends_the_text_before_it(self, engine: LlamaCppEngine) -> None:
        tokens, _ = await collect(engine, order(max_tokens=24))
        text = "".join(tokens)
        stop = next(token.strip() for token in tokens[4:] if len(token.strip()) > 2)
        kept, completed = await collect(engine, order(max_tokens=24, sampling=Sampling(stop=(stop,))))
        assert "".join(kept) == text[: text.index(stop)]
        assert completed.finish_reason == "stop_sequence"

    @pytest.mark.parametrize("seed", [0, SEED_MAX])
    async def test_seeds_at_the_limits_are_repeatable(self, engine: LlamaCppEngine, seed: int) -> None:
        first, _ = await collect(engine, order(seed=seed))
        again, _ = await collect(engine, order(seed=seed))
        assert first == again

    @pytest.mark.parametrize("seed", [-1, SEED_MAX + 1, 2**32])
    async def test_seeds_beyond_the_limits_are_refused(self, engine: LlamaCppEngine, seed: int) -> None:
        with pytest.raises(InvalidParams, match="seeds from 0 to 4294967294") as caught:
            await collect(engine, order(seed=seed))
        assert caught.value.engine == "llamacpp"

    async def test_bad_grammar_is_invalid_params(self, engine: LlamaCppEngine) -> None:
        with pytest.raises(InvalidParams, match="grammar") as caught:
            await collect(engine, order(sampling=Sampling(grammar="root ::= ((")))
        assert caught.value.engine == "llamacpp"
        await wait_idle(engine)

    async def test_prompt_longer_than_the_context_is_invalid_params(self, engine: LlamaCppEngine) -> None:
        with pytest.raises(InvalidParams) as caught:
            await collect(engine, order("word " * 3000))
        assert caught.value.details is not None
        assert caught.value.details["n_ctx"] == CTX
        assert caught.value.details["n_prompt_tokens"] >= 3000

    async def test_lone_surrogates_are_invalid_params(self, engine: LlamaCppEngine) -> None:
        with pytest.raises(InvalidParams, match="surrogates"):
            await engine.count_tokens("\ud800")
        with pytest.raises(InvalidParams, match="surrogates"):
            await collect(engine, order("\ud800"))

    async def test_empty_prompt_ends_without_tokens(self, engine: LlamaCppEngine) -> None:
        tokens, completed = await collect(engine, order(""))
        assert tokens == []
        assert completed.finish_reason == "stop"

    async def test_tokens_are_counted(self, engine: LlamaCppEngine) -> None:
        assert await engine.count_tokens("one two three") == 3
        assert await engine.count_tokens("") == 0

    async def test_messages_are_rendered_by_the_template(self, engine: LlamaCppEngine) -> None:
        prompt = await engine.render_messages([Message("system", "Be brief."), Message("user", "How are you?")])
        assert prompt.index("Be brief.") < prompt.index("How are you?")
        assert prompt.endswith("<|im_start|>assistant\n")

    async def test_cancelling_while_decoding_frees_the_slot(self, engine: LlamaCppEngine) -> None:
        run = Run(engine, order(max_tokens=ENDLESS))
        await run.first_token()
        assert await busy_slots(engine) == 1
        await run.cancel()
        count = len(run.tokens)
        assert await wait_idle(engine) < 2.0
        assert len(run.tokens) == count

    async def test_cancelling_during_prefill_frees_the_slot(self, engine: LlamaCppEngine) -> None:
        run = Run(engine, order(LONG_PROMPT))
        async with asyncio.timeout(5):
            while not await busy_slots(engine):
                pass
        assert run.tokens == []
        await run.cancel()
        assert await wait_idle(engine) < 3.0

    async def test_released_slot_is_idle(self, engine: LlamaCppEngine) -> None:
        run = Run(engine, order(max_tokens=ENDLESS))
        await run.first_token()
        await run.cancel()
        await engine.wait_released(0)
        assert await busy_slots(engine) == 0

    async def test_consumer_that_raises_ends_the_generation_and_frees_the_slot(self, engine: LlamaCppEngine) -> None:
        seen: list[str] = []

        def refuse(tokens: Sequence[str]) -> None:
            seen.extend(tokens)
            raise DeterminismViolation

        assert engine.can_interrupt
        with pytest.raises(DeterminismViolation):
            await engine.generate(order(max_tokens=ENDLESS), refuse)
        count = len(seen)
        await engine.wait_released(0)
        assert await busy_slots(engine) == 0
        assert len(seen) == count

    async def test_text_so_far_can_be_continued(self, engine: LlamaCppEngine) -> None:
        tokens, _ = await collect(engine, order(max_tokens=8, strict=False))
        more, completed = await collect(engine, order("Once upon a time" + "".join(tokens), max_tokens=4, strict=False))
        assert 0 < len(more) <= 4
        assert completed.usage.completion_tokens == 4

    async def test_erasing_a_slot_that_is_not_there_is_false_and_no_error(self, engine: LlamaCppEngine) -> None:
        assert await engine.erase(7) is False

    async def test_slot_works_after_an_erase_whatever_came_of_it(self, engine: LlamaCppEngine) -> None:
        assert await engine.erase(0) in (True, False)
        tokens, _ = await collect(engine, order())
        assert tokens

    async def test_strict_generation_reuses_no_prefix(self, engine: LlamaCppEngine) -> None:
        _, cold = await collect(engine, order(LONG_PROMPT, max_tokens=2, strict=True))
        _, again = await collect(engine, order(LONG_PROMPT, max_tokens=2, strict=True))
        assert cold.usage.cached_tokens == again.usage.cached_tokens == 0

    async def test_engine_killed_while_decoding_is_worker_reset(self, victim: Target) -> None:
        engine = victim.connect()
        run = Run(engine, order(max_tokens=ENDLESS))
        await run.first_token()
        await victim.kill()
        with pytest.raises(WorkerReset) as caught:
            await run.task
        assert caught.value.engine == "llamacpp"
        with pytest.raises(WorkerReset, match="cannot be reached"):
            await engine.check_health()
        await engine.wait_released(0)
        assert await engine.erase(0) is False
        await engine.aclose()
