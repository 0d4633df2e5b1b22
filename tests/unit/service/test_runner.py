"""Attempts on an engine: every one ends once, and nothing follows a cancel."""

import asyncio

import pytest

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Priority, TaskState
from llorch.errors import DecodeTimeout, InvalidParams, WorkerReset
from llorch.service.runner import REPORT_S
from llorch.testing.clock import running_clock
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import TENANT, House, settle


async def test_task_runs_to_its_end_and_says_so() -> None:
    async with House() as house:
        acceptance = await house.submit()
        assert (acceptance.state, acceptance.queue_position) == (TaskState.RUNNING, 0)
        generation = await house.engine.generation(0)
        generation.send("On", "ce")
        generation.finish("stop")
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "token", "token", "end"]
        end = house.read_all()[-1][1]
        assert (end["tokens_out"], end["finish_reason"]) == (2, "stop")
        assert house.state() is TaskState.SUCCEEDED
        assert generation.order.prompt == "once upon a time"
        assert house.ends() == [1]
        assert generation.is_closed


async def test_waiting_task_is_told_that_it_waits() -> None:
    async with House() as house:
        await house.submit("a")
        assert (await house.submit("b")).state is TaskState.QUEUED


async def test_peer_bug_13_tokens_are_in_the_stream_as_soon_as_the_engine_sent_them() -> None:
    async with House() as house:
        await house.submit()
        generation = await house.engine.generation(0)
        before = running_clock().monotonic()
        generation.send("a")
        assert house.codes() == ["started", "token"]
        assert house.record().admitted.first_token_at == before == running_clock().monotonic()


async def test_scheduler_hears_of_tokens_every_32_or_half_second() -> None:
    async with House() as house:
        await house.submit(max_tokens=200)
        generation = await house.engine.generation(0)

        def counts() -> list[int]:
            return [event.count for event in house.telemetry.events(ev.TokensProduced)]

        for _ in range(31):
            generation.send("a")
        assert counts() == []
        generation.send("a")
        assert counts() == [32]
        generation.send("a")
        await asyncio.sleep(REPORT_S)
        assert counts() == [32, 1]
        await asyncio.sleep(REPORT_S)
        assert counts() == [32, 1]
        generation.send("a", "b", "c")
        generation.finish()
        await house.dispatcher.wait_idle()
        assert counts() == [32, 1, 3]
        assert len(house.telemetry.events(ev.FirstToken)) == 1


@pytest.mark.parametrize("together", [True, False])
async def test_scheduler_hears_at_once_that_a_short_batch_task_is_past_its_half(together: bool) -> None:
    """ORCH-3086."""
    async with House() as house:
        await house.submit(max_tokens=12, priority=Priority.BATCH)
        generation = await house.engine.generation(0)
        if together:
            generation.send(*"abcdefg")
        for text in "" if together else "abcdefg":
            assert house.telemetry.events(ev.TokensProduced) == []
            generation.send(text)
        assert [event.count for event in house.telemetry.events(ev.TokensProduced)] == [7]
        generation.send(*"hijkl")
        generation.finish()
        await house.dispatcher.wait_idle()
        assert [event.count for event in house.telemetry.events(ev.TokensProduced)] == [7, 5]


# Cancel


async def test_no_frame_but_the_terminal_one_follows_a_cancel() -> None:
    """ORCH-2003: not even from an engine that goes on sending."""
    async with House() as house:
        await house.submit()
        generation = await house.engine.generation(0)
        generation.send("a")
        cancelling = asyncio.create_task(house.tasks.cancel(TENANT, "t"))
        await asyncio.sleep(0)
        generation.send("b")
        await cancelling
        generation.send("c")
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "token", "error CANCELED"]


async def test_canceled_slot_is_used_again_when_the_engine_let_go_and_not_before() -> None:
    async with House() as house:
        house.engine.releasing.shut()
        await house.submit("a")
        await house.submit("b")
        await house.engine.generation(0)
        await house.tasks.cancel(TENANT, "a")
        await settle()
        assert house.codes("a") == ["started", "error CANCELED"]
        assert (house.engine.generations[0].is_closed, house.ends()) == (True, [])
        await asyncio.sleep(30.0)
        assert len(house.engine.generations) == 1
        house.engine.releasing.open()
        await house.engine.generation(1)
        assert house.engine.released == [0]
        assert house.ends() == [1]


async def test_peer_bug_05_attempt_canceled_before_its_first_step_gives_its_slot_back() -> None:
    async with House() as house:
        key = TENANT, "t"
        submitting = asyncio.create_task(house.submit())
        await asyncio.sleep(0)  # admitted and started; the attempt has not taken a step
        house.dispatcher.post(house.routes[0].route_id, ev.CancelRequested(key))
        await submitting
        await house.dispatcher.wait_idle()
        assert house.engine.generations == []
        assert house.ends() == [1]
        assert house.ledger.leases() == []
        assert house.codes() == ["started", "error CANCELED"]


async def test_peer_bug_01_cancel_of_one_task_leaves_the_others_alone() -> None:
    async with House(slots=2) as house:
        for name in "abc":
            await house.submit(name)
        for name in "bc":
            await house.tasks.cancel(TENANT, name)
        generation = await house.engine.generation(0)
        generation.send("still here")
        generation.finish()
        await house.dispatcher.wait_idle()
        assert house.codes("a") == ["started", "token", "end"]
        assert house.codes("b") == ["started", "error CANCELED"]
        assert house.codes("c") == ["error CANCELED"]
        assert sorted(house.ends()) == [1, 2]


async def test_cancel_that_meets_the_end_of_the_attempt_has_one_outcome() -> None:
    async with House() as house:
        await house.submit()
        generation = await house.engine.generation(0)
        generation.finish()
        await house.tasks.cancel(TENANT, "t")  # the attempt is done, but has not reported
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "error CANCELED"]
        assert house.tasks.get(TENANT, "t").usage is None
        assert house.ends() == [1]


# Faults


async def test_engine_that_refuses_the_request_ends_the_task_with_its_reason() -> None:
    """ORCH-3153."""
    async with House() as house:
        house.engine.start = InvalidParams("no such grammar")
        await house.submit()
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "error INVALID_PARAMS"]
        assert house.read_all()[-1][1]["message"] == "no such grammar"
        assert house.suspects == []


async def test_peer_bug_10_replica_fault_makes_the_replica_suspect_and_probed() -> None:
    async with House() as house:
        house.engine.start = WorkerReset("connection refused")
        await house.submit()
        await settle()
        assert house.suspects == ["llamacpp-m/0"]
        assert house.state() is TaskState.QUEUED
        assert len(house.engine.generations) == 1
        house.engine.start = None
        house.tell(0, ReplicaState.READY)
        (await house.engine.generation(1)).finish()
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "end"]


async def test_peer_bug_20_output_of_two_attempts_is_never_joined() -> None:
    async with House(FakeEnginePort(), FakeEnginePort()) as house:
        await house.submit()
        generation = await house.engine.generation(0)
        generation.send("a")
        generation.fail(WorkerReset("gone"))
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "token", "error WORKER_RESET"]
        assert house.read_all()[-1][1]["retriable"] is True
        assert house.engines[1].generations == []


async def test_retry_before_the_first_token_keeps_one_started_frame() -> None:
    """ORCH-2033."""
    async with House(FakeEnginePort(), FakeEnginePort()) as house:
        await house.submit()
        (await house.engine.generation(0)).fail(WorkerReset("gone"))
        second = await house.engines[1].generation(0)
        second.send("a")
        second.finish()
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "token", "end"]
        assert house.record().placed.replica_id == "llamacpp-m/1"
        assert house.ends() == [1, 2]


async def test_silent_engine_ends_the_task_in_a_timeout() -> None:
    async with House() as house:
        await house.submit()
        (await house.engine.generation(0)).fail(DecodeTimeout("silent"))
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "error DECODE_TIMEOUT"]
        assert house.suspects == ["llamacpp-m/0"]
        assert house.engine.released == [0]


async def test_bug_in_an_adapter_is_reported_and_its_text_is_not_told() -> None:
    async with House() as house:
        await house.submit()
        bug = ZeroDivisionError("secret")
        (await house.engine.generation(0)).fail(bug)
        await house.dispatcher.wait_idle()
        assert house.telemetry.bugs == [bug]
        assert house.codes() == ["started", "error INTERNAL"]
        assert "secret" not in str(house.read_all())
        assert house.ends() == [1]
        await house.submit("next")
        await house.engine.generation(1)
