"""Goes on with a task that was broken off after tokens of it were sent: its reader sees no token twice and misses none.

A strict task is run again from the start, and what was sent is compared and swallowed; another one is continued from
its text so far. It knows nothing of why the task was broken off, of schedulers or of slots.
"""

from collections.abc import Sequence

import msgspec

from llorch.errors import DeterminismViolation
from llorch.service.ports import Completed, Engine, Generation, Usage
from llorch.service.records import Record
from llorch.service.streams import TaskStream


async def replay(engine: Engine, order: Generation, record: Record) -> Completed:
    """Run the order again from the start, and append what follows the tokens that were sent.

    Raises DeterminismViolation at the first difference; no token from there on is appended. `record.replayed` grows
    by the tokens that were swallowed, however it ends.
    """
    check = _Check(record.stream)
    try:
        completed = await engine.generate(order, check.take)
    finally:
        record.replayed += check.seen
    check.finish()
    return completed


async def go_on(engine: Engine, order: Generation, record: Record) -> Completed:
    """Continue the order from its prompt and the text so far, with as many tokens as are left of it.

    The usage is that of the whole task: the prompt alone as the engine counts it, and every token that was sent. How
    much of the first run's prompt came from a cache was never told, so it stays unknown.
    """
    stream = record.stream
    sent, known = stream.tokens, record.prompt.tokens if record.prompt is not None else None
    prompt_tokens = known if known is not None else await engine.count_tokens(order.prompt)
    left = order.max_tokens - sent
    if left <= 0:  # an engine that is asked for none makes one
        return Completed("length", Usage(prompt_tokens, sent, None))
    rest = msgspec.structs.replace(order, prompt=order.prompt + stream.output(), max_tokens=left)
    completed = await engine.generate(rest, stream.append_tokens)
    usage = Usage(prompt_tokens, sent + completed.usage.completion_tokens, None)
    return Completed(completed.finish_reason, usage)


class _Check:
    """Swallows the tokens that a stream has already, comparing them, and appends those that follow."""

    __slots__ = ("_is_broken", "_sent", "_stream", "seen")

    def __init__(self, stream: TaskStream) -> None:
        self._stream = stream
        self._sent = stream.texts()
        self._is_broken = False
        self.seen = 0

    def take(self, texts: Sequence[str]) -> None:
        """Take the next tokens of the replay. Raises DeterminismViolation."""
        left = len(self._sent) - self.seen
        if left or self._is_broken:
            again = list(texts[:left])
            if self._is_broken or again != self._sent[self.seen : self.seen + len(again)]:
                self._is_broken = True
                raise DeterminismViolation(f"the replay differs from what was sent, at or after token {self.seen}")
            self.seen += len(again)
            texts = texts[left:]
        if texts:
            self._stream.append_tokens(texts)

    def finish(self) -> None:
        """The replay is complete. Raises DeterminismViolation when it was shorter than what was sent."""
        if self.seen < len(self._sent):
            raise DeterminismViolation(f"the replay ended after {self.seen} of {len(self._sent)} tokens that were sent")
