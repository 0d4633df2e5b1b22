"""Drain and reload of pools: ORCH-2101, ORCH-2102, ORCH-2106, and what becomes of their tasks."""

import asyncio

import pytest

from llorch.errors import Conflict, NotFound, PoolUnavailable, PoolUnready
from llorch.service.launching import Cause
from llorch.service.selftest import PROMPT
from tests.unit.service.estate import Estate, managed, pool, until

A, B = pool("a"), pool("b")
TWO = (managed(A, "0"), managed(A, "1"))
LONG = {"max_tokens": 100}
"""Ten seconds, at the estate's ten tokens a second."""


async def test_managed_replicas_come_up_tested_and_ready() -> None:
    """ORCH-3002, ORCH-3049."""
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        for engine in estate.engines.values():
            assert len(engine.orders) == 2, "one decoded to the end, one broken off"


async def test_drain_lets_what_runs_end_and_then_stops_the_engines() -> None:
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        await estate.submit("t", max_tokens=20)
        begun = estate.changes.drain("a", 30.0)
        assert (begun.kind, begun.state, begun.running, begun.replicas_total) == ("drain", "running", 1, 2)
        change = await estate.changed()
        assert (change.state, change.moved, change.replicas_done) == ("done", 0, 2)
        assert estate.states() == {"a/0": "stopped", "a/1": "stopped"}
        assert sorted(estate.manager.released) == ["a/0", "a/1"]
        assert [event for event, _ in estate.frames("t")] == ["started", *["token"] * 20, "end"]


async def test_drain_of_one_pool_moves_what_still_runs_at_the_deadline_to_a_sibling() -> None:
    """ORCH-3158: the reader gets every token once."""
    async with Estate(managed(A), managed(B)) as estate:
        await estate.ready("a/0", "b/0")
        await estate.submit("one", "two", **LONG)
        await asyncio.sleep(1)
        estate.changes.drain("a", 2.0)
        change = await estate.changed()
        assert (change.state, change.moved) == ("done", 1)
        await estate.ended(["one", "two"])
        for task_id in ("one", "two"):
            events = [event for event, _ in estate.frames(task_id)]
            assert (events.count("started"), events.count("token"), events[-1]) == (1, 100, "end"), task_id
        assert estate.pools.get("a").is_draining


async def test_drain_of_the_last_pool_ends_what_waits_and_refuses_what_comes() -> None:
    """ORCH-3305: nothing waits for what will not come."""
    async with Estate(managed(A)) as estate:
        await estate.ready("a/0")
        await estate.submit("runs", "waits", **LONG)
        estate.changes.drain("a", 2.0)
        assert [data["code"] for event, data in await _ended(estate, "waits") if event == "error"] == ["POOL_UNREADY"]
        with pytest.raises(PoolUnready):
            await estate.submit("late")
        await estate.changed()
        _, last = (await _ended(estate, "runs"))[-1]
        assert (last["code"], last["policy_label"], last["retriable"]) == ("POOL_UNAVAILABLE", "drain", True)


async def test_reload_replaces_one_after_the_other_and_loses_nothing() -> None:
    """ORCH-2102: peer bug 29, in a virtual minute."""
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        tasks = [f"t{number}" for number in range(6)]
        await estate.submit(*tasks, max_tokens=30)
        estate.changes.reload("a", 30.0)
        change = await estate.changed()
        assert (change.state, change.replicas_done, change.moved) == ("done", 2, 0)
        assert change.ready_s is not None
        await estate.ended(tasks)
        assert [estate.frames(task)[-1][0] for task in tasks] == ["end"] * 6
        assert estate.states() == {"a/0+": "ready", "a/1+": "ready"}
        estate.changes.reload("a", 30.0)
        await estate.changed()
        assert estate.states() == {"a/0": "ready", "a/1": "ready"}, "the ids take turns"


async def test_new_process_is_ready_before_the_old_one_goes() -> None:
    async with Estate(managed(A)) as estate:
        await estate.ready("a/0")
        estate.manager.answers = False
        estate.changes.reload("a", 30.0)
        await asyncio.sleep(3)
        assert estate.states() == {"a/0": "ready", "a/0+": "starting"}
        estate.manager.up("a/0+")
        await estate.changed()
        assert estate.states() == {"a/0+": "ready"}


async def test_reload_without_room_for_two_drains_first_and_keeps_what_waits() -> None:
    async with Estate(managed(A)) as estate:
        await estate.ready("a/0")
        await estate.submit("runs", "waits", max_tokens=30)
        estate.manager.broken["a/0+"] = Cause.HEADROOM
        estate.changes.reload("a", 30.0)
        change = await estate.changed()
        assert change.state == "done"
        assert estate.states() == {"a/0": "ready"}
        await estate.ended(["runs", "waits"])
        assert [estate.frames(task)[-1][0] for task in ("runs", "waits")] == ["end", "end"]


async def test_reload_whose_new_process_fails_leaves_the_old_one_as_it_was() -> None:
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        estate.manager.broken["a/0+"] = Cause.EXIT
        estate.changes.reload("a", 30.0)
        change = await estate.changed()
        assert (change.state, change.replicas_done) == ("rolled_back", 0)
        assert change.message is not None
        assert "it failed" in change.message
        assert estate.states() == {"a/0": "ready", "a/1": "ready"}


async def test_reload_whose_swap_fails_starts_the_former_one_again() -> None:
    async with Estate(managed(A)) as estate:
        await estate.ready("a/0")
        estate.manager.broken |= {"a/0+": Cause.PORT, "a/0": Cause.EXIT}
        estate.changes.reload("a", 1.0)
        change = await estate.changed()
        assert change.state == "failed", "the former one fails, too"
        del estate.manager.broken["a/0"]
        estate.manager.up("a/0")
        await estate.ready("a/0")


async def test_drained_pool_is_started_again_by_a_reload() -> None:
    async with Estate(managed(A)) as estate:
        await estate.ready("a/0")
        estate.changes.drain("a", 0.0)
        await estate.changed()
        estate.changes.reload("a", None)
        change = await estate.changed()
        assert (change.kind, change.state) == ("reload", "done")
        await estate.submit("t")
        await estate.ended(["t"])
        assert estate.frames("t")[-1][0] == "end"


async def test_second_change_of_a_pool_is_refused_while_the_first_goes_on() -> None:
    async with Estate(managed(A), managed(B)) as estate:
        await estate.ready("a/0", "b/0")
        await estate.submit("t", **LONG)
        estate.changes.drain("a", 5.0)
        with pytest.raises(Conflict):
            estate.changes.reload("a", None)
        with pytest.raises(NotFound):
            estate.changes.drain("nope", None)
        estate.changes.reload("b", None)
        await estate.changed("a")
        await estate.changed("b")


async def test_replica_whose_self_test_fails_is_never_ready_and_started_anew_after_three() -> None:
    """ORCH-3049: it says why, and takes no task."""
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        sick = estate.engines["a/0"]
        sick.start = PoolUnready("503 at once")
        estate.pools.suspect("a/0")
        await until(lambda: bool(estate.manager.restarts))
        assert estate.manager.restarts[0] == ("a/0", 1, Cause.SELF_TEST)
        health = next(each for each in estate.pools.get("a").replicas if each.replica_id == "a/0")
        assert health.state.value in ("unready", "self-test")
        assert health.last_error is not None
        assert health.last_error.message == "the self-test failed at decode: 503 at once"
        await estate.submit("one", "two", max_tokens=2)
        await estate.ended(["one", "two"])
        placements = {estate.record(task).placed.replica_id for task in ("one", "two")}
        assert placements == {"a/1"}
        assert {order.prompt for order in sick.orders} == {PROMPT}, "nothing but its self-tests"


async def test_pool_without_the_gpu_that_it_needs_refuses_with_the_reason_until_there_is_one() -> None:
    """ORCH-3018, ORCH-3302."""
    estate = Estate(managed(A))
    estate.manager.broken["a/0"] = Cause.GPU
    async with estate:
        await until(lambda: estate.states() == {"a/0": "failed"})
        with pytest.raises(PoolUnavailable, match="it failed"):
            await estate.submit("early")
        estate.manager.up("a/0")
        await estate.ready("a/0")
        await estate.submit("late", max_tokens=1)
        await estate.ended(["late"])


async def test_lost_node_ends_its_attempts_at_once_and_is_adopted_when_it_is_idle() -> None:
    """ORCH-2105, ORCH-2108: tasks without a token go elsewhere, the others end honestly; nothing is started anew."""
    async with Estate(*TWO) as estate:
        await estate.ready("a/0", "a/1")
        await estate.submit("one", "two", **LONG)
        await asyncio.sleep(1)
        lost = estate.record("one").placed.replica_id
        estate.manager.lose(lost)
        last = (await _ended(estate, "one"))[-1]
        assert (last[0], last[1]["code"]) == ("error", "WORKER_RESET")
        assert estate.states()[lost] == "starting"
        await asyncio.sleep(10)
        starts = len(estate.made[lost])
        estate.manager.find_again(lost)
        stale = estate.engines[lost]
        stale.foreign = 1
        await asyncio.sleep(3)
        assert estate.states()[lost] != "ready", "it still works on what was broken off"
        stale.foreign = 0
        await estate.ready("a/0", "a/1")
        assert len(estate.made[lost]) == starts + 1
        assert [order.generation for order in estate.manager.orders.values()] == [0, 0]


async def _ended(estate: Estate, task_id: str) -> list[tuple[str, dict[str, object]]]:
    await estate.ended_alone(task_id)
    return estate.frames(task_id)
