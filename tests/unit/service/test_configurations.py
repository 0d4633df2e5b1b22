"""Reload and revert of the configuration: ORCH-3031, ORCH-3251 to ORCH-3253."""

import asyncio
from dataclasses import replace

import pytest

from llorch.errors import Conflict, InvalidParams, NotFound
from llorch.service.configurations import Deployment
from llorch.service.launching import Cause
from tests.unit.service.estate import Estate, deployment, managed, policy, pool

A, B = pool("a"), pool("b", "other")
ONE = managed(A)
LONG = {"max_tokens": 100}


async def reloaded(estate: Estate, file: Deployment) -> str:
    estate.file = file
    await estate.configurations.reload()
    return (await estate.configured()).state


async def test_file_that_cannot_be_used_changes_nothing() -> None:
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        estate.file = InvalidParams("llorch.yaml:3: pools: …")
        with pytest.raises(InvalidParams, match=r"llorch\.yaml:3"):
            await estate.configurations.reload()
        assert estate.outcomes[0][0] == "refused"
        assert estate.configurations.status().revision == 1


async def test_change_that_needs_a_restart_is_refused_by_name_and_whole() -> None:
    """ORCH-3253."""
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        estate.file, estate.needs_restart = deployment(ONE, managed(B)), ("server.port",)
        with pytest.raises(InvalidParams, match=r"server\.port: takes effect only at a restart"):
            await estate.configurations.reload()
        assert estate.states() == {"a/0": "ready"}


async def test_policies_change_in_place_and_no_process_is_replaced() -> None:
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        await estate.submit("runs", "waits", max_tokens=30)
        assert await reloaded(estate, deployment(ONE, policies={"llamacpp/m": policy(7)})) == "done"
        assert estate.schedulers["llamacpp/m"].policy == policy(7)
        assert len(estate.made["a/0"]) == 1
        await estate.ended(["runs", "waits"])
        assert [estate.frames(task)[-1][0] for task in ("runs", "waits")] == ["end", "end"]


async def test_only_the_replica_whose_entry_changed_is_replaced() -> None:
    two = (managed(A, "0"), managed(A, "1"))
    async with Estate(*two) as estate:
        await estate.ready("a/0", "a/1")
        await estate.submit("one", "two", max_tokens=30)
        assert await reloaded(estate, deployment(two[0], managed(A, "1", threads=2))) == "done"
        assert estate.states() == {"a/0": "ready", "a/1+": "ready"}
        assert len(estate.made["a/0"]) == 1
        await estate.ended(["one", "two"])
        assert [estate.frames(task)[-1][0] for task in ("one", "two")] == ["end", "end"]


async def test_settings_of_a_pool_that_its_process_does_not_know_change_in_place() -> None:
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        patient = replace(A, drain_s=77.0)
        assert await reloaded(estate, deployment(replace(ONE, pool=patient))) == "done"
        assert (estate.states(), len(estate.made["a/0"])) == ({"a/0": "ready"}, 1)
        assert estate.pools.pool("a").drain_s == 77.0


async def test_new_pool_is_served_and_one_that_is_gone_is_drained_with_its_route() -> None:
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        assert await reloaded(estate, deployment(ONE, managed(B))) == "done"
        await estate.ready("a/0", "b/0")
        await estate.submit("here", model_ref="other", **LONG)
        estate.file = deployment(ONE)
        await estate.configurations.reload()
        await asyncio.sleep(1)
        with pytest.raises(NotFound):
            await estate.submit("late", model_ref="other")
        assert (await estate.configured()).state == "done"
        last = estate.frames("here")[-1]
        assert (last[0], last[1]["policy_label"]) == ("error", "drain")
        assert estate.states() == {"a/0": "ready"}
        assert list(estate.schedulers) == ["llamacpp/m"]


async def test_everything_is_put_back_when_a_new_replica_fails() -> None:
    """ORCH-3251: atomic, also when others have been replaced before."""
    two = (managed(A, "0"), managed(A, "1"))
    async with Estate(*two) as estate:
        await estate.ready("a/0", "a/1")
        estate.manager.broken["a/1+"] = Cause.MODEL
        file = deployment(managed(A, "0", threads=2), managed(A, "1", threads=2), managed(B))
        assert await reloaded(estate, file) == "rolled_back"
        change = estate.configurations.status().change
        assert change is not None
        assert change.message is not None
        assert "a/1+" in change.message
        assert estate.states() == {"a/0": "ready", "a/1": "ready"}
        assert all(order.threads is None for order in estate.manager.orders.values())
        assert list(estate.schedulers) == ["llamacpp/m"]
        assert [view.pool_id for view in estate.pools.list()] == ["a"]
        assert estate.configurations.status().revision == 1


async def test_revert_goes_back_and_can_be_reverted() -> None:
    """ORCH-3252."""
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        with pytest.raises(InvalidParams, match="no previous"):
            await estate.configurations.revert()
        assert await reloaded(estate, deployment(managed(A, threads=2))) == "done"
        assert estate.manager.orders["a/0+"].threads == 2
        await estate.configurations.revert()
        assert (await estate.configured()).state == "done"
        assert estate.manager.orders["a/0"].threads is None
        assert (estate.configurations.status().revision, estate.configurations.status().can_revert) == (3, True)


async def test_one_change_at_a_time() -> None:
    async with Estate(ONE) as estate:
        await estate.ready("a/0")
        await estate.submit("t", **LONG)
        estate.changes.drain("a", 3.0)
        with pytest.raises(Conflict):
            await estate.configurations.reload()
        await estate.changed()
        estate.manager.answers = False
        estate.file = deployment(managed(A, threads=2))
        await estate.configurations.reload()
        await asyncio.sleep(1)
        with pytest.raises(Conflict):
            await estate.configurations.reload()
        with pytest.raises(Conflict):
            estate.changes.reload("a", None)
        estate.manager.up("a/0")
        assert (await estate.configured()).state == "done"
