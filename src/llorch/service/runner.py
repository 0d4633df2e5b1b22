"""Runs one attempt: takes the prompt to the engine and the engine's tokens to the stream.

It reports to the scheduler by events and returns a fault instead of raising. This is the token path: tokens that
arrived together cost one call here, and no task is woken.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.task import Attempt, Fault
from llorch.errors import DecodeTimeout, LlorchError
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
            order = await self._order(record, attempt, engine)
            progress = _Progress(record, attempt, post, self._clock.monotonic)
            record.completed = await engine.generate(order, progress.take)
            progress.report()
        except asyncio.CancelledError:
            await engine.wait_released(attempt.slot)
            raise
        except DecodeTimeout as error:
            fault = fault_of(error)
            post(record.route.route_id, ev.AttemptStalled(attempt.task, attempt.attempt_id, fault))
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # here the Abort arrives that the scheduler answered with
            await engine.wait_released(attempt.slot)
            return fault
        except LlorchError as error:
            return fault_of(error)
        return None

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


class _Progress:
    """Takes an attempt's tokens to the stream, and tells the scheduler of them now and then."""

    __slots__ = ("_attempt", "_clock", "_has_begun", "_pending", "_post", "_reported_at", "_route_id", "_stream")

    def __init__(self, record: Record, attempt: Attempt, post: Post, clock: Callable[[], float]) -> None:
        self._stream = record.stream
        self._route_id = record.route.route_id
        self._attempt = attempt
        self._post = post
        self._clock = clock
        self._has_begun = False
        self._pending = 0
        self._reported_at = 0.0

    def take(self, texts: Sequence[str]) -> None:
        """Tokens have come."""
        if not self._has_begun:
            self._has_begun = True
            self._reported_at = self._clock()
            self._post(self._route_id, ev.FirstToken(self._attempt.task, self._attempt.attempt_id))
        self._stream.append_tokens(texts)
        self._pending += len(texts)
        if self._pending >= REPORT_TOKENS or self._clock() - self._reported_at > REPORT_S:
            self.report()

    def report(self) -> None:
        """Tell of what has not been told yet."""
        if self._pending:
            self._post(self._route_id, ev.TokensProduced(self._attempt.task, self._attempt.attempt_id, self._pending))
            self._pending = 0
            self._reported_at = self._clock()


def fault_of(error: LlorchError) -> Fault:
    """The error as a value for the scheduler."""
    return replace(Fault(type(error)), message=error.message, policy_label=error.policy_label)
