"""A journal in memory: what was decided is durable for as long as the process lives."""

from llorch.service.ports import Accepted, Decision, Ended


class MemoryJournal:
    """Keeps the tasks that were accepted and have not ended: what a recovery would have to care for."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, str], Accepted] = {}

    def append(self, decision: Decision) -> None:
        """Take the decision in; memory has it at once."""
        match decision:
            case Accepted():
                self.open[decision.tenant, decision.task_id] = decision
            case Ended():
                self.open.pop((decision.tenant, decision.task_id), None)

    async def commit(self) -> None:
        """Nothing is ever pending."""
