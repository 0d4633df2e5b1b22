"""Sessions as the edge sees them, and their end."""

import asyncio

import pytest

from llorch.domain.task import TaskState
from llorch.errors import BudgetExhausted, NotFound
from llorch.service.patience import spread
from tests.unit.service.house import TENANT, House, route, settle

LONG = "word " * 1000


async def test_session_tells_its_turns_and_what_is_left_of_its_time() -> None:
    """ORCH-2004."""
    async with House(turns=2) as house:
        await house.submit("a", session_id="s")
        await house.submit("b", session_id="s")
        house.clock.advance(100.0)
        view = house.sessions.get(TENANT, "s")
        assert (view.turns, view.turns_max, view.ttl_ms_remaining) == (2, 2, 500_000)
        with pytest.raises(BudgetExhausted) as refused:
            await house.submit("c", session_id="s")
        assert refused.value.retry_after_ms == spread(500_000, "c")
        with pytest.raises(NotFound):
            house.sessions.get("other", "s")
        house.clock.advance(500.0)
        with pytest.raises(NotFound):
            house.sessions.get(TENANT, "s")


async def test_peer_bug_07_simultaneous_submissions_do_not_overrun_the_turns() -> None:
    async with House(turns=3, slots=1) as house:
        house.engine.counting.shut()
        many = [
            asyncio.create_task(house.submit(f"t{number}", session_id="s", prompt=LONG, max_tokens=20))
            for number in range(10)
        ]
        await settle()
        house.engine.counting.open()
        outcomes = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(outcome, BudgetExhausted) for outcome in outcomes) == 7
        assert house.sessions.get(TENANT, "s").turns == 3


async def test_deleting_a_session_cancels_its_tasks_on_every_route() -> None:
    """ORCH-2005."""
    async with House(routes=[route("llamacpp/m"), route("vllm/n")]) as house:
        await house.submit("a", session_id="s")
        await house.submit("b", session_id="s", model_ref="n")
        await house.submit("c")
        await settle()
        await house.sessions.delete(TENANT, "s")
        assert [house.state(name) for name in "ab"] == [TaskState.CANCELED] * 2
        with pytest.raises(NotFound):
            await house.sessions.delete(TENANT, "s")
        await house.engine.generation(2)
        assert house.state("c") is TaskState.RUNNING
