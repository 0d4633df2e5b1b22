"""Runs one attempt: takes the prompt to the engine and the engine's tokens to the stream.

It reports to the scheduler by events and returns a fault instead of raising. This is the token path: tokens that
arrived together cost one call here, and no task is woken.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from llorch.domain import events as ev
from llorch.domain.task import Attempt, Fault, Priority
from llorch.errors import DecodeTimeout, DeterminismViolation, LlorchError
from llorch.service.ports import Completed, Engine, Generation, Post
from llorch.service.prompts import check_prompt
from llorch.service.records import Record
from llorch.service.resumption import go_on, replay

REPORT_TOKENS = 32
REPORT_S = 0.5
"""TokensProduced is posted when this many tokens, or seconds, have come together."""


class Runner:
    """Performs attempts on the engines. `engine_of` gives that of a replica, or raises WorkerReset."""

    def __init__(self, engine_of: Callable[[str], Engine]) -> None:
        self._engine_of = engine_of

    async def run(self, record: Record, attempt: Attempt, post: Post) -> Fault | None:
        """Run the attempt to its end, or until cancelled: then return when the engine has let go of the slot."""
        try:
            engine = self._engine_of(attempt.replica_id)
        except LlorchError as error:
            return fault_of(error)
        try:
            order = await self._order(record, attempt, engine)
            progress = _Progress(record, attempt, post)
            try:
                record.completed = await _generate(engine, order, record)
            except DeterminismViolation:
                await engine.wait_released(attempt.slot)
                raise
            finally:
                progress.end()
        except asyncio.CancelledError:
            await engine.wait_released(attempt.slot)
            raise
        except DecodeTimeout as error:
            post(record.route.route_id, ev.AttemptStalled(attempt.task, attempt.attempt_id, fault_of(error)))
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # here the Abort arrives that the scheduler answered with
            await engine.wait_released(attempt.slot)
        except LlorchError as error:
            return fault_of(error)
        return None

    async def erase(self, replica_id: str, slot: int) -> bool:
        """Make a replica forget the KV cache of an idle slot, where it can."""
        try:
            return await self._engine_of(replica_id).erase(slot)
        except LlorchError:
            return False

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


async def _generate(engine: Engine, order: Generation, record: Record) -> Completed:
    """Run the order, or the rest of it when an earlier attempt was broken off after tokens of it were sent."""
    if not record.stream.tokens:
        return await engine.generate(order, record.stream.append_tokens)
    if order.strict:
        return await replay(engine, order, record)
    return await go_on(engine, order, record)


class _Progress:
    """Tells the scheduler of an attempt's tokens: of the first at once, of the others now and then.

    The stream counts them, so that a token costs nothing here. That a batch task is past half of what it expects is
    told at once: from there on it need not make room, however short it is.
    """

    def __init__(self, record: Record, attempt: Attempt, post: Post) -> None:
        self._stream = record.stream
        self._route_id = record.route.route_id
        self._attempt = attempt
        self._post = post
        self._reported = self._stream.tokens
        self._half = 0
        if record.submission.priority is Priority.BATCH:
            self._half = (record.submission.expected_tokens or record.submission.max_tokens) // 2 + 1
        self._timer: asyncio.TimerHandle | None = None
        self._stream.call_at(self._reported + 1, self._begin)

    def end(self) -> None:
        """Tell of what has not been told yet; nothing more will come."""
        if self._timer is not None:
            self._timer.cancel()
        self._report()
        self._stream.call_at(None)  # last: what the stream calls would be held for as long as its record

    def _begin(self) -> None:
        self._post(self._route_id, ev.FirstToken(self._attempt.task, self._attempt.attempt_id))
        self._set_timer()
        if self._stream.tokens >= self._aim():
            self._report()

    def _set_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REPORT_S, self._on_timer)

    def _on_timer(self) -> None:
        self._report()
        self._set_timer()

    def _report(self) -> None:
        count = self._stream.tokens - self._reported
        if count:
            self._reported += count
            self._post(self._route_id, ev.TokensProduced(self._attempt.task, self._attempt.attempt_id, count))
            self._aim()

    def _aim(self) -> int:
        """Be called at the token that is to be reported next, and return which one that is."""
        at = self._reported + REPORT_TOKENS
        if self._reported < self._half < at:
            at = self._half
        self._stream.call_at(at, self._report)
        return at


def fault_of(error: LlorchError) -> Fault:
    """The error as a value for the scheduler."""
    return replace(Fault(type(error)), message=error.message, policy_label=error.policy_label)
