"""From what the client wrote to the raw prompt of the engine, and whether it fits the context.

The engine's own tokenizer counts, over its API, so that no long prompt blocks the event loop; counting is left out
when the number of bytes already proves that the prompt fits.
"""

import msgspec

from llorch.errors import DecodeTimeout, InvalidParams, PoolUnready, WorkerReset
from llorch.service.ports import Engine, Message
from llorch.service.routes import Route
from llorch.service.submission import Submission

SPECIAL_TOKENS = 8
"""Tokens that an engine may add to a raw prompt (begin of text, a prefix space): generous."""

BYTES_PER_TOKEN = 4
"""Of usual text and tokenizers, for want of a count."""

UNREACHABLE = (WorkerReset, PoolUnready, DecodeTimeout)


class Prompt(msgspec.Struct, frozen=True):
    """A task's prompt. `text` is None while messages wait for an engine that has their template.

    `tokens` is None where counting was not needed or not possible; `is_checked`: it is known to fit the context.
    """

    text: str | None
    messages: tuple[Message, ...]
    max_tokens: int
    ctx: int
    tokens: int | None = None
    is_checked: bool = False


def unchecked_prompt(submission: Submission, route: Route) -> Prompt:
    """The prompt as it came. Raises InvalidParams when ctx or max_tokens cannot fit whatever the prompt is."""
    ctx = submission.ctx if submission.ctx is not None else route.ctx
    if ctx > route.ctx:
        raise InvalidParams(
            f"ctx {ctx} is more than the {route.ctx} that this route has", details={"ctx": ctx, "ctx_max": route.ctx}
        )
    if submission.max_tokens >= ctx:
        raise InvalidParams(
            f"max_tokens {submission.max_tokens} leaves no room for a prompt in a context of {ctx}",
            details={"max_tokens": submission.max_tokens, "ctx": ctx},
        )
    return Prompt(submission.prompt, submission.messages, submission.max_tokens, ctx)


async def check_prompt(prompt: Prompt, engine: Engine) -> Prompt:
    """The prompt, rendered and known to fit.

    Raises InvalidParams when it does not fit, and whatever the engine raises when it cannot be asked.
    """
    if prompt.is_checked:
        return prompt
    text = prompt.text if prompt.text is not None else await engine.render_messages(prompt.messages)
    tokens = None
    if _byte_bound(text) + prompt.max_tokens > prompt.ctx:
        tokens = await engine.count_tokens(text)
        if tokens + prompt.max_tokens > prompt.ctx:
            raise InvalidParams(
                f"{tokens} prompt tokens and {prompt.max_tokens} to generate do not fit a context of {prompt.ctx}",
                details={"prompt_tokens": tokens, "max_tokens": prompt.max_tokens, "ctx": prompt.ctx},
            )
    return Prompt(text, (), prompt.max_tokens, prompt.ctx, tokens, is_checked=True)


def estimated_tokens(prompt: Prompt) -> int:
    """Tokens of the prompt as counted, or else one for each BYTES_PER_TOKEN of its UTF-8 form, rounded up."""
    if prompt.tokens is not None:
        return prompt.tokens
    if prompt.text is not None:
        size = len(prompt.text.encode())
    else:
        size = sum([len(message.content.encode()) for message in prompt.messages])
    return -(-size // BYTES_PER_TOKEN)


def fits_by_bytes(prompt: Prompt) -> bool:
    """No engine needs to be asked: a raw prompt has at most one token per byte of its UTF-8 form."""
    return prompt.text is not None and _byte_bound(prompt.text) + prompt.max_tokens <= prompt.ctx


def _byte_bound(text: str) -> int:
    return len(text.encode()) + SPECIAL_TOKENS
