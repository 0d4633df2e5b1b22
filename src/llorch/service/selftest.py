"""What a replica must show before it is Ready: that it decodes, stops when it is told to, and tells its load.

It knows the Engine port alone: neither who started the engine nor what its states are called.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llorch.errors import LlorchError, PoolUnready, WorkerReset
from llorch.service.ports import Engine, Generation, OnTokens

PROMPT = "Once upon a time"
DECODE_TOKENS = 2
CANCEL_TOKENS = 64
"""Enough that a cancel after the first of them breaks something off."""


async def self_test(engine: Engine, *, timeout_s: float) -> None:
    """Return when the replica can do what a task needs of it (ORCH-3049).

    1. Preload: it answers that it is ready. 2. It decodes a few tokens to the end. 3. It lets go of a generation that
    is broken off after its first token. 4. It tells how many slots work, where it does at all, and none does.

    Raises PoolUnready that names the step and the reason. Takes `timeout_s` seconds at most; uses slot 0, which the
    caller has seen idle.
    """
    steps = (("preload", engine.check_health), ("decode", lambda: _decode(engine)), ("cancel", lambda: _cancel(engine)),
             ("telemetry", lambda: _read_load(engine)))  # fmt: skip
    until = asyncio.get_running_loop().time() + timeout_s
    for name, step in steps:
        with _named(name, timeout_s):
            async with asyncio.timeout_at(until):
                await step()


@contextmanager
def _named(step: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as exc:
        raise PoolUnready(f"the self-test was not over within {timeout_s:g} s; it hung at {step}") from exc
    except LlorchError as exc:
        raise PoolUnready(f"the self-test failed at {step}: {exc.message}") from exc


def _order(max_tokens: int) -> Generation:
    return Generation(prompt=PROMPT, max_tokens=max_tokens, seed=0, strict=True)


async def _decode(engine: Engine) -> None:
    await engine.generate(_order(DECODE_TOKENS), _swallow)


def _swallow(texts: Sequence[str]) -> None:
    """The text does not matter: a model may end at once."""


async def _cancel(engine: Engine) -> None:
    begun = asyncio.Event()

    def on_tokens(texts: Sequence[str]) -> None:  # noqa: ARG001 (that they come is all)
        begun.set()

    async with asyncio.TaskGroup() as group:
        running = group.create_task(_generate_some(engine, begun, on_tokens))
        await begun.wait()
        running.cancel()
    await engine.wait_released(0)


async def _generate_some(engine: Engine, begun: asyncio.Event, on_tokens: OnTokens) -> None:
    try:
        await engine.generate(_order(CANCEL_TOKENS), on_tokens)
    finally:
        begun.set()  # it ended before its first token: there is nothing to break off


async def _read_load(engine: Engine) -> None:
    load = await engine.read_load()
    if load is not None and load.busy_slots:
        raise WorkerReset(f"{load.busy_slots} of its slots still work, which nobody uses")
