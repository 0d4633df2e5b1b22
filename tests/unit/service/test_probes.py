"""How probes find a replica, and what its scheduler is told."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.errors import InvalidParams, LlorchError, NotFound, PoolUnready, WorkerReset
from llorch.service.inventory import Fact
from llorch.service.pools import LAST_RETRY_S, PROBE_S
from llorch.service.probes import UNVERIFIED, Pool, ReplicaConfig, Watched
from llorch.testing.clock import FakeClock
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import House, route, settle

STATED = Fact("v1", "stated")


def watched(engine: FakeEnginePort, slots: int = 1, **facts: Any) -> Watched:
    config = ReplicaConfig("r0", Pool("p", route(ctx=1024)), engine, slots, **facts)
    return Watched(config, FakeClock())


async def probed(engine: FakeEnginePort, slots: int = 1, **facts: Any) -> Watched:
    made = watched(engine, slots, **facts)
    await made.probe()
    return made


async def test_replica_is_ready_when_it_is_able_and_what_its_pool_says() -> None:
    """ORCH-3008."""
    made = watched(FakeEnginePort())
    assert made.replica().state is ReplicaState.STARTING
    await made.probe()
    assert (made.replica().state, made.last_error) == (ReplicaState.READY, None)


@pytest.mark.parametrize(
    ("error", "fresh", "known"),
    [
        (PoolUnready("loading"), ReplicaState.LOADING, ReplicaState.UNREADY),
        (WorkerReset("refused"), ReplicaState.STARTING, ReplicaState.UNREADY),
        (InvalidParams("odd"), ReplicaState.STARTING, ReplicaState.UNREADY),
    ],
)
async def test_state_tells_a_replica_that_comes_up_from_one_that_went_away(
    error: LlorchError, fresh: ReplicaState, known: ReplicaState
) -> None:
    engine = FakeEnginePort()
    engine.health = error
    made = await probed(engine)
    assert made.state is fresh
    engine.health = None
    await made.probe()
    engine.health = error
    await made.probe()
    assert made.state is known
    assert made.last_error is not None
    assert (made.last_error.code, made.last_error.message) == (error.code, error.message)
    engine.health = None
    await made.probe()
    assert made.state is ReplicaState.READY
    assert made.last_error is not None  # the last error stays visible


@pytest.mark.parametrize(
    ("told", "slots", "stated", "word"),
    [
        ({"slots": 1}, 2, {}, "slots"),
        ({"ctx_per_slot": 512}, 1, {}, "context"),
        ({"engine_version": "v2"}, 1, {"engine_version": STATED}, "version"),
        ({"model_digest": "sha256:bb"}, 1, {"model_digest": Fact("sha256:aa", "stated")}, "digest"),
    ],
)
async def test_replica_that_is_not_what_its_pool_says_is_not_ready(
    told: dict[str, Any], slots: int, stated: dict[str, Fact], word: str
) -> None:
    engine = FakeEnginePort()
    engine.facts = replace(engine.facts, **told)
    made = await probed(engine, slots, **stated)
    assert made.state is ReplicaState.UNREADY
    assert made.last_error is not None
    assert word in made.last_error.message


async def test_what_the_engine_does_not_tell_is_no_mismatch_and_stays_unverified() -> None:
    engine = FakeEnginePort(slots=None, ctx=None)
    engine.facts = replace(engine.facts, engine_version=None, model_digest=None)
    made = await probed(engine, engine_version=STATED)
    assert made.state is ReplicaState.READY
    assert (made.engine_version, made.model_digest) == (STATED, UNVERIFIED)


async def test_what_the_engine_tells_is_measured() -> None:
    made = await probed(FakeEnginePort())
    assert (made.engine_version, made.model_digest) == (Fact("v1", "measured"), Fact("sha256:aa", "measured"))


@pytest.mark.parametrize(("told", "slots", "exact"), [(1, 1, True), (2, 1, False), (2, 2, False), (None, 1, False)])
async def test_replica_is_exact_only_when_the_engine_has_one_slot(told: int | None, slots: int, exact: bool) -> None:
    assert (await probed(FakeEnginePort(slots=told), slots)).replica().cohort.exact is exact


async def test_replica_can_be_interrupted_where_its_engine_can() -> None:
    """ORCH-3085."""
    engine = FakeEnginePort()
    assert (await probed(engine)).replica().can_interrupt
    engine.can_interrupt = False
    assert not (await probed(engine)).replica().can_interrupt


async def test_facts_are_read_when_the_replica_comes_up_and_not_at_every_probe() -> None:
    engine = FakeEnginePort()
    made = await probed(engine)
    await made.probe()
    assert engine.readings == 1
    engine.health = WorkerReset("gone")
    await made.probe()
    engine.health = None
    engine.facts = replace(engine.facts, engine_version="v2")
    await made.probe()
    assert (engine.readings, made.engine_version.value) == (2, "v2")
    made.suspect()
    await made.probe()
    assert engine.readings == 3


# The loop


def told(house: House) -> list[ReplicaState]:
    return [event.replica.state for event in house.telemetry.events(ev.ReplicaChanged)]


async def test_replica_is_probed_for_ever_and_told_on_change_only() -> None:
    house = House()
    house.pools.announce(house.dispatcher.post)
    watching = asyncio.create_task(house.pools.watch(house.dispatcher.post))
    await asyncio.sleep(10 * PROBE_S + 0.1)
    assert told(house) == [ReplicaState.STARTING, ReplicaState.READY]
    assert house.engine.probes == 11
    house.engine.health = WorkerReset("gone")
    await asyncio.sleep(PROBE_S)
    assert told(house)[2:] == [ReplicaState.UNREADY]
    before = house.engine.probes
    await asyncio.sleep(600.0)
    assert house.engine.probes - before >= 600.0 / LAST_RETRY_S - 1
    house.engine.health = None
    await asyncio.sleep(LAST_RETRY_S)
    assert told(house)[3:] == [ReplicaState.READY]
    watching.cancel()


async def test_peer_bug_10_suspect_replica_is_probed_at_once_and_only_then_ready_again() -> None:
    """ORCH-3145."""
    async with House() as house:
        watching = asyncio.create_task(house.pools.watch(house.dispatcher.post))
        await settle()
        await house.submit()
        probes, at = house.engine.probes, house.clock.monotonic()
        house.engine.probing.shut()
        (await house.engine.generation(0)).fail(WorkerReset("gone"))
        await settle()
        assert house.engine.probes == probes + 1
        assert house.pools.count_ready() == 0
        assert len(house.engine.generations) == 1
        house.engine.probing.open()
        await house.engine.generation(1)
        assert house.clock.monotonic() == at
        watching.cancel()


async def test_suspect_replica_that_stays_away_takes_nothing() -> None:
    async with House() as house:
        watching = asyncio.create_task(house.pools.watch(house.dispatcher.post))
        await settle()
        await house.submit()
        house.engine.health = WorkerReset("still gone")
        (await house.engine.generation(0)).fail(WorkerReset("gone"))
        await asyncio.sleep(60.0)
        assert len(house.engine.generations) == 1
        assert house.pools.get("llamacpp-m").replicas[0].last_error is not None
        watching.cancel()


def loads(house: House) -> list[tuple[str, int]]:
    """What the schedulers would be told of foreign work; nothing is handled."""
    told: list[tuple[str, int]] = []

    def post(route_id: str, event: ev.Event) -> None:
        if isinstance(event, ev.EngineLoad):
            told.append((event.replica_id, event.foreign_slots))
        else:
            house.dispatcher.post(route_id, event)

    house.watching = asyncio.create_task(house.pools.watch(post))
    return told


async def test_peer_bug_18_foreign_work_is_told_while_it_lasts_and_once_when_it_is_over() -> None:
    """ORCH-3151: a load that is told no more grows stale in the scheduler, and own leases count alone."""
    async with House() as house:
        told = loads(house)
        await asyncio.sleep(PROBE_S)
        assert told == []
        house.engine.foreign = 1
        await asyncio.sleep(2 * PROBE_S)
        assert told == [("llamacpp-m/0", 1)] * 2
        house.engine.foreign = None
        await asyncio.sleep(2 * PROBE_S)
        assert len(told) == 2
        house.engine.foreign = 0
        await asyncio.sleep(3 * PROBE_S)
        assert told[2:] == [("llamacpp-m/0", 0)]


async def test_own_attempts_are_no_foreign_work() -> None:
    async with House(slots=2) as house:
        told = loads(house)
        await house.submit("a")
        await house.submit("b")
        await house.engine.generation(1)
        await asyncio.sleep(2 * PROBE_S)
        house.engine.generations[0].finish()
        await asyncio.sleep(2 * PROBE_S)
        assert told == []


async def test_pool_shows_slots_that_are_held_and_releasing() -> None:
    """ORCH-3019."""
    async with House(slots=2) as house:
        house.engine.releasing.shut()
        await house.submit("a")
        await house.submit("b")
        await house.engine.generation(1)
        await house.tasks.cancel("acme", "a")
        [view] = house.pools.list()
        assert (view.replicas[0].slots, view.replicas[0].slots_busy) == (2, 2)
        with pytest.raises(NotFound):
            house.pools.get("nobody")


async def test_replica_sets_are_those_that_agree() -> None:
    """ORCH-3007."""
    engines = [FakeEnginePort(), FakeEnginePort(), FakeEnginePort()]
    engines[2].facts = replace(engines[2].facts, engine_version="v2")
    async with House(*engines) as house:
        watching = asyncio.create_task(house.pools.watch(house.dispatcher.post))
        await settle()
        sets = house.pools.replica_sets()
        members = {each.cohort.engine_version: [known.replica_id for known in each.replicas] for each in sets}
        assert members == {"v1": ["llamacpp-m/0", "llamacpp-m/1"], "v2": ["llamacpp-m/2"]}
        watching.cancel()
