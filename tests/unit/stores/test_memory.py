"""The journal in memory."""

from llorch.service.ports import Accepted, Ended
from llorch.stores.memory import MemoryJournal


async def test_open_tasks_are_those_accepted_and_not_ended() -> None:
    journal = MemoryJournal()
    first, second = Accepted("acme", "a", "r", 1), Accepted("acme", "b", "r", 2)
    for decision in (first, second, Ended("acme", "a", None), Ended("acme", "never", "CANCELED")):
        journal.append(decision)
    await journal.commit()
    assert list(journal.open.values()) == [second]


async def test_peer_bug_15_ended_tasks_leave_nothing_behind() -> None:
    journal = MemoryJournal()
    for number in range(1000):
        journal.append(Accepted("acme", f"t{number}", "r", number))
        journal.append(Ended("acme", f"t{number}", None))
    assert not journal.open


async def test_same_task_id_of_two_tenants_is_two_tasks() -> None:
    journal = MemoryJournal()
    journal.append(Accepted("acme", "a", "r", 1))
    journal.append(Accepted("other", "a", "r", 2))
    journal.append(Ended("other", "a", None))
    assert list(journal.open) == [("acme", "a")]
