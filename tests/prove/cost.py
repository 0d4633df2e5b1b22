"""Bar 5: what the scheduler's work on one task costs, and whether the token path still costs what it did."""

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger
from llorch.domain.policy import Fairness, Order, PreemptionPolicy, Prices, QueuePolicy, Quota, Rate, RoutePolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.sessions import SessionLimits
from llorch.domain.task import Budgets, Cohort, Priority, TaskSpec
from tests.prove.report import Figure, at_most, not_measured, progress
from tests.support.processes import ROOT

TENANTS: Final = 500
"""Each in both priorities: 1,000 flows."""
REPLICAS: Final = 64
SLOTS: Final = 4
RUNNING: Final = REPLICAS * SLOTS
SMALL: Final = 1_000
LARGE: Final = 100_000
TOKEN_EVENTS: Final = 4
TURNS: Final = 4
ROUNDS: Final = 25
WARM_UP: Final = 8
MOST_US: Final = 100.0
MOST_GROWTH: Final = 1.7
SERVICE_S: Final = 1.0
GC_THRESHOLDS: Final = (10_000, 50, 100)
"""As `llorch serve` sets them."""
ENOUGH: Final = 10**9

BASELINE_RATIOS: Final = {"paced": 1.70, "full speed": 1.25}
"""CPU per relayed token, llorch / vllm-router, as measured before there was any policy."""
NOISE: Final = 0.15
"""Of a ratio of medians: what runs of the same code differed by."""
BENCH_ROUNDS: Final = 3


def measure(number: int, bench: Path | None) -> list[Figure]:
    """Rounds of the two sizes in turn, then the token path; its figures are in the file `bench`, if there is one."""
    return [*_scheduler(number), *_token_path(number, bench)]


def _scheduler(number: int) -> list[Figure]:
    thresholds = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    small, large = Busy(SMALL), Busy(LARGE)
    figures: dict[Busy, list[float]] = {small: [], large: []}
    for turn in range(WARM_UP + ROUNDS):
        for busy in (small, large):
            spent = busy.round()
            if turn >= WARM_UP:
                figures[busy].append(spent)
    gc.set_threshold(*thresholds)
    for busy in (small, large):
        busy.scheduler.check_invariants()
    cheap, dear = (statistics.median(figures[busy]) for busy in (small, large))
    progress(f"scheduler: {cheap:.1f} us per task with {SMALL} queued, {dear:.1f} us with {LARGE}")
    return [
        at_most(number, f"scheduler CPU per task, {2 * TENANTS} flows, {LARGE:,} queued", dear, MOST_US, " µs"),
        at_most(number, f"the same / with {SMALL:,} queued ({cheap:.1f} µs)", dear / cheap, MOST_GROWTH),
    ]


class Busy:
    """A scheduler with everything on, all slots busy and so many tasks queued, which stay so many."""

    def __init__(self, queued: int) -> None:
        self._random = random.Random(queued)
        self._queued = queued
        self._submitted = 0
        self._sessions: dict[tuple[str, Priority], tuple[str, int]] = {}
        self.now = 0.0
        ledger = Ledger(SessionLimits(ttl_s=600.0, turns=2 * TURNS), _quotas())
        self.scheduler = Scheduler(_policy(queued), ledger)
        self._running: list[ev.Start] = []
        cohort = Cohort("b1", "sha256:aa", exact=True)
        for each in range(REPLICAS):
            replica = Replica(f"p/{each}", "p", SLOTS, cohort, ReplicaState.READY, can_interrupt=True)
            self.scheduler.handle(ev.ReplicaChanged(replica), self.now)
        for _ in range(RUNNING + queued):
            self._take_in(self.scheduler.handle(ev.TaskSubmitted(self._spec()), self.now))
        assert len(self._running) == RUNNING, f"{len(self._running)} of {RUNNING} slots run"

    def round(self) -> float:
        """Every running task to its end, each followed by a submission; CPU microseconds per task."""
        events = self._events()
        handle = self.scheduler.handle
        answers = []
        begun = time.process_time_ns()
        for event, now in events:
            answers.append(handle(event, now))
        spent = time.process_time_ns() - begun
        ended = len(self._running)
        self._running = []
        for commands in answers:
            self._take_in(commands)
        assert len(self._running) == ended == RUNNING, f"{len(self._running)} tasks started, {ended} ended"
        assert len(self.scheduler.queue) == self._queued, f"{len(self.scheduler.queue)} wait"
        return spent / 1000 / ended

    def _events(self) -> list[tuple[ev.Event, float]]:
        """One second in the life of everything that runs."""
        draw, begun = self._random, self.now
        first_at = begun + 0.1 * SERVICE_S
        events: list[tuple[ev.Event, float]] = [
            (ev.FirstToken(start.task.key, start.attempt.attempt_id), first_at) for start in self._running
        ]
        for part in range(TOKEN_EVENTS):
            now = begun + (0.2 + part * 0.15) * SERVICE_S
            for start in self._running:
                count = draw.randint(8, 24)
                events.append((ev.TokensProduced(start.task.key, start.attempt.attempt_id, count), now))
        for place, start in enumerate(self._running):
            now = begun + (0.8 + 0.2 * place / RUNNING) * SERVICE_S
            prompt = start.task.spec.prompt_tokens + draw.randint(-3, 3)
            events.append((ev.AttemptEnded(start.task.key, start.attempt.attempt_id, prompt_tokens=prompt), now))
            events.append((ev.TaskSubmitted(self._spec()), now))
        self.now = begun + SERVICE_S
        return events

    def _take_in(self, commands: Sequence[ev.Command]) -> None:
        for command in commands:
            if isinstance(command, ev.Start):
                self._running.append(command)
            else:
                assert not isinstance(command, ev.Reject), command

    def _spec(self) -> TaskSpec:
        draw, number = self._random, self._submitted
        self._submitted += 1
        tenant = f"tenant-{number % TENANTS}"
        priority = Priority.BATCH if (number // TENANTS) % 2 else Priority.INTERACTIVE
        drain_s = (self._queued / RUNNING + 1) * SERVICE_S
        return TaskSpec(
            key=(tenant, f"task-{number}"),
            session=(tenant, self._session(tenant, priority, number)),
            priority=priority,
            max_tokens=128,
            expected_tokens=64,
            prompt_tokens=draw.randint(20, 400),
            deadline_s=40 * drain_s * (1 + draw.random()),
            budgets=Budgets(tokens=ENOUGH, time_s=float(ENOUGH), cost=float(ENOUGH)),
        )

    def _session(self, tenant: str, priority: Priority, number: int) -> str:
        """TURNS tasks of a flow share a session."""
        name, turns = self._sessions.get((tenant, priority), ("", TURNS))
        if turns == TURNS:
            name, turns = f"session-{number}", 0
        self._sessions[tenant, priority] = name, turns + 1
        return name


def _policy(queued: int) -> RoutePolicy:
    """Everything that can be on is on."""
    queue = QueuePolicy(
        capacity=dict.fromkeys(Priority, queued + RUNNING),
        fairness=Fairness.WFQ,
        order=Order.EDF,
        weights={f"tenant-{each}": 1.0 + each % 4 for each in range(TENANTS)},
    )
    return RoutePolicy(queue=queue, preemption=PreemptionPolicy(hard=True), prices=Prices(0.001, 0.002))


def _quotas() -> dict[str, Quota]:
    quota = Quota(
        max_queued=ENOUGH,
        max_concurrent=ENOUGH,
        rate=dict.fromkeys(Priority, Rate(float(ENOUGH), float(ENOUGH))),
        tokens_per_minute=ENOUGH,
        kv_tokens=ENOUGH,
    )
    return {f"tenant-{each}": quota for each in range(TENANTS)}


def _token_path(number: int, bench: Path | None) -> list[Figure]:
    """The ratios of `make bench` beside those of the time without policies."""
    if bench is None:
        command = [sys.executable, "-m", "bench", "tokens", "--quick", "--rounds", str(BENCH_ROUNDS)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode == 2:
            return [not_measured(number, "token path", run.stderr.strip().splitlines()[-1])]
        bench = ROOT / "out" / "bench.json"
    if not bench.exists():
        return [not_measured(number, "token path", f"{bench} is not there: the benchmark was not valid")]
    tables = json.loads(bench.read_text(encoding="utf-8"))["tables"]
    table = next(table for table in tables if table["title"].startswith("The token path"))
    values = next(row["values"] for row in table["rows"] if row["name"] == "llorch")
    progress(f"token path: {values}")
    ratios = {"paced": values["ratio paced"], "full speed": values["ratio full"]}
    return [
        at_most(
            number,
            f"CPU per relayed token, {name}: llorch / vllm-router, against {BASELINE_RATIOS[name]:g} before",
            ratio,
            BASELINE_RATIOS[name] * (1 + NOISE),
        )
        for name, ratio in ratios.items()
    ]
