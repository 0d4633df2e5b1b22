"""What readers are told of the moment: of waiting, of making room, and no more often than they need to hear it."""

import asyncio
from collections.abc import Callable

from llorch.domain import events as ev
from llorch.domain.faults import PREEMPTED
from llorch.domain.task import Affinity, Budgets, Estimate, Fault, Priority, Task
from llorch.errors import WorkerReset
from llorch.service.advice import ADVICE_INTERVAL_S
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import House, parse_all

Prediction = tuple[Estimate | None, float | None]


def predict(house: House, *, wait_s: Callable[[float], float], on_time: float | None = None) -> list[Task]:
    """Let the scheduler predict this, by the time of its clock; returns the tasks that it is asked about."""
    asked: list[Task] = []

    def predicted(task: Task, now: float) -> Prediction:
        asked.append(task)
        return Estimate(wait_s(now), 1.0), on_time

    house.scheduler.predict = predicted  # type: ignore[method-assign]
    return asked


async def stir(house: House, seconds: float = ADVICE_INTERVAL_S + 0.1) -> None:
    """Something happens on the route, and time passes."""
    await house.submit(f"other at {house.clock.monotonic()}", priority=Priority.BATCH)
    await asyncio.sleep(seconds)


async def test_waiting_reader_hears_where_it_stands_and_when_it_starts() -> None:
    """ORCH-2011, ORCH-3029."""
    async with House() as house:
        await house.submit("running")
        await house.submit("a")
        predict(house, wait_s=lambda _: 4.0)
        assert parse_all(house.follow("a").take()) == [
            ("queued", {"queue_position": 0, "predicted_start_ms": 4000, "reason": "slots_busy"})
        ]


async def test_prediction_is_told_again_when_it_moved_and_not_for_less() -> None:
    async with House() as house:
        await house.submit("running")
        await house.submit("a")
        begun = house.clock.monotonic()
        predict(house, wait_s=lambda now: begun + 60.0 - now)
        reader = house.follow("a")
        assert len(parse_all(reader.take())) == 1
        await stir(house)
        assert reader.take() == b""  # the start has come nearer as foretold
        predict(house, wait_s=lambda _: 90.0)
        await stir(house)
        [(_, queued)] = parse_all(reader.take())
        assert queued["predicted_start_ms"] == 90_000


async def test_chance_to_be_in_time_and_budgets_come_beside_the_place() -> None:
    """ORCH-3081, ORCH-3099."""
    async with House() as house:
        await house.submit("running")
        await house.submit("a", deadline_ms=60_000)
        predict(house, wait_s=lambda _: 4.0, on_time=0.98765)
        house.ledger.budgets_left = lambda *_: Budgets(100, 1.5, None)  # type: ignore[method-assign]
        assert parse_all(house.follow("a").take())[1:] == [
            (
                "metrics",
                {
                    "queue_depth": 1,
                    "on_time_probability": 0.9877,
                    "budgets": {"tokens": 100, "time_ms": 1500, "cost": None},
                },
            )
        ]


async def test_tasks_that_nobody_reads_are_not_looked_at_however_many_wait() -> None:
    async with House(capacity=1000) as house:
        await house.submit("running")
        for number in range(500):
            await house.submit(f"t{number}")
        asked = predict(house, wait_s=lambda _: 1.0)
        readers = [house.follow(f"t{number}") for number in (3, 400)]
        asked.clear()
        for _ in range(3):
            await stir(house)
        assert [task.key[1] for task in asked].count("t3") == 3
        assert {task.key[1] for task in asked} == {"t3", "t400"}
        for reader in readers:
            reader.leave()
        asked.clear()
        await stir(house)
        await stir(house)
        assert (asked, len(house.dispatcher.advice)) == ([], 0)


async def test_tasks_that_have_ended_are_looked_at_no_more() -> None:
    async with House() as house:
        await house.submit("running")
        await house.submit("a")
        house.follow("a")
        assert len(house.dispatcher.advice) == 1
        await house.tasks.cancel("acme", "a")
        await asyncio.sleep(ADVICE_INTERVAL_S + 0.1)
        assert len(house.dispatcher.advice) == 0


async def test_reader_of_a_preempted_task_hears_that_it_goes_on() -> None:
    """ORCH-3087."""
    async with House() as house:
        await house.submit("a")
        (await house.engine.generation(0)).send("x")
        reader = house.follow("a")
        reader.take()
        task = house.record("a").admitted
        house.obey(ev.Requeue(task, PREEMPTED))
        assert parse_all(reader.take()) == [("metrics", {"queue_depth": 0, "preempted": True, "resumable": True})]


async def test_reader_of_a_task_that_is_retried_hears_nothing_of_making_room() -> None:
    async with House(FakeEnginePort(), FakeEnginePort()) as house:
        await house.submit("a")
        reader = house.follow("a")
        reader.take()
        (await house.engine.generation(0)).fail(WorkerReset("gone"))
        await house.engines[1].generation(0)
        told = parse_all(reader.take())
        assert [name for name, data in told if "preempted" in data] == []
        house.obey(ev.Requeue(house.record("a").admitted, Fault(WorkerReset)))
        assert reader.take() == b""


async def test_reader_of_a_task_that_goes_on_hears_where() -> None:
    """ORCH-3023."""
    async with House() as house:
        await house.submit("a")
        await house.engine.generation(0)
        task = house.record("a").admitted
        assert task.attempt is not None
        task.attempt.affinity, task.attempt.kv_warmth, task.preemptions = Affinity.MISS, False, 1
        reader = house.follow("a", after=1)
        assert parse_all(reader.take()) == [("metrics", {"preempted": False, "affinity": "miss", "kv_warmth": False})]
