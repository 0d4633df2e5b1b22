"""Steps that hand in tasks and look at them."""

from concurrent.futures import ThreadPoolExecutor

from behave import given, step, then, when
from behave.runner import Context

from features.vocabulary import parse_fields
from llorch.testing.fake_dialects import make_tokens
from tests.support.driver import FINAL, accepted
from tests.support.processes import wait_for
from tests.support.world import World


@given('the service "{name:Name}"')
def step_service(context: Context, name: str) -> None:
    if context.world is None:
        context.world = World(context.deployments.get(name))


@given("{model:Model} holds its tokens")
def step_hold(context: Context, model: str) -> None:
    context.world.deployment.fake(model).command(set={"hold": True})


@when("{model:Model} releases {count:d} tokens each")
def step_release(context: Context, model: str, count: int) -> None:
    engine = context.world.deployment.fake(model)
    wait_for(lambda: engine.report()["generations"] > 0, f"a generation at {model}")
    engine.release(count)


@when("{model:Model} lets everything go on")
def step_release_all(context: Context, model: str) -> None:
    engine = context.world.deployment.fake(model)
    engine.command(set={"hold": False})
    engine.release(1_000_000)


@step('{who:Who} submits "{name:Name}" to {model:Model}')
@step('{who:Who} submits "{name:Name}" to {model:Model} without a seed')
def step_submit(context: Context, who: str, name: str, model: str) -> None:
    context.world.submit(who, name, model)


@step('{who:Who} submits "{name:Name}" to {model:Model} with {fields:Fields}')
def step_submit_with(context: Context, who: str, name: str, model: str, fields: str) -> None:
    context.world.submit(who, name, model, **parse_fields(fields))


@step('{who:Who} submits "{name:Name}" to {model:Model} in session "{session:Name}"')
def step_submit_in_session(context: Context, who: str, name: str, model: str, session: str) -> None:
    context.world.submit(who, name, model, session_id=context.world.id_of(session))


@step('{who:Who} submits "{name:Name}" to {model:Model} with {fields:Fields} in session "{session:Name}"')
def step_submit_with_in_session(
    context: Context, who: str, name: str, model: str, *, fields: str, session: str
) -> None:
    context.world.submit(who, name, model, **parse_fields(fields), session_id=context.world.id_of(session))


@when('{who:Who} submits "{name:Name}" to {model:Model} with the message "{content}"')
def step_submit_message(context: Context, who: str, name: str, model: str, content: str) -> None:
    world = context.world
    body = {"messages": [{"role": "user", "content": content}], "task_id": world.id_of(name), "model_ref": model}
    world.answers.append(world.deployment.caller(who).http.post("/v1/tasks", json=body))
    accepted(world.answer)
    world.owners[name] = who


@when('{who:Who} has {model:Model} continue: "{text}"')
def step_continue(context: Context, who: str, model: str, text: str) -> None:
    fields = {"max_tokens": 8, "seed": 1, "sampling": {"temperature": 0}, "determinism": "strict"}
    accepted(context.world.submit(who, "the text", model, prompt=text, **fields))


@when('{who:Who} asks {model:Model}: "{question}"')
def step_ask(context: Context, who: str, model: str, question: str) -> None:
    world = context.world
    messages = [{"role": "user", "content": question}]
    body = {"task_id": world.id_of("the question"), "model_ref": model, "messages": messages, "max_tokens": 12}
    accepted(world.deployment.caller(who).http.post("/v1/tasks", json=body))
    world.owners["the question"] = who


@when('{who:Who} submits "{name:Name}" to {model:Model} with a broken grammar')
def step_submit_broken_grammar(context: Context, who: str, name: str, model: str) -> None:
    accepted(context.world.submit(who, name, model, sampling={"grammar": "root ::= ("}))


@when('{who:Who} submits "{name:Name}" to {model:Model} with the correlation id {correlation_id}')
def step_submit_correlated(context: Context, who: str, name: str, model: str, correlation_id: str) -> None:
    http = context.world.deployment.caller(who).http
    http.headers["X-Correlation-Id"] = correlation_id
    try:
        context.world.submit(who, name, model)
    finally:
        del http.headers["X-Correlation-Id"]


@when('{who:Who} submits the same "{name:Name}" again')
def step_submit_again(context: Context, who: str, name: str) -> None:
    body = context.world.bodies[name]
    fields = {key: value for key, value in body.items() if key not in ("task_id", "model_ref")}
    context.world.submit(who, name, body["model_ref"], **fields)


@when('{who:Who} submits "{name:Name}" again under his own name')
def step_submit_same_id(context: Context, who: str, name: str) -> None:
    first = context.world.look(name)
    response = context.world.submit(who, name, context.world.bodies[name]["model_ref"])
    accepted(response)
    context.world.facts["seeds"] = (first["seed"], context.world.look(name)["seed"])


@then('both tasks named "{name:Name}" had the same seed')
def step_same_seed(context: Context, name: str) -> None:
    one, other = context.world.facts["seeds"]
    assert one == other, (one, other)


@when('{who:Who} submits "{name:Name}" to {model:Model} {count:d} times at once')
def step_submit_at_once(context: Context, who: str, name: str, model: str, count: int) -> None:
    world = context.world
    world.id_of(name)
    with ThreadPoolExecutor(count) as crowd:
        world.facts["crowd"] = list(crowd.map(lambda _: world.submit(who, name, model), range(count)))


@then("all of them got the same 202")
def step_all_same(context: Context) -> None:
    answers = context.world.facts["crowd"]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1, [answer.text for answer in answers]


@when('{who:Who} submits {count:d} tasks to {model:Model} in session "{session:Name}" at once')
def step_submit_many(context: Context, who: str, count: int, model: str, session: str) -> None:
    world = context.world
    session_id = world.id_of(session)
    with ThreadPoolExecutor(count) as crowd:
        submits = crowd.map(lambda n: world.submit(who, f"{session} {n}", model, session_id=session_id), range(count))
        world.facts["crowd"] = list(submits)


@then("{taken:d} of them got 202 and {refused:d} got 429")
def step_taken(context: Context, taken: int, refused: int) -> None:
    statuses = sorted(answer.status_code for answer in context.world.facts["crowd"])
    assert statuses == [202] * taken + [429] * refused, statuses


@then('"{name:Name}" is accepted as {state:State} at position {position:d}')
def step_accepted(context: Context, name: str, state: str, position: int) -> None:
    acceptance = context.world.acceptances[name]
    assert (acceptance["state"], acceptance["queue_position"]) == (state, position), acceptance


@then('the acceptance of "{name:Name}" predicts a start at once, or nothing')
def step_predicts_nothing_else(context: Context, name: str) -> None:
    acceptance = context.world.acceptances[name]
    assert acceptance["predicted_start_ms"] in (None, 0), acceptance
    assert acceptance["budgets"] is None, acceptance


@then('the answer is the first one to "{name:Name}", byte for byte')
def step_first_answer(context: Context, name: str) -> None:
    wanted = context.world.ids[name].encode()
    answers = [answer for answer in context.world.answers if answer.status_code == 202 and wanted in answer.content]
    assert len(answers) > 1
    assert context.world.answer.status_code == 202, context.world.answer.text
    assert context.world.answer.content == answers[0].content


@step('"{name:Name}" is {state:State}')
def step_state(context: Context, name: str, state: str) -> None:
    task = context.world.wait_state(name, state, *FINAL)
    assert task["state"] == state, task


@step('{who:Who}\'s "{name:Name}" has ended')
def step_ended(context: Context, who: str, name: str) -> None:
    world = context.world
    world.deployment.caller(who).wait_state(world.ids[name], *FINAL)


@step("all of them have ended")
def step_all_ended(context: Context) -> None:
    for name in context.world.owners:
        task = context.world.wait_state(name, *FINAL)
        assert task["state"] == "succeeded", task


@then('"{name:Name}" waits at position {position:d}')
def step_waits(context: Context, name: str, position: int) -> None:
    task = context.world.look(name)
    assert (task["state"], task["queue_position"]) == ("queued", position), task


@then('"{name:Name}" is still running for {seconds:f} s')
def step_still_running(context: Context, name: str, seconds: float) -> None:
    """Watches all the while, so that an end within the time is seen whenever it comes."""
    try:
        task = context.world.deployment.caller(context.world.owners[name]).wait_state(
            context.world.ids[name], *FINAL, within_s=seconds
        )
    except AssertionError:
        task = context.world.look(name)
    assert task["state"] == "running", task


@then('"{name:Name}" has waited between {least:d} and {most:d} ms')
def step_waited(context: Context, name: str, least: int, most: int) -> None:
    timeline = context.world.look(name)["timeline"]
    assert least <= timeline["waited_ms"] <= most, timeline
    assert timeline["attempts"] == 0, timeline


@then('the error of "{name:Name}" is {code:Code}')
def step_error(context: Context, name: str, code: str) -> None:
    error = context.world.look(name)["error"]
    assert error["code"] == code, error


@then('"{name:Name}" is succeeded with that output and finish_reason {reason:w}')
def step_output(context: Context, name: str, reason: str) -> None:
    task = context.world.wait_state(name, *FINAL)
    assert task["state"] == "succeeded", task
    assert task["output"] == {"text": context.world.facts["text"]}, task
    assert task["finish_reason"] == reason, task
    assert task["usage"]["completion_tokens"] == context.world.bodies[name]["max_tokens"], task
    assert task["timeline"]["ended_at"] >= task["timeline"]["started_at"] >= task["timeline"]["accepted_at"], task


@then('the output of "{name:Name}" is gone, too')
def step_output_gone(context: Context, name: str) -> None:
    assert context.world.look(name)["output"] is None


@then('its text is what the engine made for "{name:Name}"')
def step_engine_text(context: Context, name: str) -> None:
    world = context.world
    body = world.bodies[name]
    tokens = make_tokens(body["prompt"], world.look(name)["seed"], body["max_tokens"])
    assert world.facts["text"] == "".join(tokens), world.facts["text"]


@then("the engine of {model:Model} saw {count:d} generation")
@then("the engine of {model:Model} saw {count:d} generations")
def step_generations(context: Context, model: str, count: int) -> None:
    report = context.world.deployment.fake(model).report()
    assert report["generations"] == count, report


@then("the engine of {model:Model} saw them in this order: {names}")
def step_order(context: Context, model: str, names: str) -> None:
    seen = [request["prompt"] for request in context.world.deployment.fake(model).report()["requests"]]
    assert seen == [f"say {name}" for name in names.split(", ")], seen


@then('the engine of {model:Model} saw "{name:Name}" cancelled after {count:d} tokens')
def step_engine_cancelled(context: Context, model: str, name: str, count: int) -> None:
    engine = context.world.deployment.fake(model)

    def look():
        found = [each for each in engine.report()["requests"] if each["prompt"] == f"say {name}"]
        return found if found and found[0]["state"] != "running" else None

    [request] = wait_for(look, f"the engine let {name} go")
    assert (request["state"], request["tokens_sent"]) == ("cancelled", count), request


@then('the engine of {model:Model} saw the prompt "{prompt}"')
def step_saw_prompt(context: Context, model: str, prompt: str) -> None:
    assert prompt in [each["prompt"] for each in context.world.deployment.fake(model).report()["requests"]]


@then('the engine of {model:Model} saw a prompt that ends in "{end}"')
def step_saw_prompt_end(context: Context, model: str, end: str) -> None:
    prompts = [each["prompt"] for each in context.world.deployment.fake(model).report()["requests"]]
    assert any(prompt.endswith(end.replace("\\n", "\n")) for prompt in prompts), prompts


@then("the engine of {model:Model} saw the seed {seed:d}")
def step_saw_seed(context: Context, model: str, seed: int) -> None:
    seeds = [each["seed"] for each in context.world.deployment.fake(model).report()["requests"]]
    assert seed in seeds, seeds


@then("{who:Who}'s list in pages of {size:d} begins with: {names}")
def step_list(context: Context, who: str, size: int, names: str) -> None:
    world, http = context.world, context.world.deployment.caller(who).http
    wanted = [world.ids[name] for name in names.split(", ")]
    found: list[str] = []
    cursor = {}
    while len(found) < len(wanted):
        page = http.get("/v1/tasks", params={"limit": size, **cursor}).json()
        assert len(page["tasks"]) == size, page
        found += [task["task_id"] for task in page["tasks"]]
        cursor = {"cursor": page["next_cursor"]}
    assert found[: len(wanted)] == wanted, found


@given("{who:Who} has filled the interactive queue of {model:Model}")
def step_fill(context: Context, who: str, model: str) -> None:
    for name in ("running", "waiting 1", "waiting 2"):
        accepted(context.world.submit(who, name, model))


@step('{who:Who} does not find "{name:Name}"')
def step_not_found(context: Context, who: str, name: str) -> None:
    response = context.world.deployment.caller(who).http.get(f"/v1/tasks/{context.world.ids[name]}")
    assert response.status_code == 404, response.text


@then('"{name:Name}" is succeeded with all of its {count:d} tokens')
def step_all_tokens(context: Context, name: str, count: int) -> None:
    world = context.world
    task = world.deployment.caller(world.owners[name]).wait_state(world.ids[name], *FINAL, within_s=60)
    assert (task["state"], task["usage"]["completion_tokens"]) == ("succeeded", count), task


@then('"{name:Name}" is there for whoever asks, with any key')
def step_local(context: Context, name: str) -> None:
    http = context.world.deployment.caller("Alice").http
    path = f"/v1/tasks/{context.world.ids[name]}"
    for headers in ({}, {"Authorization": "Bearer llk_whatever"}, {"X-Tenant": "other"}):
        assert http.get(path, headers=headers).status_code == 200


@then('{who:Who} no longer finds the session "{session:Name}" before long')
def step_session_expires(context: Context, who: str, session: str) -> None:
    http = context.world.deployment.caller(who).http
    path = f"/v1/sessions/{context.world.ids[session]}"
    wait_for(lambda: http.get(path).status_code == 404, f"session {session} is forgotten", 5)
