"""Submit, look, follow and delete, as the edge calls them."""

import asyncio
import json

import pytest

from llorch.domain import events as ev
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Budgets, Estimate, TaskSpec, TaskState, WaitReason
from llorch.errors import (
    Conflict,
    InvalidParams,
    NotFound,
    PayloadTooLarge,
    PoolUnready,
    QuotaExceeded,
    StreamGone,
    WorkerReset,
)
from llorch.service.limits import Limits
from llorch.service.ports import Message, Sampling
from llorch.service.records import Retention
from llorch.service.tasks import SEEDS
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import TENANT, House, route, settle, submission

LONG = "word " * 1000


# Idempotency


async def test_same_submission_again_gets_the_stored_answer_and_no_second_task() -> None:
    """ORCH-2009."""
    async with House() as house:
        await house.submit("running")
        first = await house.submit("a")
        await house.submit("b")
        assert await house.submit("a") == first
        (await house.engine.generation(0)).finish()
        (await house.engine.generation(1)).finish()
        await house.engine.generation(2)
        assert await house.submit("a") == first
        assert len(house.journal.decisions) == 5


async def test_other_body_under_the_same_id_is_a_conflict() -> None:
    async with House() as house:
        await house.submit("a")
        with pytest.raises(Conflict):
            await house.submit("a", max_tokens=17)


async def test_same_id_of_another_tenant_is_another_task() -> None:
    async with House() as house:
        await house.submit("a")
        await house.tasks.submit(submission("a", tenant="other", max_tokens=3), "c")
        assert house.record("a").submission.max_tokens == 16
        assert house.record("a", "other").submission.max_tokens == 3


async def test_simultaneous_submissions_of_one_id_make_one_task() -> None:
    """ORCH-2028: both are past the first look-up while the tokenizer counts."""
    async with House() as house:
        house.engine.counting.shut()
        twins = [asyncio.create_task(house.submit("a", prompt=LONG)) for _ in range(2)]
        other = asyncio.create_task(house.submit("a", prompt=LONG + "x"))
        await settle()
        assert house.engine.counting.entered == 3
        house.engine.counting.open()
        first, second = await asyncio.gather(*twins)
        assert first == second
        with pytest.raises(Conflict):
            await other
        assert len(house.scheduler.tasks) == 1


async def test_replay_does_not_answer_before_the_decision_is_durable() -> None:
    async with House() as house:
        house.journal.hold()
        twins = [asyncio.create_task(house.submit("a")) for _ in range(2)]
        await settle()
        assert [twin.done() for twin in twins] == [False, False]
        house.journal.release()
        first, second = await asyncio.gather(*twins)
        assert first == second


async def test_peer_bug_04_keys_and_orders_survive_an_encoding() -> None:
    async with House() as house:
        for name in "abc":
            await house.submit(name)
        entries = [(entry.tenant, entry.task_id, entry.order) for entry in house.journal.decisions]  # type: ignore[union-attr]
        assert [tuple(entry) for entry in json.loads(json.dumps(entries))] == entries
        assert [order for _, _, order in entries] == [1, 2, 3]


async def test_task_id_of_a_forgotten_record_can_be_used_anew() -> None:
    async with House(FakeEnginePort(answer=["a"]), retention=Retention(1.0, 2.0)) as house:
        await house.submit("a")
        await asyncio.sleep(3.0)
        with pytest.raises(NotFound):
            house.tasks.get(TENANT, "a")
        await house.submit("a", max_tokens=17)
        assert house.record("a").submission.max_tokens == 17


# What the scheduler is told


def specs(house: House) -> list[TaskSpec]:
    return [event.spec for event in house.telemetry.events(ev.TaskSubmitted)]


async def test_scheduler_is_told_an_estimate_of_the_prompt_or_its_count() -> None:
    """ORCH-3015: a count is made only where it is needed; four bytes make a token otherwise."""
    async with House() as house:
        house.engine.count = lambda _: 1234
        await house.submit("bytes", prompt="é" * 9)
        await house.submit("messages", prompt=None, messages=(Message("user", "abcd"), Message("user", "e")))
        await house.submit("counted", prompt=LONG)
        house.tell(0, ReplicaState.UNREADY)
        await house.submit("nobody to ask", prompt=None, messages=(Message("user", "abcd"), Message("user", "e")))
        rendered = "<user> abcd\n<user> e\n"
        assert [spec.prompt_tokens for spec in specs(house)] == [5, -(-len(rendered) // 4), 1234, 2]


@pytest.mark.parametrize(
    ("wish", "can_continue", "wants_warm"),
    [
        ({}, True, True),
        ({"sampling": Sampling(temperature=0.5)}, True, True),
        ({"sampling": Sampling(grammar="root ::= x")}, False, True),
        ({"sampling": Sampling(json_schema={})}, False, True),
        ({"kv_hint": "reuse"}, True, True),
        ({"kv_hint": "cold"}, True, False),
    ],
)
async def test_scheduler_is_told_whether_a_task_can_go_on_and_wants_its_cache(
    wish: dict[str, object], can_continue: bool, wants_warm: bool
) -> None:
    """ORCH-3086, ORCH-3009."""
    features = frozenset({"grammar", "json_schema"})
    async with House(routes=[route(features=features)]) as house:
        await house.submit("a", **wish)
        [spec] = specs(house)
        assert (spec.can_continue, spec.wants_warm) == (can_continue, wants_warm)


async def test_scheduler_is_told_the_budgets_of_the_session() -> None:
    """ORCH-3099."""
    async with House() as house:
        await house.submit("a", budgets=Budgets(100, 1.5, None))
        await house.submit("b")
        assert [spec.budgets for spec in specs(house)] == [Budgets(100, 1.5, None), None]


async def test_budgets_that_are_left_are_told_at_acceptance_and_with_the_session() -> None:
    """ORCH-3099, ORCH-2004."""
    async with House() as house:
        house.ledger.budgets_left = lambda *_: Budgets(84, 1.5, None)  # type: ignore[method-assign]
        acceptance = await house.submit("a", session_id="s")
        assert acceptance.budgets == Budgets(84, 1.5, None)
        assert house.sessions.get(TENANT, "s").budgets == Budgets(84, 1.5, None)
        assert await house.submit("a", session_id="s") == acceptance


@pytest.mark.parametrize(
    ("known", "warm"),
    [((None, None), None), ((None, False), False), ((False, True), True), ((None, True), True)],
)
async def test_session_is_warm_where_any_route_has_its_cache(
    known: tuple[bool | None, bool | None], warm: bool | None
) -> None:
    """ORCH-2004."""
    async with House(routes=[route("llamacpp/m"), route("llamacpp/o")]) as house:
        for scheduler, is_warm in zip(house.schedulers.values(), known, strict=True):
            scheduler.is_warm = lambda *_, is_warm=is_warm: is_warm  # type: ignore[method-assign]
        await house.submit("a", session_id="s")
        assert house.sessions.get(TENANT, "s").kv_warmth is warm


async def test_waiting_task_tells_its_predicted_start_and_why_it_waits_now() -> None:
    """ORCH-2010, ORCH-3029."""
    async with House() as house:
        await house.submit("running")
        await house.submit("a")
        house.scheduler.predict = lambda *_: (Estimate(1.5, 0.1), None)  # type: ignore[method-assign]
        view = house.tasks.get(TENANT, "a")
        assert (view.predicted_start_ms, view.timeline.preemptions) == (1500, 0)
        assert house.tasks.get(TENANT, "running").predicted_start_ms is None
        house.tell(0, ReplicaState.UNREADY)
        assert house.tasks.get(TENANT, "a").timeline.wait_reasons[-1] is WaitReason.NO_READY_REPLICA


# Checks before the queue


@pytest.mark.parametrize(
    "wish",
    [
        {"max_tokens": 33_000},
        {"expected_tokens": 17},
        {"ctx": 5000},
        {"max_tokens": 4096},
        {"sampler_profile_version": "2"},
        {"sampling": Sampling(grammar="root ::= x")},
        {"sampling": Sampling(json_schema={})},
        {"prompt": None},
    ],
)
async def test_peer_bug_06_what_cannot_be_done_is_refused_and_leaves_nothing(wish: dict[str, object]) -> None:
    async with House() as house:
        with pytest.raises(InvalidParams):
            await house.submit("a", **wish)
        assert house.records.find((TENANT, "a")) is None
        assert len(house.ledger.sessions) == len(house.journal.decisions) == 0
        assert house.telemetry.rejections == ["INVALID_PARAMS"]


async def test_strict_task_is_refused_where_nothing_is_exact() -> None:
    """ORCH-3147."""
    async with House(routes=[route(can_be_strict=False)]) as house:
        with pytest.raises(InvalidParams):
            await house.submit(strict=True)


async def test_prompt_beyond_the_limit_is_too_large() -> None:
    async with House(limits=Limits(prompt_chars=10)) as house:
        with pytest.raises(PayloadTooLarge):
            await house.submit(prompt="x" * 11)
        with pytest.raises(PayloadTooLarge):
            await house.submit(prompt=None, messages=(Message("user", "x" * 6), Message("user", "y" * 5)))


async def test_model_of_several_engines_needs_the_engine() -> None:
    """ORCH-2023."""
    routes = [route("llamacpp/m"), route("vllm/m")]
    async with House(routes=routes) as house:
        with pytest.raises(InvalidParams) as refused:
            await house.submit()
        assert refused.value.details == {"engines": ["llamacpp", "vllm"]}
        await house.submit(engine="vllm")
        assert house.record().route.engine == "vllm"
        for wish in ({"model_ref": "nobody"}, {"engine": "tgi"}, {"workload": "embedding"}):
            with pytest.raises(NotFound):
                await house.submit("other", **wish)


async def test_seed_follows_from_the_task_id_when_none_is_given() -> None:
    """ORCH-2024."""
    async with House() as house:
        for name in ("a", "b"):
            await house.submit(name)
        await house.tasks.submit(submission("a", tenant="other"), "c")
        await house.submit("c", seed=0)
        assert house.record("a").seed == house.record("a", "other").seed != house.record("b").seed
        assert 0 <= house.record("a").seed < SEEDS == 4294967295
        assert house.record("c").seed == 0


# The context


async def test_prompt_that_does_not_fit_is_refused_before_the_queue() -> None:
    async with House() as house:
        house.engine.count = lambda _: 4081
        with pytest.raises(InvalidParams):
            await house.submit(prompt=LONG)
        assert house.records.find((TENANT, "t")) is None


async def test_peer_bug_14_others_are_served_while_a_tokenizer_counts() -> None:
    async with House(slots=2) as house:
        house.engine.counting.shut()
        counting = asyncio.create_task(house.submit("long", prompt=LONG))
        await settle()
        assert (await house.submit("short")).state is TaskState.RUNNING
        assert not counting.done()
        house.engine.counting.open()
        await counting


async def test_without_a_ready_replica_a_task_is_admitted_unchecked_and_checked_at_its_start() -> None:
    """ORCH-3113."""
    async with House() as house:
        house.tell(0, ReplicaState.LOADING)
        house.engine.count = lambda _: 4081
        assert (await house.submit(prompt=LONG)).state is TaskState.QUEUED
        assert house.engine.counting.entered == 0
        house.tell(0, ReplicaState.READY)
        await house.dispatcher.wait_idle()
        assert [event for event, _ in house.read_all()] == ["started", "error"]
        assert house.read_all()[-1][1]["code"] == "INVALID_PARAMS"
        assert house.engine.generations == []


async def test_tokenizer_that_cannot_be_reached_does_not_refuse_the_task() -> None:
    async with House() as house:
        await house.submit("running")
        house.engine.tokenizer = WorkerReset("gone")
        assert (await house.submit(prompt=LONG)).state is TaskState.QUEUED


async def test_messages_reach_the_engine_in_its_own_template() -> None:
    """ORCH-2020."""
    async with House() as house:
        await house.submit(prompt=None, messages=(Message("user", "hello"),))
        assert (await house.engine.generation(0)).order.prompt == "<user> hello\n"


async def test_sampling_of_the_task_overrides_the_profile_one_by_one() -> None:
    """ORCH-2025."""
    profile = Sampling(temperature=0.5, top_k=40)
    async with House(routes=[route(sampling=profile)]) as house:
        await house.submit(sampling=Sampling(temperature=0.0, stop=("x",)))
        order = (await house.engine.generation(0)).order
        assert order.sampling == Sampling(temperature=0.0, top_k=40, stop=("x",))


async def test_every_replica_gone_refuses() -> None:
    async with House() as house:
        house.tell(0, ReplicaState.FAILED)
        with pytest.raises(PoolUnready):
            await house.submit()


# Looking


async def test_view_of_a_task_tells_its_way() -> None:
    """ORCH-2010."""
    async with House() as house:
        await house.submit("first")
        await house.submit("a")
        waiting = house.tasks.get(TENANT, "a")
        assert (waiting.state, waiting.queue_position, waiting.output) == (TaskState.QUEUED, 0, None)
        assert waiting.timeline.wait_reasons == (WaitReason.SLOTS_BUSY,)
        house.clock.advance(2.0)
        (await house.engine.generation(0)).finish()
        generation = await house.engine.generation(1)
        house.clock.advance(1.0)
        generation.send("x")
        house.clock.advance(1.0)
        generation.finish("stop")
        await house.dispatcher.wait_idle()
        view = house.tasks.get(TENANT, "a")
        start = view.timeline.accepted_at
        assert (view.state, view.output, view.finish_reason) == (TaskState.SUCCEEDED, "x", "stop")
        assert view.timeline.waited_ms == 2000
        assert view.timeline.first_token_at == pytest.approx(start + 3.0)
        assert view.timeline.ended_at == pytest.approx(start + 4.0)
        assert view.timeline.wait_reasons == (WaitReason.SLOTS_BUSY,)
        assert view.placement is not None
        assert view.placement.attempt_id == 2


async def test_output_lives_as_long_as_the_transcript() -> None:
    async with House(FakeEnginePort(answer=["a"]), retention=Retention(10.0, 100.0)) as house:
        await house.submit()
        await asyncio.sleep(9.0)
        assert house.tasks.get(TENANT, "t").output == "a"
        await asyncio.sleep(2.0)
        assert house.tasks.get(TENANT, "t").output is None


async def test_list_gives_own_tasks_in_pages_newest_first() -> None:
    async with House() as house:
        for number in range(5):
            await house.submit(f"t{number}", session_id=f"s{number % 2}")
        await house.tasks.submit(submission("foreign", tenant="other"), "c")
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page, cursor = house.tasks.list(TENANT, state=None, session_id=None, limit=2, cursor=cursor)
            seen += [view.task_id for view in page]
            if cursor is None:
                break
            await house.submit(f"new {len(seen)}")  # a page does not shift when tasks arrive
        assert seen == ["t4", "t3", "t2", "t1", "t0"]
        queued, _ = house.tasks.list(TENANT, state=TaskState.QUEUED, session_id="s0", limit=10, cursor=None)
        assert [view.task_id for view in queued] == ["t4", "t2"]


@pytest.mark.parametrize("cursor", ["", "x", "ü", "AAAA", "=" * 20])
async def test_cursor_that_was_not_given_out_is_refused(cursor: str) -> None:
    async with House() as house:
        with pytest.raises(InvalidParams):
            house.tasks.list(TENANT, state=None, session_id=None, limit=2, cursor=cursor)


@pytest.mark.parametrize("tenant", ["other", ""])
async def test_peer_bug_22_foreign_task_is_not_found(tenant: str) -> None:
    """ORCH-2036."""
    async with House() as house:
        await house.submit()
        for look in (lambda: house.tasks.get(tenant, "t"), lambda: house.tasks.follow(tenant, "t", 0)):
            with pytest.raises(NotFound):
                look()
        with pytest.raises(NotFound):
            await house.tasks.cancel(tenant, "t")
        assert house.state() is TaskState.RUNNING


# Following


async def test_resume_is_answered_by_what_was_sent() -> None:
    async with House(FakeEnginePort(answer=["a"]), retention=Retention(10.0, 100.0)) as house:
        await house.submit()
        await house.dispatcher.wait_idle()
        assert house.follow(after=2).take().startswith(b"id: 3\nevent: end\n")
        assert house.tasks.follow(TENANT, "t", 3) is None
        with pytest.raises(InvalidParams):
            house.tasks.follow(TENANT, "t", 4)
        await asyncio.sleep(11.0)
        with pytest.raises(StreamGone):
            house.tasks.follow(TENANT, "t", 0)


async def test_open_streams_are_limited_and_leaving_makes_room() -> None:
    async with House(limits=Limits(open_streams=2)) as house:
        await house.submit()
        first, _ = house.follow(), house.follow()
        with pytest.raises(QuotaExceeded) as refused:
            house.follow()
        assert refused.value.policy_label == "open-streams"
        first.leave()
        first.leave()
        house.follow()
        assert len(house.readers) == 2


async def test_reader_of_a_forgotten_task_does_not_count_for_a_new_one_of_that_id() -> None:
    async with House(FakeEnginePort(), retention=Retention(records_per_tenant=1)) as house:
        await house.submit("a")
        (await house.engine.generation(0)).finish()
        await house.dispatcher.wait_idle()
        old = house.follow("a")
        await house.submit("b")
        (await house.engine.generation(1)).finish()
        await house.dispatcher.wait_idle()
        await house.submit("a")
        house.follow("a")
        old.leave()
        await asyncio.sleep(60.0)
        assert house.state("a") is TaskState.RUNNING
        assert house.record("a").admitted.readers == 1
