"""A journal whose commits a test can hold back."""

import asyncio

from llorch.service.ports import Decision


class FakeJournal:
    """A `service.ports.Journal` that keeps every decision in order and tells what is durable.

    While `hold()` is in force a commit waits for `release()`; what was appended meanwhile is not durable.
    """

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.durable = 0
        self.commits = 0
        self._open = asyncio.Event()
        self._open.set()

    def append(self, decision: Decision) -> None:
        """Add a decision, durable with a later commit."""
        self.decisions.append(decision)

    async def commit(self) -> None:
        """Make durable what was appended before the call, once the journal is not held."""
        self.commits += 1
        upto = len(self.decisions)
        await self._open.wait()
        self.durable = max(self.durable, upto)

    def hold(self) -> None:
        """From now on commits wait."""
        self._open.clear()

    def release(self) -> None:
        """Let the waiting commits, and those to come, through."""
        self._open.set()
