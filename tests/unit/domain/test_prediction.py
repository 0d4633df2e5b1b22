"""Predictions by themselves: fits, estimates, chances, and how true they are of a simulated queue."""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.prediction import MIN_SAMPLES, Line, Service, probability_within
from llorch.domain.task import Estimate, Priority

BATCH = Priority.BATCH
ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True)
AMOUNT = st.floats(0.0, 1e5)
SAMPLE = st.tuples(st.integers(0, 8000), st.integers(1, 4096), st.integers(0, 4096), AMOUNT, AMOUNT)


def taught(samples: Iterator[tuple[int, int, int, float, float]] | list[tuple[int, int, int, float, float]]) -> Service:
    service = Service()
    for prompt, expected, tokens, first_s, decode_s in samples:
        service.note_first_token(prompt, first_s)
        service.note_end(
            expected_tokens=expected,
            tokens_out=tokens,
            decode_s=decode_s,
            run_s=first_s + decode_s,
            cost=prompt + 2 * expected,
        )
    return service


def steady(ends: int, *, tokens: int = 100, per_token_s: float = 0.02) -> Service:
    """A route whose tasks all take 0.5 s to the first token and the same decoding."""
    return taught([(500, 200, tokens, 0.5, tokens * per_token_s)] * ends)


def wait_s(service: Service, tasks: float, *, slots: int = 1, elapsed_s: float = 0.0) -> Estimate:
    estimate = service.wait(
        BATCH,
        ahead_tasks=tasks,
        ahead_cost=tasks * 900.0,
        running=slots,
        busy_cost=slots * 900.0,
        busy_elapsed_s=elapsed_s,
        slots=slots,
    )
    assert estimate is not None
    return estimate


# The line


def test_line_finds_what_it_was_made_of() -> None:
    line = Line(100.0)
    for x in (0.0, 10.0, 20.0, 30.0) * 10:
        line.add(x, 2.0 + 0.5 * x)
    assert line.fit() == pytest.approx((2.0, 0.5, 0.0), abs=1e-9)


def test_line_is_proportional_where_x_does_not_vary() -> None:
    line = Line(100.0)
    for y in (1.0, 3.0) * 20:
        line.add(4.0, y)
    intercept, slope, variance = line.fit()
    assert (intercept, slope) == pytest.approx((0.0, 0.5), rel=0.02)
    assert variance == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("samples", "shape"), [([(1, 9), (9, 1)], "falling"), ([(10, 1), (20, 30)], "below zero")])
def test_line_through_the_mean_is_never_negative(samples: list[tuple[float, float]], shape: str) -> None:
    line = Line(100.0)
    for x, y in samples * 10:
        line.add(x, y)
    intercept, slope, _ = line.fit()
    assert intercept >= 0.0, shape
    assert slope >= 0.0, shape
    assert intercept + slope * line.mean_x == pytest.approx(line.mean_y)


def test_line_forgets_what_is_older_than_its_horizon() -> None:
    line = Line(50.0)
    for _ in range(1000):
        line.add(1.0, 100.0)
    assert line.samples == pytest.approx(99.0, rel=0.01)
    for _ in range(250):
        line.add(1.0, 1.0)
    assert line.mean_y == pytest.approx(1.0, abs=1.0)


@pytest.mark.parametrize("garbage", [-1.0, math.nan, math.inf, -math.inf, 1e300])
def test_line_ignores_what_cannot_be_measured(garbage: float) -> None:
    line = Line(50.0)
    line.add(garbage, 1.0)
    line.add(1.0, garbage)
    assert line.count == 0
    assert line.fit() == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(ANY_NUMBER, ANY_NUMBER), max_size=60))
def test_line_of_anything_is_finite_and_not_negative(samples: list[tuple[float, float]]) -> None:
    line = Line(20.0)
    for x, y in samples:
        line.add(x, y)
    assert all(math.isfinite(value) and value >= 0.0 for value in line.fit())


# What is not known


def test_unknown_stays_none_until_enough_have_ended() -> None:
    for ends in range(MIN_SAMPLES + 1):
        service = steady(ends)
        wait = service.wait(
            BATCH, ahead_tasks=3, ahead_cost=2700.0, running=1, busy_cost=900.0, busy_elapsed_s=0.0, slots=1
        )
        known = ends >= MIN_SAMPLES
        assert [wait is not None, service.service(500, 200) is not None, service.drain_s(1) is not None] == [known] * 3


def test_zero_durations_are_no_knowledge() -> None:
    service = taught([(0, 1, 0, 0.0, 0.0)] * 50)
    assert service.drain_s(1) is None
    assert service.service(10, 10) is None


@pytest.mark.parametrize("garbage", [-1.0, math.nan, math.inf])
def test_garbage_is_no_knowledge_and_breaks_nothing(garbage: float) -> None:
    service = Service()
    for _ in range(2 * MIN_SAMPLES):
        service.note_first_token(garbage, garbage)
        service.note_first_token(500, 0.5)
        service.note_end(expected_tokens=garbage, tokens_out=100, decode_s=2.0, run_s=garbage, cost=900.0)
    assert service.drain_s(1) == pytest.approx(2.0)
    assert service.service(500, 200) is not None


def test_without_slots_nothing_is_predicted() -> None:
    service = steady(20)
    assert service.drain_s(0) is None
    assert (
        service.wait(BATCH, ahead_tasks=1, ahead_cost=900.0, running=0, busy_cost=0.0, busy_elapsed_s=0.0, slots=0)
        is None
    )


def test_a_free_slot_is_no_wait() -> None:
    free = Service().wait(BATCH, ahead_tasks=0, ahead_cost=0.0, running=1, busy_cost=900.0, busy_elapsed_s=0.0, slots=2)
    assert free == Estimate(0.0, 0.0)


# What is known


def test_tasks_of_known_length_wait_for_exactly_what_is_left() -> None:
    service = steady(50)
    estimate = wait_s(service, 4, elapsed_s=1.0)
    assert estimate.mean_s == pytest.approx(4 * 2.5 + 1.5)
    assert estimate.var_s2 == pytest.approx(0.0, abs=1e-6)
    run = service.service(500, 200)
    assert run is not None
    assert (run.mean_s, run.var_s2) == pytest.approx((2.5, 0.0), abs=1e-9)
    assert service.drain_s(5) == pytest.approx(0.5)


def test_prompt_and_expected_tokens_tell_tasks_apart() -> None:
    service = taught(
        [
            (prompt, tokens * 2, tokens, 0.1 + prompt / 1000, tokens / 50)
            for prompt in (100, 900)
            for tokens in (50, 150)
        ]
        * 20
    )
    estimate = service.service(2000, 600)
    assert estimate is not None
    assert estimate.mean_s == pytest.approx(0.1 + 2.0 + 300 / 50, rel=1e-3)


def test_tasks_without_tokens_are_known_by_their_first_sign() -> None:
    service = taught([(prompt, 0, 0, prompt / 1000, 0.0) for prompt in (100, 300) * 20])
    estimate = service.service(500, 0)
    assert estimate is not None
    assert estimate.mean_s == pytest.approx(0.5, rel=1e-3)
    assert service.drain_s(2) == pytest.approx(0.1, rel=0.05)


def test_memoryless_tasks_have_a_whole_mean_left_whatever_their_age() -> None:
    rng = random.Random(5)
    lengths = [rng.expovariate(1 / 200) for _ in range(2000)]
    service = taught([(500, 4096, round(out), 0.1, out * 0.02) for out in lengths])
    mean = service.drain_s(1)
    assert mean == pytest.approx(4.1, rel=0.15)
    young, old = (
        service.wait(BATCH, ahead_tasks=0, ahead_cost=0.0, running=1, busy_cost=8692.0, busy_elapsed_s=s, slots=1)
        for s in (0.0, 8.0)
    )
    assert young is not None
    assert old is not None
    assert young.mean_s == pytest.approx(mean, rel=0.1)
    assert old.mean_s == pytest.approx(mean, rel=0.2)


def test_first_ends_do_not_make_work_look_short() -> None:
    """Of many attempts that started together only the short ones have ended."""
    service = taught([(0, 1000, tokens, 0.0, tokens * 0.02) for tokens in (5, 10, 20, 40, 60)])
    idle = wait_s(service, 10, slots=16, elapsed_s=0.0)
    busy = wait_s(service, 10, slots=16, elapsed_s=16 * 1.2)
    assert busy.mean_s > 3 * idle.mean_s


def test_twice_the_decode_time_is_learned_within_two_hundred_tasks() -> None:
    service = steady(1000)
    for _ in range(200):
        service.note_first_token(500, 0.5)
        service.note_end(expected_tokens=200, tokens_out=100, decode_s=4.0, run_s=4.5, cost=900)
    assert service.drain_s(1) == pytest.approx(4.5, rel=0.05)


def test_overtaking_is_learned_by_priority() -> None:
    service = steady(50)
    before = wait_s(service, 10)
    for ahead in (2, 5, 10) * 200:
        service.note_start(BATCH, ahead, 3 * ahead)
    assert wait_s(service, 10).mean_s == pytest.approx(before.mean_s + 20 * 2.5, rel=0.02)
    other = service.wait(
        Priority.INTERACTIVE, ahead_tasks=10, ahead_cost=9000.0, running=1, busy_cost=900.0, busy_elapsed_s=0.0, slots=1
    )
    assert other == before


@given(st.lists(SAMPLE, min_size=MIN_SAMPLES, max_size=40), AMOUNT, AMOUNT, AMOUNT, st.integers(1, 64))
def test_more_work_ahead_is_never_a_shorter_wait(
    samples: list[tuple[int, int, int, float, float]], tasks: float, more: float, elapsed_s: float, slots: int
) -> None:
    service = taught(samples)
    waits = [
        service.wait(
            BATCH,
            ahead_tasks=ahead,
            ahead_cost=ahead * 500.0,
            running=slots,
            busy_cost=slots * 500.0,
            busy_elapsed_s=elapsed_s,
            slots=slots,
        )
        for ahead in (tasks, tasks + more)
    ]
    short, long = waits
    if short is None or long is None:
        assert short is long
        return
    assert 0.0 <= short.mean_s <= long.mean_s * (1 + 1e-9)
    assert all(math.isfinite(estimate.var_s2) and estimate.var_s2 >= 0.0 for estimate in (short, long))


@given(st.lists(SAMPLE, min_size=MIN_SAMPLES, max_size=40), st.integers(0, 10000), st.integers(0, 5000))
def test_more_tokens_are_never_a_shorter_run(
    samples: list[tuple[int, int, int, float, float]], prompt: int, expected: int
) -> None:
    service = taught(samples)
    small, big = service.service(prompt, expected), service.service(prompt + 10, expected + 10)
    if small is None or big is None:
        assert small is big
        return
    assert 0.0 <= small.mean_s <= big.mean_s * (1 + 1e-9)
    assert math.isfinite(big.var_s2)
    assert small.var_s2 >= 0.0


# Chances


@pytest.mark.parametrize(
    ("mean", "var", "seconds", "chance"),
    [
        (1.0, 1.0, 1.0, 0.632),  # exponential
        (1.0, 1.0, 0.1, 0.095),
        (1.0, 1.0, 3.0, 0.950),
        (4.0, 4.0, 4.0, 0.567),  # four exponential times
        (4.0, 4.0, 2.0, 0.143),
        (9.0, 0.0, 9.0, 1.0),
        (9.0, 0.0, 8.9, 0.0),
        (0.0, 0.0, 0.1, 1.0),
        (9.0, 4.0, 0.0, 0.0),
        (9.0, 4.0, -1.0, 0.0),
        (9.0, 4.0, math.nan, 0.0),
        (9.0, 4.0, math.inf, 1.0),
    ],
)
def test_chance_of_a_gamma_time(mean: float, var: float, seconds: float, chance: float) -> None:
    assert probability_within(Estimate(mean, var), seconds) == pytest.approx(chance, abs=0.012)


@pytest.mark.parametrize(("seconds", "chance"), [(10.1, 0.095), (10.5, 0.393), (11.0, 0.632), (13.0, 0.950)])
def test_a_certain_wait_before_an_exponential_run_only_shifts_it(seconds: float, chance: float) -> None:
    within = probability_within(Estimate(10.0, 0.0), seconds, Estimate(1.0, 1.0))
    assert within == pytest.approx(chance, abs=0.015)


@pytest.mark.parametrize("quantile", [-1.5, -0.5, 0.0, 0.5, 1.5])
def test_a_run_with_a_long_tail_is_lognormal(quantile: float) -> None:
    sigma = 1.2
    mean = math.exp(sigma * sigma / 2)
    run = Estimate(mean, mean * mean * (math.exp(sigma * sigma) - 1))
    within = probability_within(Estimate(5.0, 0.0), 5.0 + math.exp(quantile * sigma), run)
    assert within == pytest.approx(0.5 * math.erfc(-quantile / math.sqrt(2)), abs=1e-6)


ESTIMATES = st.builds(Estimate, st.floats(0.0, 1e6), st.floats(0.0, 1e9))


@given(ESTIMATES, st.none() | ESTIMATES, st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_chances_lie_within_0_and_1_and_grow_with_time(
    wait: Estimate, run: Estimate | None, seconds: float, more: float
) -> None:
    sooner, later = (probability_within(wait, s, run) for s in (seconds, seconds + more))
    assert 0.0 <= sooner <= later + 1e-9 <= 1.0 + 1e-9


# How true it is: a small queue with known laws


@dataclass(slots=True)
class Job:
    flow: int
    prompt: int
    out: int
    arrived_at: float = 0.0
    ahead: int = 0
    starts_before: int = 0
    predicted_s: float | None = None
    naive_s: float = 0.0
    chance: float = 0.0
    deadline_s: float = 0.0
    first_s: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0


EXPECTED = 2048
MEAN_S = 0.05 + 0.0004 * 800 + 0.02 * 200


@dataclass(slots=True)
class Bench:
    """Poisson arrivals, exponential lengths, `slots` slots; flows take turns. Predicts every arrival that must wait."""

    seed: int
    slots: int
    load: float
    flows: int
    service: Service = field(default_factory=Service)
    done: list[Job] = field(default_factory=list)

    def run(self, jobs: int) -> list[Job]:
        rng = random.Random(self.seed)
        queues: list[deque[Job]] = [deque() for _ in range(self.flows)]
        ends: list[tuple[float, int, Job]] = []
        starts = turn = 0
        at = rng.expovariate(self.load * self.slots / MEAN_S)
        for _ in range(jobs):
            while ends and ends[0][0] <= at:
                now, _, job = heapq.heappop(ends)
                self._end(job, now)
                for step in range(self.flows):
                    queue = queues[(turn + step) % self.flows]
                    if queue:
                        turn = (turn + step + 1) % self.flows
                        waiting = queue.popleft()
                        self.service.note_start(BATCH, waiting.ahead, starts - waiting.starts_before)
                        starts += 1
                        self._start(rng, ends, waiting, now)
                        break
            job = Job(
                rng.randrange(self.flows), 1 + round(rng.expovariate(1 / 800)), 1 + round(rng.expovariate(1 / 200))
            )
            job.arrived_at, job.starts_before = at, starts
            if len(ends) < self.slots:
                starts += 1
                self._start(rng, ends, job, at)
            else:
                own = len(queues[job.flow])
                job.ahead = own + sum(min(len(q), own) for flow, q in enumerate(queues) if flow != job.flow)
                self._predict(rng, job, [running for _, _, running in ends])
                queues[job.flow].append(job)
            at += rng.expovariate(self.load * self.slots / MEAN_S)
        return self.done

    def _start(self, rng: random.Random, ends: list[tuple[float, int, Job]], job: Job, now: float) -> None:
        job.started_at = now
        job.first_s = (0.05 + 0.0004 * job.prompt) * rng.uniform(0.9, 1.1)
        heapq.heappush(ends, (now + job.first_s + 0.02 * job.out * rng.uniform(0.9, 1.1), id(job), job))

    def _end(self, job: Job, now: float) -> None:
        job.ended_at = now
        run_s = now - job.started_at
        self.service.note_first_token(job.prompt, job.first_s)
        self.service.note_end(
            expected_tokens=EXPECTED,
            tokens_out=job.out,
            decode_s=run_s - job.first_s,
            run_s=run_s,
            cost=job.prompt + 2 * EXPECTED,
        )
        if job.predicted_s is not None:
            self.done.append(job)

    def _predict(self, rng: random.Random, job: Job, running: list[Job]) -> None:
        wait = self.service.wait(
            BATCH,
            ahead_tasks=job.ahead,
            ahead_cost=job.ahead * (800 + 2 * EXPECTED),
            running=len(running),
            busy_cost=sum(other.prompt + 2 * EXPECTED for other in running),
            busy_elapsed_s=sum(job.arrived_at - other.started_at for other in running),
            slots=self.slots,
        )
        run = self.service.service(job.prompt, EXPECTED)
        if wait is None or run is None:
            return
        job.predicted_s = wait.mean_s
        job.naive_s = (job.ahead + 1) * MEAN_S / self.slots
        mean_s, var_s2 = wait.mean_s + run.mean_s, wait.var_s2 + run.var_s2
        job.deadline_s = mean_s * math.exp(rng.gauss(0.0, math.sqrt(var_s2) / mean_s))
        job.chance = probability_within(wait, job.deadline_s, run)


BENCHES = [(1, 0.95, 1), (4, 0.98, 1), (16, 0.98, 1), (4, 0.95, 4)]


@pytest.fixture(scope="module", params=BENCHES, ids=lambda bench: "{}-slots-load-{}-{}-flows".format(*bench))
def history(request: pytest.FixtureRequest) -> list[Job]:
    slots, load, flows = request.param
    return [job for seed in (1, 2) for job in Bench(seed, slots, load, flows).run(3000)]


def test_predicted_start_errs_little_more_than_with_the_true_rate(history: list[Job]) -> None:
    """The bar: 1.3 times the error of a predictor that is told the true mean rate, for waits of a mean service time."""
    waited = [job for job in history if job.started_at - job.arrived_at >= MEAN_S]
    assert len(waited) > 500
    ours = median(abs(job.started_at - job.arrived_at - (job.predicted_s or 0.0)) for job in waited)
    told = median(abs(job.started_at - job.arrived_at - job.naive_s) for job in waited)
    assert ours <= 1.3 * told


def test_chances_come_true_as_often_as_they_say(history: list[Job]) -> None:
    """The bar: five bins of 200 tasks within 10 points of what happened, and better than the base rate."""
    came = [job.ended_at - job.arrived_at <= job.deadline_s for job in history]
    for low in range(5):
        told = [
            (job.chance, true)
            for job, true in zip(history, came, strict=True)
            if int(min(job.chance, 0.999) * 5) == low
        ]
        assert len(told) >= 200
        assert sum(chance for chance, _ in told) / len(told) == pytest.approx(
            sum(t for _, t in told) / len(told), abs=0.1
        )
    base = sum(came) / len(came)
    brier = sum((job.chance - true) ** 2 for job, true in zip(history, came, strict=True)) / len(came)
    assert brier < base * (1 - base)
