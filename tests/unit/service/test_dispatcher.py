"""The dispatcher: answers and terminal frames follow the journal, timers fire in time, everything comes to its end."""

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest

from llorch.domain import events as ev
from llorch.domain.policy import Fairness, QueuePolicy, RoutePolicy
from llorch.domain.task import Estimate, Fault, Priority, TaskState
from llorch.errors import AdmissionReject, InvalidParams, PoolUnavailable
from llorch.service import frames
from llorch.service.patience import spread, told
from llorch.service.ports import Accepted, Ended, Message, Sampling
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import TENANT, House, parse_all, route, settle

Handle = Callable[[ev.Event, float], list[ev.Command]]

# The journal


async def test_submit_answers_after_the_journal_has_it() -> None:
    """ORCH-2001."""
    async with House() as house:
        house.journal.hold()
        submitting = asyncio.create_task(house.submit())
        await settle()
        assert not submitting.done()
        assert house.journal.decisions == [Accepted(TENANT, "t", "llamacpp/m", order=1)]
        house.journal.release()
        assert (await submitting).task_id == "t"


async def test_cancel_answers_after_the_journal_has_it() -> None:
    """ORCH-2041."""
    async with House() as house:
        await house.submit()
        house.journal.hold()
        cancelling = asyncio.create_task(house.tasks.cancel(TENANT, "t"))
        await settle()
        assert not cancelling.done()
        assert house.journal.decisions[-1] == Ended(TENANT, "t", "CANCELED")
        house.journal.release()
        await cancelling


async def test_terminal_frame_comes_after_the_journal_has_the_outcome() -> None:
    """ORCH-2033."""
    async with House() as house:
        await house.submit()
        generation = await house.engine.generation(0)
        generation.send("a")
        house.journal.hold()
        generation.finish()
        await settle()
        assert house.state() is TaskState.SUCCEEDED
        assert house.codes() == ["started", "token"]
        house.journal.release()
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "token", "end"]
        assert house.journal.decisions[-1] == Ended(TENANT, "t", None)


async def test_slow_journal_holds_up_no_slot() -> None:
    async with House() as house:
        await house.submit("a")
        await house.submit("b")
        house.journal.hold()
        (await house.engine.generation(0)).finish()
        await house.engine.generation(1)
        assert house.codes("a") == ["started"]


async def test_tasks_that_end_while_a_commit_is_under_way_get_their_terminal_frame_after_the_next() -> None:
    async with House(slots=2) as house:
        await house.submit("a")
        await house.submit("b")
        house.journal.hold()
        (await house.engine.generation(0)).finish()
        await settle()
        (await house.engine.generation(1)).finish()
        await settle()
        house.journal.release()
        await house.dispatcher.wait_idle()
        assert house.codes("a") == house.codes("b") == ["started", "end"]
        assert house.journal.durable == len(house.journal.decisions) == 4


async def test_every_accepted_task_has_one_decision_to_begin_and_one_to_end() -> None:
    """ORCH-3118."""
    async with House(FakeEnginePort(answer=["a"])) as house:
        for number in range(20):
            await house.submit(f"t{number}")
            if number % 3 == 0:
                await house.tasks.cancel(TENANT, f"t{number}")
        await house.dispatcher.wait_idle()
        begun = [d.task_id for d in house.journal.decisions if isinstance(d, Accepted)]
        ended = [d.task_id for d in house.journal.decisions if isinstance(d, Ended)]
        assert sorted(begun) == sorted(ended) == sorted(f"t{number}" for number in range(20))


# The mailbox


async def test_post_is_never_handled_within_another_post() -> None:
    async with House() as house:
        depth = 0
        order: list[str] = []
        scheduler = house.scheduler
        handle = scheduler.handle

        def watched(event: ev.Event, now: float) -> list[ev.Command]:
            nonlocal depth
            depth += 1
            assert depth == 1
            order.append(type(event).__name__)
            if isinstance(event, ev.Tick):
                house.dispatcher.post("llamacpp/m", ev.CancelRequested((TENANT, "nobody")))
                order.append("posted")
            depth -= 1
            return handle(event, now)

        scheduler.handle = watched  # type: ignore[method-assign]
        house.dispatcher.post("llamacpp/m", ev.Tick())
        assert order == ["Tick", "posted", "CancelRequested"]


async def test_peer_bug_06_a_refused_submission_leaves_no_record_and_no_decision() -> None:
    async with House(capacity=1) as house:
        await house.submit("a")
        await house.submit("b")
        decided = list(house.journal.decisions)
        with pytest.raises(AdmissionReject) as refused:
            await house.submit("c")
        assert refused.value.engine == "llamacpp"
        assert house.records.find((TENANT, "c")) is None
        assert house.journal.decisions == decided
        await house.tasks.cancel(TENANT, "b")
        assert (await house.submit("c")).task_id == "c"  # a refusal is not remembered


async def test_peer_bug_12_a_full_route_refuses_while_another_is_idle() -> None:
    routes = [route("llamacpp/m"), route("llamacpp/idle")]
    async with House(capacity=1, routes=routes) as house:
        await house.submit("a")
        await house.submit("b")
        with pytest.raises(AdmissionReject):
            await house.submit("c")
        assert (await house.submit("d", model_ref="idle")).state is TaskState.RUNNING


# Time


async def test_peer_bug_09_deadline_in_the_queue_fires_at_its_time() -> None:
    async with House() as house:
        await house.submit("a")
        await house.submit("b", deadline_ms=5000)
        await asyncio.sleep(4.9)
        assert house.state("b") is TaskState.QUEUED
        await asyncio.sleep(0.2)
        assert house.codes("b") == ["error DEADLINE_UNMET"]
        assert house.state("a") is TaskState.RUNNING


async def test_peer_bug_08_expired_task_never_reaches_an_engine() -> None:
    async with House() as house:
        await house.submit("a")
        await house.submit("b", deadline_ms=5000)
        await asyncio.sleep(6.0)
        (await house.engine.generation(0)).finish()
        await house.dispatcher.wait_idle()
        assert len(house.engine.generations) == 1
        assert house.tasks.get(TENANT, "b").output == ""


async def test_wake_up_that_was_called_off_posts_no_tick_and_sets_the_next() -> None:
    async with House(policy=RoutePolicy(wall_s=60.0)) as house:
        await house.submit("a")
        (await house.engine.generation(0)).finish()
        await house.dispatcher.wait_idle()
        await asyncio.sleep(30.0)
        await house.submit("b")
        await asyncio.sleep(45.0)  # past the wall time of "a", which has long ended
        assert house.telemetry.events(ev.Tick) == []
        assert house.state("b") is TaskState.RUNNING
        await asyncio.sleep(20.0)
        assert len(house.telemetry.events(ev.Tick)) == 1
        assert house.state("b") is TaskState.FAILED


async def test_wall_timeout_aborts_the_attempt() -> None:
    policy = RoutePolicy(wall_s=60.0)
    async with House(policy=policy) as house:
        await house.submit()
        await asyncio.sleep(61.0)
        assert house.codes() == ["started", "error DECODE_TIMEOUT"]
        assert house.engine.generations[0].is_closed
        assert house.ends() == [1]


async def test_task_is_canceled_when_its_reader_is_gone_for_the_grace() -> None:
    """ORCH-2013."""
    async with House() as house:
        await house.submit()
        house.follow().leave()
        await asyncio.sleep(9.0)
        reader = house.follow(after=1)
        await asyncio.sleep(60.0)
        assert house.state() is TaskState.RUNNING
        reader.leave()
        await asyncio.sleep(11.0)
        assert house.codes() == ["started", "error CANCELED"]


async def test_reader_of_a_waiting_task_hears_of_every_new_place() -> None:
    """ORCH-2011."""
    async with House() as house:
        for name in "abc":
            await house.submit(name)
        reader = house.follow("c")
        assert parse_all(reader.take()) == [
            ("queued", {"queue_position": 1, "predicted_start_ms": None, "reason": "tasks_ahead"})
        ]
        await house.tasks.cancel(TENANT, "b")
        await asyncio.sleep(1.1)
        assert parse_all(reader.take()) == [
            ("queued", {"queue_position": 0, "predicted_start_ms": None, "reason": "slots_busy"})
        ]
        await asyncio.sleep(60.0)
        assert reader.take() == b""


# Orders that nobody waits for


async def test_idle_slot_is_erased_where_the_engine_can() -> None:
    """ORCH-2005."""
    async with House() as house:
        house.obey(ev.Evict("llamacpp-m/0", 3))
        await settle()
        house.engine.can_erase = False
        house.obey(ev.Evict("llamacpp-m/0", 4))
        await settle()
        assert house.engine.erased == [3]
        assert house.telemetry.bugs == []


async def test_bug_in_erasing_is_reported_and_stops_nothing() -> None:
    async with House() as house:
        bug = ZeroDivisionError()

        async def fail(slot: int) -> bool:
            raise bug

        house.engine.erase = fail  # type: ignore[method-assign]
        house.obey(ev.Evict("llamacpp-m/0", 0))
        await settle()
        assert house.telemetry.bugs == [bug]
        await house.submit()
        await house.engine.generation(0)


async def test_closing_does_not_wait_for_an_erase() -> None:
    house = House()
    async with house:

        async def hang(slot: int) -> bool:
            await asyncio.Event().wait()
            return True

        house.engine.erase = hang  # type: ignore[method-assign]
        house.obey(ev.Evict("llamacpp-m/0", 0))
        await settle()
    assert house.telemetry.bugs == []


async def test_lifted_limit_of_a_tenant_is_told_to_the_other_routes() -> None:
    """ORCH-3077."""
    async with House(routes=[route("llamacpp/m"), route("llamacpp/o"), route("llamacpp/p")]) as house:
        lifted = ["acme"]
        house.ledger.take_lifted = lambda: [lifted.pop()] if lifted else []  # type: ignore[method-assign]
        told: list[tuple[str, ev.Event]] = []
        for route_id, scheduler in house.schedulers.items():
            handle = scheduler.handle

            def watched(
                event: ev.Event, now: float, route_id: str = route_id, handle: Handle = handle
            ) -> list[ev.Command]:
                told.append((route_id, event))
                return [] if isinstance(event, ev.LimitLifted) else handle(event, now)

            scheduler.handle = watched  # type: ignore[method-assign]
        house.dispatcher.post("llamacpp/o", ev.Tick())
        assert told == [
            ("llamacpp/o", ev.Tick()),
            ("llamacpp/m", ev.LimitLifted("acme")),
            ("llamacpp/p", ev.LimitLifted("acme")),
        ]


async def test_attempt_that_ends_well_tells_its_prompt_tokens() -> None:
    async with House() as house:
        await house.submit("a")
        await house.submit("b")
        (await house.engine.generation(0)).finish()
        (await house.engine.generation(1)).fail(InvalidParams("no"))
        await house.dispatcher.wait_idle()
        told = [event.prompt_tokens for event in house.telemetry.events(ev.AttemptEnded)]
        assert told == [len("once upon a time"), None]


async def test_refusal_and_terminal_frame_tell_a_wait_that_is_spread() -> None:
    """ORCH-2007."""
    async with House() as house:
        handle = house.scheduler.handle
        fault = Fault(AdmissionReject, "full", "reject", retry_after_ms=10_000)
        house.scheduler.handle = lambda *_: [ev.Reject((TENANT, "a"), fault)]  # type: ignore[method-assign]
        with pytest.raises(AdmissionReject) as refused:
            await house.submit("a")
        assert refused.value.retry_after_ms == spread(10_000, "a") != 10_000
        house.scheduler.handle = handle  # type: ignore[method-assign]
        await house.submit("running")
        await house.submit("b")
        task = house.record("b").admitted
        await house.tasks.cancel(TENANT, "b")
        task.fault = fault
        assert house.tasks.get(TENANT, "b").fault == told(fault, "b")
        assert frames.terminal(house.record("b"))[1]["retry_after_ms"] == spread(10_000, "b")


async def test_acceptance_tells_the_prediction_and_when_to_submit_next() -> None:
    """ORCH-2001, ORCH-3029."""
    async with House() as house:
        handle = house.scheduler.handle

        def informed(event: ev.Event, now: float) -> list[ev.Command]:
            commands = handle(event, now)
            for number, command in enumerate(commands):
                if isinstance(command, ev.Admit):
                    command.task.predicted_wait = Estimate(1.84, 0.1)
                    commands[number] = ev.Admit(command.task, command.queue_position, backoff_s=0.62)
            return commands

        house.scheduler.handle = informed  # type: ignore[method-assign]
        acceptance = await house.submit("a")
        assert (acceptance.predicted_start_ms, acceptance.backoff_ms) == (1840, spread(620, "a"))
        assert house.read_all("a")[0][1]["predicted_start_ms"] == 1840
        assert await house.submit("a") == acceptance


# The end


async def test_wait_idle_returns_when_the_last_engine_let_go() -> None:
    async with House() as house:
        house.engine.releasing.shut()
        await house.submit()
        await house.engine.generation(0)
        await house.tasks.cancel(TENANT, "t")
        waiting = asyncio.create_task(house.dispatcher.wait_idle())
        await asyncio.sleep(5.0)
        assert not waiting.done()
        house.engine.releasing.open()
        async with asyncio.timeout(1.0):
            await waiting


async def test_idle_service_is_idle_at_once() -> None:
    async with House() as house:
        async with asyncio.timeout(1.0):
            await house.dispatcher.wait_idle()


async def test_peer_bug_28_shutdown_lets_running_streams_end() -> None:
    """ORCH-3114."""
    async with House() as house:
        await house.submit("a")
        await house.submit("b")
        house.dispatcher.post_to_all(ev.ShutdownRequested(30.0))
        with pytest.raises(PoolUnavailable) as refused:
            await house.submit("late")
        assert (refused.value.retriable, refused.value.policy_label) == (True, "shutdown")
        assert (await house.submit("a")).task_id == "a"  # a replay still gets its answer
        generation = await house.engine.generation(0)
        await asyncio.sleep(20.0)
        generation.send("x")
        generation.finish()
        await house.dispatcher.wait_idle()
        assert house.codes("a") == ["started", "token", "end"]
        assert house.codes("b") == ["error POOL_UNAVAILABLE"]


async def test_shutdown_breaks_off_what_outlasts_the_grace() -> None:
    async with House() as house:
        await house.submit()
        house.dispatcher.post_to_all(ev.ShutdownRequested(30.0))
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "error POOL_UNAVAILABLE"]
        assert house.engine.released == [0]


async def test_closing_ends_every_task_with_an_error_and_never_with_success() -> None:
    house = House()
    async with house:
        await house.submit("a")
        await house.submit("b")
        (await house.engine.generation(0)).send("x")
    assert house.codes("a") == ["started", "token", "error POOL_UNAVAILABLE"]
    assert house.codes("b") == ["error POOL_UNAVAILABLE"]
    assert house.ledger.leases() == []
    assert len(house.engine.generations) == 1


async def test_attempt_that_somebody_else_cancels_is_no_success() -> None:
    async with House() as house:
        await house.submit()
        await house.engine.generation(0)
        [run] = house.dispatcher._running.values()
        run.cancel()
        await house.dispatcher.wait_idle()
        assert house.codes() == ["started", "error POOL_UNAVAILABLE"]


async def test_peer_bug_15_prompt_of_an_ended_task_is_given_back() -> None:
    class Text(str):
        __slots__ = ("__weakref__",)

    async with House(FakeEnginePort(answer=["a"])) as house:
        prompt, content, stop = Text("a prompt"), Text("a message"), Text("a stop")
        gone = [weakref.ref(text) for text in (prompt, content, stop)]
        await house.submit("p", prompt=prompt)
        await house.submit("m", prompt=None, messages=(Message("user", content),), sampling=Sampling(stop=(stop,)))
        del prompt, content, stop
        await house.dispatcher.wait_idle()
        house.engine.generations.clear()
        house.telemetry.observed.clear()
        await settle()
        gc.collect()
        assert [text() for text in gone] == [None, None, None]
        assert house.tasks.get(TENANT, "p").output == "a"


async def test_batch_waits_for_interactive_through_the_whole_service() -> None:
    """ORCH-3075."""
    async with House(policy=RoutePolicy(QueuePolicy(fairness=Fairness.STRICT))) as house:
        await house.submit("running")
        await house.submit("b", priority=Priority.BATCH)
        await house.submit("i")
        (await house.engine.generation(0)).finish()
        await house.engine.generation(1)
        assert (house.state("i"), house.state("b")) == (TaskState.RUNNING, TaskState.QUEUED)


async def test_peer_bug_03_random_ends_and_cancels_start_every_task_once() -> None:
    async with House(FakeEnginePort(slots=2), FakeEnginePort(slots=2), slots=2) as house:
        for number in range(30):
            await house.submit(f"t{number}", prompt=f"prompt {number}")
        seen = 0
        while seen < 30:
            for engine in house.engines:
                for generation in engine.generations:
                    if not generation.is_closed:
                        seen += 1
                        generation.finish()
            await settle()
        prompts = [generation.order.prompt for engine in house.engines for generation in engine.generations]
        assert sorted(prompts) == sorted(f"prompt {number}" for number in range(30))
