"""Runs one attempt: takes the prompt to the engine and the engine's tokens to the stream.

It reports to the scheduler by events and returns a fault instead of raising. This is the token path: per batch of
tokens that arrived together there is one loop turn here, and nothing else.
"""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.task import Attempt, Fault
from llorch.errors import LlorchError, WorkerReset
from llorch.service.ports import Clock, Engine, Generation, Post
from llorch.service.prompts import check_prompt
from llorch.service.records import Record

REPORT_TOKENS = 32
REPORT_S = 0.5
"""TokensProduced is posted when this many tokens, or seconds, have come together."""


class Runner:
    """Performs attempts on the engines, by replica id."""

    def __init__(self, engines: Mapping[str, Engine], clock: Clock) -> None:
        self._engines = engines
        self._clock = clock

    async def run(self, record: Record, attempt: Attempt, post: Post) -> Fault | None:
        """Run the attempt to its end, or until cancelled: then return when the engine has let go of the slot."""
        engine = self._engines[attempt.replica_id]
        try:
            await self._relay(record, attempt, engine, post)
        except asyncio.CancelledError:
            await engine.wait_released(attempt.slot)
        except LlorchError as error:
            return fault_of(error)
        return None

    async def _relay(self, record: Record, attempt: Attempt, engine: Engine, post: Post) -> None:
        order = await self._order(record, attempt, engine)
        stream, route_id, clock = record.stream, record.route.route_id, self._clock.monotonic
        pending, reported_at = 0, None
        async with aclosing(engine.generate(order)) as batches:
            async for batch in batches:
                if batch.tokens:
                    if reported_at is None:
                        reported_at = clock()
                        post(route_id, ev.FirstToken(attempt.task, attempt.attempt_id))
                    stream.append_tokens(batch.tokens)
                    pending += len(batch.tokens)
                    if pending >= REPORT_TOKENS or clock() - reported_at > REPORT_S:
                        post(route_id, ev.TokensProduced(attempt.task, attempt.attempt_id, pending))
                        pending, reported_at = 0, clock()
                if batch.completed is not None:
                    record.completed = batch.completed
        if pending:
            post(route_id, ev.TokensProduced(attempt.task, attempt.attempt_id, pending))
        if record.completed is None:
            raise WorkerReset("the engine ended the stream without saying how")

    async def _order(self, record: Record, attempt: Attempt, engine: Engine) -> Generation:
        """What to ask of the engine; a prompt that could not be checked at admission is checked now."""
        prompt, submission = record.prompt, record.submission
        assert prompt is not None
        prompt = record.prompt = await check_prompt(prompt, engine)
        assert prompt.text is not None
        return Generation(
            prompt=prompt.text,
            max_tokens=submission.max_tokens,
            seed=record.seed,
            strict=submission.strict,
            slot=attempt.slot,
            sampling=record.route.sampling.overridden_by(submission.sampling),
        )


def fault_of(error: LlorchError) -> Fault:
    """The error as a value for the scheduler."""
    return replace(Fault(type(error)), message=error.message, policy_label=error.policy_label)
