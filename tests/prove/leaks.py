"""Bar 7: reader, engine or task die at every step of random histories, and every reservation comes back."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from tests.prove.histories import BROKEN, GRACE_S, History
from tests.prove.report import Figure, at_least, at_most, progress

HISTORIES: Final = 2_000
STEPS: Final = 16


def measure(number: int) -> list[Figure]:
    """Every history is played once for each step and each kind of death."""
    kills: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    problems: list[str] = []
    compared = preempted = 0
    for seed in range(HISTORIES):
        for step in range(1, STEPS + 1):
            for kind, kill in KILLS.items():
                history = History(seed)
                for _ in range(step):
                    history.step()
                kills[kind] += kill(history, random.Random(seed * STEPS + step))
                history.drain()
                history.scheduler.check_invariants()
                problems += [f"history {seed}, {kind} killed after step {step}: {each}" for each in history.broken()]
                compared += len(history.budgeted())
                preempted += history.seen.preemptions
                ends.update(history.seen.ends)
        if (seed + 1) % 250 == 0:
            progress(f"{seed + 1} histories: {dict(kills)} killed, {len(problems)} problems")
    progress(f"ends: {dict(ends.most_common())}; preemptions: {preempted}")
    for problem in problems[:20]:
        progress(problem)
    return [
        at_most(number, f"reservations or budgets that are not right after {HISTORIES} histories", len(problems), 0),
        at_least(
            number, f"deaths in them ({', '.join(kills)} at each of {STEPS} steps)", kills.total(), HISTORIES * STEPS
        ),
        at_least(number, "budgets compared with the usage of their tasks", compared, HISTORIES * STEPS),
    ]


def _kill_reader(history: History, draw: random.Random) -> bool:
    """All readers of a task leave and do not come back; one that nobody read is read first."""
    live = list(history.scheduler.tasks)
    if not live:
        return False
    key = draw.choice(live)
    history.read(key)
    while history.readers[key]:
        history.leave(key)
    history.wait(GRACE_S + draw.random())
    return True


def _kill_engine(history: History, draw: random.Random) -> bool:
    """The process dies, with all it runs; it comes back."""
    if not history.running:
        return False
    replica_id = draw.choice(list(history.running.values())).attempt.replica_id
    for run in [run for run in history.running.values() if run.attempt.replica_id == replica_id]:
        history.finish(run, BROKEN, None)
    history.heal(replica_id)
    return True


def _kill_task(history: History, draw: random.Random) -> bool:
    """Somebody cancels it, again and again."""
    live = list(history.scheduler.tasks)
    if not live:
        return False
    key = draw.choice(live)
    history.cancel(key)
    history.cancel(key)
    return True


KILLS: Final[dict[str, Callable[[History, random.Random], bool]]] = {
    "reader": _kill_reader,
    "engine": _kill_engine,
    "task": _kill_task,
}
