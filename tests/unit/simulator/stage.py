"""Tiny simulations in one line: a slot that makes one token a second, and tasks as short tuples."""

from typing import Any

from llorch.domain.task import Priority
from llorch.simulator.compare import POLICIES
from llorch.simulator.outcome import Fate, Outcome
from llorch.simulator.run import simulate
from llorch.simulator.spec import Spec, parse_spec
from llorch.simulator.workload import Entry, Workload

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
ONE_SLOT = {"decode_s_per_token": 1.0}


def make_spec(**settings: Any) -> Spec:
    """A spec whose workload comes from elsewhere."""
    return parse_spec({"workload": "none.jsonl", "replicas": ONE_SLOT, **settings}, "test")


def task(
    arrival_s: float,
    output_tokens: int,
    tenant: str = "a",
    priority: Priority = INTERACTIVE,
    *,
    prompt_tokens: int = 0,
    deadline_s: float | None = None,
) -> Entry:
    return Entry(
        arrival_s=arrival_s,
        tenant=tenant,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_tokens=max(output_tokens, 1),
        priority=priority,
        deadline_s=deadline_s,
    )


def make_workload(*entries: Entry) -> Workload:
    workload = Workload()
    for entry in entries:
        workload.add(entry)
    return workload


def play(policy: str, *entries: Entry, **settings: Any) -> Outcome:
    return simulate(make_spec(**settings), make_workload(*entries), POLICIES[policy])


def fates(outcome: Outcome) -> list[str]:
    return [Fate(fate).name.lower() for fate in outcome.fate]


def starts(outcome: Outcome) -> list[float]:
    return list(outcome.started_at)
