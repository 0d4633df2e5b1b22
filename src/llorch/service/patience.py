"""How long a client is asked to stay away, spread so that those who were refused together do not return together."""

from dataclasses import replace
from zlib import crc32

from llorch.domain.task import Fault

LONGEST_MS = 3_600_000
SPREAD = 0.5
"""The longest wait is this share longer than the shortest."""


def spread(wait_ms: int, task_id: str) -> int:
    """The wait times 1 … 1.5, the same for the same task at every time, at most an hour."""
    return min(LONGEST_MS, round(wait_ms * (1 + SPREAD * crc32(task_id.encode()) / 0xFFFFFFFF)))


def told(fault: Fault, task_id: str) -> Fault:
    """The fault as the task's owner is told it."""
    if fault.retry_after_ms is None:
        return fault
    return replace(fault, retry_after_ms=spread(fault.retry_after_ms, task_id))
