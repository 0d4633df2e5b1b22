"""Making room, through the whole service: the reader of the task that makes room sees every token once."""

from typing import Any

import pytest

from llorch.domain import events as ev
from llorch.domain.policy import PreemptionPolicy, RoutePolicy
from llorch.domain.task import Priority, TaskState
from llorch.testing.engine import FakeEnginePort, FakeGeneration
from tests.unit.service.house import House, parse_all, settle

HARD = RoutePolicy(preemption=PreemptionPolicy(hard=True))
PROMPT = "once upon a time"


async def begin_batch(house: House, **wishes: Any) -> FakeGeneration:
    await house.submit("b", priority=Priority.BATCH, max_tokens=64, **wishes)
    return await house.engine.generation(0)


async def finish(generation: FakeGeneration, *tokens: str) -> None:
    generation.send(*tokens)
    generation.finish()
    await settle()


async def test_batch_task_makes_room_and_goes_on_where_it_stopped() -> None:
    """ORCH-3085, ORCH-3087."""
    async with House(policy=HARD) as house:
        (await begin_batch(house)).send("a", "b")
        reader = house.follow("b")
        reader.take()
        await house.submit("i")
        interactive = await house.engine.generation(1)
        assert (house.state("b"), house.state("i")) == (TaskState.QUEUED, TaskState.RUNNING)
        assert house.engine.generations[0].is_closed
        assert parse_all(reader.take())[0] == (
            "metrics",
            {"queue_depth": 1, "preempted": True, "resumable": True},
        )
        await finish(interactive, "x")
        resumed = await house.engine.generation(2)
        assert (resumed.order.prompt, resumed.order.max_tokens) == (PROMPT + "ab", 62)
        assert ("metrics", False) in [(name, data.get("preempted")) for name, data in parse_all(reader.take())]
        await finish(resumed, "c", "d")
        await house.dispatcher.wait_idle()
        assert house.codes("b") == ["started", "token", "token", "token", "token", "end"]
        frames = house.read_all("b")
        assert [(data["t"], data["i"]) for name, data in frames if name == "token"] == [
            ("a", 0),
            ("b", 1),
            ("c", 2),
            ("d", 3),
        ]
        assert frames[-1][1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "cached_tokens": None}
        assert house.tasks.get("acme", "b").timeline.preemptions == 1
        counts = [e.count for e in house.telemetry.events(ev.TokensProduced) if e.task[1] == "b"]
        assert sum(counts) == 4
        assert house.ledger.leases() == []


async def test_strict_batch_task_is_replayed_and_its_replay_is_metered_apart() -> None:
    """ORCH-3087, ORCH-3157."""
    async with House(policy=HARD) as house:
        (await begin_batch(house, strict=True)).send("a", "b")
        await house.submit("i")
        await finish(await house.engine.generation(1))
        replay = await house.engine.generation(2)
        assert (replay.order.prompt, replay.order.max_tokens) == (PROMPT, 64)
        await finish(replay, "a", "b", "c")
        await house.dispatcher.wait_idle()
        assert house.codes("b") == ["started", "token", "token", "token", "end"]
        assert [count for _, count in house.telemetry.replayed] == [2]
        counts = [e.count for e in house.telemetry.events(ev.TokensProduced) if e.task[1] == "b"]
        assert sum(counts) == 3


async def test_strict_task_whose_replay_differs_ends_in_a_violation() -> None:
    async with House(policy=HARD) as house:
        (await begin_batch(house, strict=True)).send("a", "b")
        await house.submit("i")
        await finish(await house.engine.generation(1))
        (await house.engine.generation(2)).send("a", "X", "c")
        await house.dispatcher.wait_idle()
        assert house.codes("b") == ["started", "token", "token", "error DETERMINISM_VIOLATION"]
        assert house.engine.generations[2].is_closed
        assert house.ledger.leases() == []


async def test_task_that_is_cancelled_while_it_makes_room_ends_and_does_not_come_back() -> None:
    async with House(policy=HARD) as house:
        (await begin_batch(house)).send("a")
        house.engine.releasing.shut()
        await house.submit("i")
        await settle()
        await house.tasks.cancel("acme", "b")
        house.engine.releasing.open()
        await finish(await house.engine.generation(1))
        await house.dispatcher.wait_idle()
        assert house.codes("b") == ["started", "token", "error CANCELED"]
        assert len(house.engine.generations) == 2


async def test_end_that_met_the_order_to_make_room_is_found_again() -> None:
    """The engine's last word is lost with the attempt; the task goes on behind all that it had and ends."""
    async with House(policy=HARD) as house:
        generation = await begin_batch(house)
        generation.send("a")
        generation.finish()
        await house.submit("i")
        await finish(await house.engine.generation(1))
        resumed = await house.engine.generation(2)
        assert resumed.order.prompt == PROMPT + "a"
        await finish(resumed)
        await house.dispatcher.wait_idle()
        assert house.codes("b") == ["started", "token", "end"]


@pytest.mark.parametrize("can_interrupt", [True, False])
async def test_only_an_engine_that_can_be_interrupted_is(can_interrupt: bool) -> None:
    """ORCH-3085."""
    engine = FakeEnginePort()
    engine.can_interrupt = can_interrupt
    async with House(engine, policy=HARD) as house:
        (await begin_batch(house)).send("a")
        await house.submit("i")
        await settle()
        assert house.engine.generations[0].is_closed is can_interrupt
