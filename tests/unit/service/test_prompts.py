"""Whether a prompt fits, and who is asked."""

import pytest

from llorch.errors import InvalidParams, WorkerReset
from llorch.service.ports import Message
from llorch.service.prompts import SPECIAL_TOKENS, Prompt, check_prompt, fits_by_bytes, unchecked_prompt
from llorch.testing.engine import FakeEnginePort
from tests.unit.service.house import route, submission

ROUTE = route(ctx=100)
HELLO = (Message("user", "hello"),)


def prompt(text: str | None, max_tokens: int = 10, messages: tuple[Message, ...] = ()) -> Prompt:
    return Prompt(text, messages, max_tokens, ctx=100)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a" * (90 - SPECIAL_TOKENS), True),
        ("a" * (91 - SPECIAL_TOKENS), False),
        ("ü" * 41, True),  # 82 bytes
        ("ü" * 42, False),
        ("🙂" * 20, True),  # 80 bytes
        ("🙂" * 21, False),
    ],
)
def test_no_engine_is_asked_when_bytes_prove_that_it_fits(text: str, fits: bool) -> None:
    """ORCH-3015: no token is shorter than a byte."""
    assert fits_by_bytes(prompt(text)) is fits


def test_messages_always_need_their_template() -> None:
    assert not fits_by_bytes(prompt(None, messages=HELLO))


async def test_prompt_that_fits_by_bytes_is_not_counted() -> None:
    engine = FakeEnginePort()
    checked = await check_prompt(prompt("short"), engine)
    assert (checked.is_checked, checked.tokens, engine.counting.entered) == (True, None, 0)


async def test_longer_prompt_is_counted_by_the_engine() -> None:
    """ORCH-3014: prompt tokens + max_tokens may fill the context, and no more."""
    engine = FakeEnginePort()
    engine.count = lambda _: 90
    assert (await check_prompt(prompt("a" * 500), engine)).tokens == 90
    engine.count = lambda _: 91
    with pytest.raises(InvalidParams) as refused:
        await check_prompt(prompt("a" * 500), engine)
    assert refused.value.details == {"prompt_tokens": 91, "max_tokens": 10, "ctx": 100}


async def test_messages_are_rendered_and_counted_as_the_engine_will_see_them() -> None:
    engine = FakeEnginePort()
    checked = await check_prompt(prompt(None, messages=HELLO), engine)
    assert (checked.text, checked.messages) == ("<user> hello\n", ())


async def test_checked_prompt_is_not_checked_again() -> None:
    engine = FakeEnginePort()
    checked = await check_prompt(prompt(None, messages=HELLO), engine)
    assert await check_prompt(checked, engine) is checked
    assert engine.counting.entered == 1


async def test_engine_that_cannot_be_asked_is_not_taken_for_a_yes() -> None:
    engine = FakeEnginePort()
    engine.tokenizer = WorkerReset("gone")
    with pytest.raises(WorkerReset):
        await check_prompt(prompt("a" * 500), engine)


@pytest.mark.parametrize(("ctx", "max_tokens"), [(101, 10), (None, 100), (50, 50)])
def test_context_that_no_prompt_could_fit_is_refused(ctx: int | None, max_tokens: int) -> None:
    with pytest.raises(InvalidParams):
        unchecked_prompt(submission(ctx=ctx, max_tokens=max_tokens), ROUTE)


def test_context_of_the_route_is_meant_when_none_is_given() -> None:
    assert unchecked_prompt(submission(), ROUTE).ctx == 100
    assert unchecked_prompt(submission(ctx=64), ROUTE).ctx == 64
