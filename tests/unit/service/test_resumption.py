"""A task that was broken off goes on: its reader sees every token once, in order, or a typed end."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain import events as ev
from llorch.domain.task import Attempt, Fault
from llorch.errors import DeterminismViolation, WorkerReset
from llorch.service.ports import Sampling, Usage
from llorch.service.prompts import unchecked_prompt
from llorch.service.records import Record
from llorch.service.runner import Runner
from llorch.testing.clock import VirtualTimeLoop
from llorch.testing.engine import FakeEnginePort, FakeGeneration
from tests.unit.service.house import TENANT, parse, route, settle, submission

PROMPT = "once upon a time"


class Desk:
    """A task's record, one engine, and the events that its attempts post."""

    def __init__(self, *, strict: bool, max_tokens: int = 16, sampling: Sampling | None = None) -> None:
        asked = submission(prompt=PROMPT, strict=strict, max_tokens=max_tokens, sampling=sampling or Sampling())
        where = route()
        self.record = Record(asked, where, 7, "c", 0.0, unchecked_prompt(asked, where))
        self.engine = FakeEnginePort()
        self.runner = Runner({"r": self.engine}.__getitem__)
        self.events: list[ev.Event] = []
        self.attempts = 0
        self.replayed = 0

    def begin(self) -> "asyncio.Task[Fault | None]":
        """The next attempt, as the scheduler would start it."""
        self.attempts += 1
        attempt = Attempt(self.attempts, (TENANT, "t"), "r", 0, 0.0, tokens_before=self.record.stream.tokens)
        run = asyncio.create_task(self.runner.run(self.record, attempt, lambda _, event: self.events.append(event)))
        run.add_done_callback(self._note_replayed)
        return run

    def _note_replayed(self, _: object) -> None:
        self.replayed += self.record.replayed
        self.record.replayed = 0

    async def generation(self) -> FakeGeneration:
        """What the newest attempt asked of the engine."""
        await settle()
        return self.engine.generations[-1]

    async def cut(self, run: "asyncio.Task[Fault | None]") -> None:
        """Break the attempt off."""
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert self.engine.generations[-1].is_closed

    def texts(self) -> list[str]:
        """What a reader got; ids and indices are checked to have no gap."""
        frames = self.record.stream.frames
        parsed = [parse(frame)[1] for frame in frames]
        assert [data["i"] for data in parsed] == list(range(len(frames)))
        assert [frame.split(b"\n")[0] for frame in frames] == [b"id: %d" % (n + 1) for n in range(len(frames))]
        return [data["t"] for data in parsed]

    def counted(self) -> int:
        """Tokens that the scheduler was told of."""
        return sum(event.count for event in self.events if isinstance(event, ev.TokensProduced))


def grouped(tokens: list[str], sizes: Iterator[int]) -> Iterator[list[str]]:
    """The tokens as they arrive, some of them together."""
    at = 0
    while at < len(tokens):
        size = next(sizes, 1)
        yield tokens[at : at + size]
        at += size


@given(
    texts=st.lists(st.text(min_size=1, max_size=3), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    sizes=st.lists(st.integers(1, 7), max_size=60),
    strict=st.booleans(),
)
def test_reader_sees_every_token_once_wherever_the_task_was_broken_off(
    texts: list[str], cuts: list[int], sizes: list[int], strict: bool
) -> None:
    """ORCH-3086: also before the first token, exactly at the end, several times, and in the midst of a group."""

    async def play() -> None:
        desk = Desk(strict=strict, max_tokens=max(1, len(texts)))
        arriving = iter(sizes)
        swallowed = 0
        for stop in [*sorted(cuts), None]:
            before = desk.record.stream.tokens
            run = desk.begin()
            await settle()
            if not strict and before == desk.record.submission.max_tokens:
                assert await run is None  # nothing was left to ask for
                break
            generation = await desk.generation()
            coming = texts if strict else texts[before:]
            if strict or not before:
                assert generation.order.prompt == PROMPT
            else:
                assert generation.order.prompt == PROMPT + "".join(texts[:before])
                assert generation.order.max_tokens == desk.record.submission.max_tokens - before
            for group in grouped(coming, arriving):
                if stop is not None and desk.record.stream.tokens >= stop:
                    break
                generation.send(*group)
                swallowed += min(len(group), max(0, before - (len(generation.sent) - len(group)))) if strict else 0
            if stop is not None:
                await desk.cut(run)
                continue
            generation.finish("stop")
            assert await run is None
        await settle()
        assert desk.texts() == texts
        assert desk.counted() == len(texts)
        assert desk.replayed == swallowed
        completed = desk.record.completed
        assert completed is not None
        assert completed.usage.completion_tokens == len(texts)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(play())


@pytest.mark.parametrize("replayed", [["a", "X", "c", "d"], ["a", "X", "b", "c", "d"], ["a", "b", "cc"], ["X"]])
@pytest.mark.parametrize("together", [True, False])
async def test_replay_that_differs_ends_the_task_and_sends_nothing_of_its_own(
    replayed: list[str], together: bool
) -> None:
    """ORCH-3087."""
    desk = Desk(strict=True)
    run = desk.begin()
    (await desk.generation()).send("a", "b", "c")
    await desk.cut(run)
    run = desk.begin()
    generation = await desk.generation()
    for group in [replayed] if together else [[text] for text in replayed]:
        generation.send(*group)
    generation.send("later")
    fault = await run
    assert fault is not None
    assert fault.kind is DeterminismViolation
    assert desk.texts() == ["a", "b", "c"]
    assert desk.engine.released == [0, 0]  # the second one was broken off, too
    assert desk.record.completed is None


async def test_replay_that_ends_early_differs_too() -> None:
    desk = Desk(strict=True)
    run = desk.begin()
    (await desk.generation()).send("a", "b", "c")
    await desk.cut(run)
    run = desk.begin()
    generation = await desk.generation()
    generation.send("a", "b")
    generation.finish()
    fault = await run
    assert fault is not None
    assert (fault.kind, desk.replayed) == (DeterminismViolation, 2)


async def test_replayed_tokens_are_told_to_nobody_and_metered_apart() -> None:
    """ORCH-3087."""
    desk = Desk(strict=True)
    run = desk.begin()
    (await desk.generation()).send("a", "b", "c")
    await desk.cut(run)
    desk.events.clear()
    run = desk.begin()
    generation = await desk.generation()
    generation.send("a", "b")
    generation.send("c")
    assert desk.events == []
    generation.send("d")
    assert desk.events == [ev.FirstToken((TENANT, "t"), 2)]
    generation.finish()
    await run
    assert (desk.counted(), desk.replayed) == (1, 3)


async def test_usage_of_a_continued_task_is_that_of_the_whole_task() -> None:
    desk = Desk(strict=False)
    run = desk.begin()
    (await desk.generation()).send("a", "b")
    await desk.cut(run)
    run = desk.begin()
    generation = await desk.generation()
    generation.send("c")
    generation.finish("stop")
    await run
    completed = desk.record.completed
    assert completed is not None
    assert completed.finish_reason == "stop"
    assert completed.usage == Usage(prompt_tokens=4, completion_tokens=3, cached_tokens=None)


async def test_best_effort_task_that_was_cut_at_its_last_token_needs_no_engine() -> None:
    desk = Desk(strict=False, max_tokens=2)
    run = desk.begin()
    (await desk.generation()).send("a", "b")
    await desk.cut(run)
    assert await desk.begin() is None
    assert len(desk.engine.generations) == 1
    assert desk.record.completed is not None
    assert desk.record.completed.finish_reason == "length"


async def test_resumption_on_a_failing_replica_can_be_resumed_again() -> None:
    desk = Desk(strict=False)
    run = desk.begin()
    (await desk.generation()).send("a")
    await desk.cut(run)
    desk.engine.tokenizer = WorkerReset("gone")
    fault = await desk.begin()
    assert fault is not None
    assert fault.kind is WorkerReset
    desk.engine.tokenizer = None
    run = desk.begin()
    generation = await desk.generation()
    generation.send("b")
    generation.finish()
    assert await run is None
    assert desk.texts() == ["a", "b"]


async def test_first_run_hands_its_tokens_straight_to_the_stream() -> None:
    """Nothing stands between engine and stream unless tokens have to be compared."""
    for strict in (True, False):
        desk = Desk(strict=strict)
        run = desk.begin()
        generation = await desk.generation()
        assert generation._on_tokens == desk.record.stream.append_tokens
        generation.send("a")
        await desk.cut(run)
        run = desk.begin()
        generation = await desk.generation()
        assert (generation._on_tokens == desk.record.stream.append_tokens) is not strict
        await desk.cut(run)
