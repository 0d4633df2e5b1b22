"""Steps about shares, full queues, quotas, budgets, predictions, preemption and affinity."""

import time
from itertools import pairwise

from behave import given, step, then, when
from behave.runner import Context
from prometheus_client.parser import text_string_to_metric_families

from tests.support.driver import FINAL, accepted
from tests.support.engines import FakeEngineProcess
from tests.support.processes import wait_for
from tests.support.wire import check_whole
from tests.support.world import World


@when('{who:Who} submits {count:d} tasks "{name:Name}" to {model:Model}')
def step_submit_several(context: Context, who: str, count: int, name: str, model: str) -> None:
    _submit_several(context.world, who, name, model, count=count)


@when('{who:Who} submits {count:d} tasks "{name:Name}" to {model:Model} with prompts of {words:d} words')
def step_submit_long(context: Context, who: str, count: int, name: str, model: str, *, words: int) -> None:
    filling = " word" * (words - 3)
    for number in range(1, count + 1):
        accepted(context.world.submit(who, f"{name} {number}", model, prompt=f"say {name} {number}{filling}"))


@when('{who:Who} submits {count:d} tasks "{name:Name}" to {model:Model} with priority {priority:w}')
def step_submit_several_at(context: Context, who: str, count: int, name: str, model: str, *, priority: str) -> None:
    _submit_several(context.world, who, name, model, count=count, priority=priority)


@then('"{name:Name}" is accepted as queued')
def step_accepted_queued(context: Context, name: str) -> None:
    acceptance = accepted(context.world.answer)
    assert acceptance["task_id"] == context.world.ids[name], acceptance
    assert acceptance["state"] == "queued", acceptance


@then('"{name:Name}" is accepted as queued before {count:d} others')
def step_accepted_before(context: Context, name: str, count: int) -> None:
    """At least so many of the tasks that wait are told a later place."""
    world = context.world
    mine = world.look(name)["queue_position"]
    assert world.acceptances[name]["state"] == "queued"
    behind = [other for other in world.owners if (world.look(other)["queue_position"] or -1) > mine]
    assert len(behind) >= count, (mine, behind)


@then('"{name:Name}" waits behind at least {count:d} others')
def step_waits_behind(context: Context, name: str, count: int) -> None:
    task = context.world.look(name)
    assert task["queue_position"] >= count, task


@then('while both waited {model:Model} served {many:d} "{more:Name}" for {few:d} "{fewer:Name}"')
def step_ratio(context: Context, model: str, *, many: int, more: str, few: int, fewer: str) -> None:
    """At any moment until one of them was done, give or take one turn."""
    counts = {more: 0, fewer: 0}
    seen = _order(context, model)
    totals = {name: seen.count(name) for name in counts}
    for name in seen[1:]:
        counts[name] += 1
        if counts[name] == totals[name] - (seen[0] == name):
            break
        off = counts[more] / many - counts[fewer] / few
        assert abs(off) <= 1 + 1 / many, (counts, seen)


@then('between two "{rare:Name}" {model:Model} served at least {count:d} "{often:Name}"')
def step_between(context: Context, rare: str, model: str, count: int, often: str) -> None:
    """The first one started before anybody else was there."""
    seen = _order(context, model)[1:]
    places = [place for place, name in enumerate(seen) if name == rare]
    total = seen.count(often)
    for first, second in pairwise(places):
        between = seen[first:second].count(often)
        assert between >= count or seen[:second].count(often) == total, seen


@then("admission_share tells of {tenant:w} and {other:w}, and all shares add up to 1")
def step_admission_share(context: Context, tenant: str, other: str) -> None:
    samples = _samples(context, "admission_share")
    assert {tenant, other} <= {labels["tenant"] for labels, _ in samples}, samples
    assert abs(sum(value for _, value in samples) - 1) < 0.01, samples


@then("deadlines_met_ratio of {priority:w} is between {least:d} and {most:d}")
def step_deadlines_met(context: Context, priority: str, least: int, most: int) -> None:
    [value] = [value for labels, value in _samples(context, "deadlines_met_ratio") if labels["priority"] == priority]
    assert least < value <= most, value


# Quotas


@given("{model:Model} ends its output after {count:d} tokens")
def step_eos(context: Context, model: str, count: int) -> None:
    context.world.deployment.fake(model).command(set={"eos_after": count})


@then('{who:Who} is told that "{name:Name}" is queued because of {reason:w}')
def step_reason(context: Context, who: str, name: str, reason: str) -> None:
    advice = context.world.stream(who, name).until("queued")
    assert advice.data["reason"] == reason, advice


@then("the answer says to wait between {least:d} and {most:d} ms")
def step_wait_told(context: Context, least: int, most: int) -> None:
    answer = context.world.answer
    told = answer.json()["retry_after_ms"]
    assert told is not None, answer.text
    assert least <= told <= most, answer.text
    assert answer.headers["x-backoff-ms"] == str(told)
    assert answer.headers["retry-after"] == str(-(-told // 1000))


@when('{who:Who} waits as long as "{name:Name}" was told')
def step_wait_as_told(context: Context, who: str, name: str) -> None:
    refusals = [answer for answer in context.world.answers if answer.status_code == 429]
    time.sleep(refusals[-1].json()["retry_after_ms"] / 1000)


# Budgets


@when(
    '{who:Who} submits "{name:Name}" to {model:Model} with max_tokens {most:d} in session "{session:Name}"'
    " with a budget of {amount:d} {kind:w}"
)
def step_submit_budgeted(
    context: Context, who: str, name: str, model: str, *, most: int, session: str, amount: int, kind: str
) -> None:
    fields = {"max_tokens": most, "session_id": context.world.id_of(session), "session_budgets": {kind: amount}}
    context.world.submit(who, name, model, **fields)


@then('at most {most:d} and at least {least:d} tokens remain, by header, body and session "{session:Name}"')
def step_remain(context: Context, most: int, least: int, session: str) -> None:
    answer = context.world.answer
    budgets = answer.json()["budgets"]
    assert least <= budgets["tokens"] <= most, answer.text
    assert (budgets["time_ms"], budgets["cost"]) == (None, None), answer.text
    assert answer.headers["x-budget-tokens-remaining"] == str(budgets["tokens"])
    assert "x-budget-time-remaining-ms" not in answer.headers
    assert "x-budget-cost-remaining" not in answer.headers
    assert _session(context, session)["budgets"] == budgets


@then('what remains of the {limit:d} {kind:w} of session "{session:Name}" is what "{name:Name}" did not use')
def step_unused(context: Context, limit: int, kind: str, session: str, name: str) -> None:
    """The pools of this service ask a price of 1 for every token."""
    usage = context.world.look(name)["usage"]
    used = usage["prompt_tokens"] + usage["completion_tokens"]
    wait_for(lambda: _session(context, session)["budgets"][kind] == limit - used, f"{limit - used} {kind} remain", 5)


# Predictions


@given("{model:Model} has served {count:d} tasks of {tokens:d} tokens")
def step_served(context: Context, model: str, count: int, tokens: int) -> None:
    """Enough for its rates to be known. Once for a run: they are remembered."""
    world = context.world
    caller = world.deployment.caller("Bob")
    if world.deployment.fake(model) in SERVED:
        return
    for _ in range(count):
        task = caller.accept(model_ref=model, max_tokens=tokens)
        caller.wait_state(task["task_id"], *FINAL)
    SERVED.append(world.deployment.fake(model))


SERVED: list[FakeEngineProcess] = []


@then("the problem tells a start in {least:d} to {most:d} ms")
def step_predicted(context: Context, least: int, most: int) -> None:
    details = context.world.answer.json()["details"]
    assert least <= details["predicted_start_ms"] <= most, details


@then('"{name:Name}" is accepted as queued with a start predicted in {least:d} to {most:d} ms')
def step_accepted_predicted(context: Context, name: str, least: int, most: int) -> None:
    acceptance = context.world.acceptances[name]
    assert acceptance["state"] == "queued", acceptance
    assert least <= acceptance["predicted_start_ms"] <= most, acceptance


@then('{who:Who} is told that "{name:Name}" will be in time with a probability above {least:f}')
def step_probability(context: Context, who: str, name: str, least: float) -> None:
    stream = context.world.stream(who, name)
    while (told := stream.until("metrics").data.get("on_time_probability")) is None:
        pass
    assert least < told <= 1, stream.frames


# Preemption


@then('{who:Who} is told that "{name:Name}" was preempted and is resumable')
def step_preempted(context: Context, who: str, name: str) -> None:
    stream = context.world.stream(who, name)
    while (data := stream.until("metrics").data).get("preempted") is None:
        pass
    assert (data["preempted"], data["resumable"]) == (True, True), stream.frames


@then('"{name:Name}" was preempted {count:d} time')
def step_preemptions(context: Context, name: str, count: int) -> None:
    timeline = context.world.look(name)["timeline"]
    assert timeline["preemptions"] == count, timeline


@then('the engine of {model:Model} saw "{name:Name}" go on behind its first {count:d} tokens')
def step_continued(context: Context, model: str, name: str, count: int) -> None:
    """Best effort: the second prompt is the first with the text so far, and asks for the tokens that are left."""
    world = context.world
    body = world.bodies[name]
    requests = world.deployment.fake(model).report()["requests"]
    first, second = [each for each in requests if each["prompt"].startswith(body["prompt"])]
    frames = check_whole(world.stream(world.owners[name], name).frames)
    text = "".join(frame.data["t"] for frame in frames if frame.event == "token" and frame.data["i"] < count)
    assert first["prompt"] == body["prompt"], first
    assert second["prompt"] == body["prompt"] + text, second
    assert second["max_tokens"] == body["max_tokens"] - count, second


# Affinity


@then('"{name:Name}" started with affinity null')
def step_no_affinity(context: Context, name: str) -> None:
    assert _started(context, name)["affinity"] is None


@then('"{name:Name}" started with affinity {affinity:w} and kv_warmth {warmth:w}')
def step_affinity(context: Context, name: str, affinity: str, warmth: str) -> None:
    started = _started(context, name)
    assert (started["affinity"], started["kv_warmth"]) == (affinity, warmth == "true"), started


@then('"{name:Name}" ran where "{other:Name}" did')
def step_same_place(context: Context, name: str, other: str) -> None:
    assert _place(context, name) == _place(context, other)


@then('"{name:Name}" ran elsewhere than "{other:Name}"')
def step_other_place(context: Context, name: str, other: str) -> None:
    assert _place(context, name) != _place(context, other)


@step('{who:Who} cancels the one that does not run where "{name:Name}" did')
def step_cancel_other(context: Context, who: str, name: str) -> None:
    world = context.world
    running = [each for each in ("his", "his next") if world.wait_state(each, "running")]
    [away] = [each for each in running if _place(context, each) != _place(context, name)]
    assert world.deployment.caller(who).cancel(world.ids[away]).status_code == 204
    replica = _place(context, away)

    def is_free() -> bool:
        replicas = world.deployment.caller("the operator").health("twins")["replicas"]
        return any(each["replica_id"] == replica and each["slots_busy"] == 0 for each in replicas)

    wait_for(is_free, f"{replica} is free")


@then('the stream of "{name:Name}" ends well')
def step_ends_well(context: Context, name: str) -> None:
    frames = check_whole(context.world.stream(context.world.owners[name], name).to_end())
    assert frames[-1].event == "end", frames[-1]


@then('{who:Who} finds a warm session "{session:Name}"')
def step_warm_session(context: Context, who: str, session: str) -> None:
    found = _session(context, session)
    assert found["kv_warmth"] is True, found


@then('the engine that ran "{name:Name}" has erased a slot')
def step_erased(context: Context, name: str) -> None:
    engines = [context.world.deployment.fake(each) for each in ("twins", "the-twin")]
    engine = engines[int(_place(context, name).rpartition("/")[2])]
    wait_for(lambda: engine.report()["erased"], "a slot is erased")


def _submit_several(world: World, who: str, name: str, model: str, *, count: int, **fields: int | str) -> None:
    for number in range(1, count + 1):
        accepted(world.submit(who, f"{name} {number}", model, **fields))


def _order(context: Context, model: str) -> list[str]:
    """The names of what the engine saw, without their numbers, in order."""
    requests = context.world.deployment.fake(model).report()["requests"]
    return [request["prompt"].split()[1] for request in requests]


def _samples(context: Context, family: str) -> list[tuple[dict[str, str], float]]:
    text = context.world.deployment.caller("the operator").http.get("/metrics").text
    families = text_string_to_metric_families(text)
    return [(sample.labels, sample.value) for metric in families for sample in metric.samples if sample.name == family]


def _session(context: Context, session: str) -> dict:
    """The session, as the owner of its first task sees it."""
    world = context.world
    owner = next(
        world.owners[name] for name, body in world.bodies.items() if body.get("session_id") == world.ids[session]
    )
    response = world.deployment.caller(owner).http.get(f"/v1/sessions/{world.ids[session]}")
    assert response.status_code == 200, response.text
    return response.json()


def _started(context: Context, name: str) -> dict:
    world = context.world
    frames = world.deployment.caller(world.owners[name]).read(world.ids[name])
    assert frames[0].event == "started", frames
    return frames[0].data


def _place(context: Context, name: str) -> str:
    return context.world.look(name)["placement"]["replica_id"]
