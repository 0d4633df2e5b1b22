"""Steps that follow, cancel, resume and leave streams."""

import re
import statistics
import time

from behave import then, when
from behave.runner import Context

from tests.support.driver import accepted
from tests.support.processes import wait_for
from tests.support.wire import Frame, check_whole, durable


@when('{who:Who} reads the stream of "{name:Name}" to its end')
def step_read(context: Context, who: str, name: str) -> None:
    world = context.world
    frames = world.deployment.caller(who).read(world.ids[name])
    world.facts["frames"] = frames
    world.facts["text"] = _text(frames)


@then("it is: {shape}")
def step_shape(context: Context, shape: str) -> None:
    assert _shape(context.world.facts["frames"]) == _normal(shape), context.world.facts["frames"]


@then("it is a started frame, tokens, and an end")
def step_real_shape(context: Context) -> None:
    events = [frame.event for frame in context.world.facts["frames"]]
    assert events == ["started", *["token"] * (len(events) - 2), "end"], events
    assert len(events) > 4, events


@then('the answer contains "{words}"')
def step_contains(context: Context, words: str) -> None:
    assert words in context.world.facts["text"], context.world.facts["text"]


@when('{who:Who} follows "{name:Name}"')
def step_follow(context: Context, who: str, name: str) -> None:
    context.world.follow(who, name)


@when('{who:Who} follows "{name:Name}" from a second place')
def step_follow_second(context: Context, who: str, name: str) -> None:
    context.world.follow(who, name, label="second")


@when('{who:Who} follows "{name:Name}" {count:d} times')
def step_follow_often(context: Context, who: str, name: str, count: int) -> None:
    for number in range(count):
        stream = context.world.follow(who, name, label=str(number))
        assert stream.response.status_code == 200, stream.response.text


@when('{who:Who} opens one more stream of "{name:Name}"')
def step_follow_more(context: Context, who: str, name: str) -> None:
    context.world.follow(who, name, label="more")


@when('{who:Who} resumes "{name:Name}" after {last_event_id}')
def step_resume(context: Context, who: str, name: str, last_event_id: str) -> None:
    context.world.follow(who, name, last_event_id)


@when('{who:Who} has read {count:d} tokens of "{name:Name}"')
def step_read_tokens(context: Context, who: str, count: int, name: str) -> None:
    context.world.stream(who, name).until("token", count)


@when('{who:Who} goes away from "{name:Name}"')
def step_leave(context: Context, who: str, name: str) -> None:
    context.world.stream(who, name).close()


@when('{who:Who} cancels "{name:Name}"')
def step_cancel(context: Context, who: str, name: str) -> None:
    world = context.world
    world.answers.append(world.deployment.caller(who).cancel(world.ids[name]))


@then('the stream of "{name:Name}" is: {shape}')
def step_stream_is(context: Context, name: str, shape: str) -> None:
    _check_stream(context, context.world.owners[name], name, shape)


@then('the stream of "{name:Name}" for {who:Who} is: {shape}')
def step_stream_is_for(context: Context, name: str, who: str, shape: str) -> None:
    _check_stream(context, who, name, shape)


@then('the stream of "{name:Name}" from the second place is: {shape}')
def step_second_stream_is(context: Context, name: str, shape: str) -> None:
    _check_stream(context, context.world.owners[name], name, shape, "second")


@then('the stream of "{name:Name}" ends with a retriable error of the policy {policy:Model}')
def step_stream_ends(context: Context, name: str, policy: str) -> None:
    frames = check_whole(context.world.stream(context.world.owners[name], name).to_end())
    error = frames[-1].data
    assert (frames[-1].event, error["retriable"], error["policy_label"]) == ("error", True, policy), error


@then('the error frame of "{name:Name}" is retriable and names the policy {policy:Model}')
def step_error_frame(context: Context, name: str, policy: str) -> None:
    error = context.world.stream(context.world.owners[name], name).frames[-1].data
    assert (error["retriable"], error["policy_label"]) == (True, policy), error


@then('the error frame of "{name:Name}" has the correlation id {correlation_id}')
def step_error_frame_correlated(context: Context, name: str, correlation_id: str) -> None:
    error = context.world.stream(context.world.owners[name], name).frames[-1].data
    assert error["correlation_id"] == correlation_id, error


@then('{who:Who} is told that "{name:Name}" is queued at position {position:d} because of {reason:w}')
def step_advice(context: Context, who: str, name: str, position: int, reason: str) -> None:
    advice = context.world.stream(who, name).until("queued")
    told = advice.data.pop("predicted_start_ms")
    assert told is None or told >= 0, told
    assert advice.data == {"queue_position": position, "reason": reason}, advice


@then('{who:Who} gets {count:d} heartbeats on "{name:Name}" within {seconds:d} s')
def step_heartbeats(context: Context, who: str, count: int, name: str, seconds: int) -> None:
    start = time.monotonic()
    context.world.stream(who, name).until("hb", count)
    assert time.monotonic() - start < seconds


@then('a reader who was cut off after each durable frame gets the rest of "{name:Name}" byte for byte')
def step_cut_off(context: Context, name: str) -> None:
    world = context.world
    caller, task_id = world.deployment.caller(world.owners[name]), world.ids[name]
    whole = [frame.raw for frame in world.facts["frames"]]
    for kept in range(1, len(whole)):
        with caller.follow(task_id) as stream:
            got = [stream.next().raw for _ in range(kept)]
        got += [frame.raw for frame in caller.read(task_id, after=kept)]
        assert got == whole, (kept, got)


@then("a second reader, cut off after every frame while {model:Model} releases token by token, gets the same bytes")
def step_cut_off_live(context: Context, model: str) -> None:
    world = context.world
    engine = world.deployment.fake(model)
    [name] = world.ids
    caller, task_id = world.deployment.caller(world.owners[name]), world.ids[name]
    uninterrupted = world.stream(world.owners[name], name)
    got: list[Frame] = []
    while not got or not got[-1].is_terminal:
        engine.release(1)
        with caller.follow(task_id, len(got)) as stream:
            frame = stream.next()
            while not frame.is_durable:
                frame = stream.next()
            got.append(frame)
    expected = check_whole(uninterrupted.to_end())
    assert [frame.raw for frame in got] == [frame.raw for frame in expected]


@then('{who:Who}\'s resume of "{name:Name}" is answered {status:d} {code:Code} before long')
def step_resume_before_long(context: Context, who: str, name: str, status: int, code: str) -> None:
    world = context.world

    def look() -> bool:
        with world.deployment.caller(who).follow(world.ids[name], 1) as stream:
            if stream.response.status_code != status:
                assert stream.response.status_code in (200, 410), stream.response.text
                return False
            assert stream.response.json()["code"] == code, stream.response.text
            return True

    wait_for(look, f"{status} {code}", 5)


@when("{who:Who} cancels {count:d} tasks that decode on {model:Model}, one after the other")
def step_cancel_decoding(context: Context, who: str, count: int, model: str) -> None:
    context.world.facts["freed_ms"] = [
        _time_cancel(context, who, model, f"decodes {number}", event="token", prompt="word " * 8)
        for number in range(count)
    ]


@when("{who:Who} cancels a task while {model:Model} evaluates its prompt of {tokens:d} tokens")
def step_cancel_prefill(context: Context, who: str, model: str, tokens: int) -> None:
    prompt = "a b " * (tokens // 2)
    context.world.facts["freed_ms"] = [_time_cancel(context, who, model, "prefill", event="started", prompt=prompt)]


@then("the engine of {model:Model} had freed the slot within {limit:d} ms, in the median")
def step_freed(context: Context, model: str, limit: int) -> None:
    taken = context.world.facts["freed_ms"]
    shown = ", ".join(f"{each:.0f}" for each in taken)
    context.measurements.append(f"ms from a cancel until the slot of {model} is free, by its own /slots: {shown}")
    assert statistics.median(taken) <= limit, taken


@then("no token followed any of these cancels")
def step_no_token(context: Context) -> None:
    world = context.world
    for name, tokens_before in world.facts["tokens_at_cancel"].items():
        frames = check_whole(world.stream(world.owners[name], name).to_end())
        assert frames[-1].data["code"] == "CANCELED", frames[-1]
        task = world.look(name)
        assert task["state"] == "canceled", task
        # What was on its way when the cancel was sent may have come before its effect; nothing may have come after.
        again = world.deployment.caller(world.owners[name]).read(world.ids[name])
        assert [frame.raw for frame in again] == [frame.raw for frame in frames]
        assert len(frames) >= tokens_before


def _time_cancel(context: Context, who: str, model: str, name: str, *, event: str, prompt: str) -> float:
    """Cancel a task once this frame came; the milliseconds until the engine itself says that its slot is free."""
    world = context.world
    engine = world.deployment.genuine(model)
    busy_before = engine.count_busy()
    # Enough to be still at it when the cancel comes; behind a long prompt the context has less room.
    accepted(world.submit(who, name, model, prompt=prompt, max_tokens=1900 if event == "token" else 500))
    stream = world.follow(who, name)
    stream.until(event)
    wait_for(lambda: engine.count_busy() == busy_before + 1, "the engine computes")
    world.facts.setdefault("tokens_at_cancel", {})[name] = len(durable(stream.frames))
    start = time.perf_counter()
    response = world.deployment.caller(who).cancel(world.ids[name])
    assert response.status_code == 204, response.text
    wait_for(lambda: engine.count_busy() == busy_before, "the slot is free", every_s=0.002)
    return (time.perf_counter() - start) * 1000


def _check_stream(context: Context, who: str, name: str, shape: str, label: str = "") -> None:
    frames = check_whole(context.world.stream(who, name, label).to_end())
    assert _shape(frames) == _normal(shape), frames


def _shape(frames: list[Frame]) -> list[str]:
    """`started, 3 tokens, error CANCELED` as a list, without what is none."""
    tokens = sum(frame.event == "token" for frame in frames)
    started = [frame.event for frame in frames if frame.event == "started"]
    last = frames[-1]
    end = f"error {last.data['code']}" if last.event == "error" else last.event
    return [*started, *([f"{tokens} tokens"] if tokens else []), end]


def _normal(shape: str) -> list[str]:
    return [part for part in re.split(", ", shape) if part != "0 tokens"]


def _text(frames: list[Frame]) -> str:
    return "".join(frame.data["t"] for frame in frames if frame.event == "token")
