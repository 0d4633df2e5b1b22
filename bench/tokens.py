"""The token path: what one relayed token, one task and one open stream cost each contender, in interleaved rounds."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from bench import contenders
from bench.client import StreamsResult, run_streams
from bench.contenders import Contender, Engine
from bench.measure import Cost, median, percentile
from bench.processes import BenchError
from bench.report import Bar, Row, Table, log

_ROUND_S: Final = 180.0


@dataclass(frozen=True, slots=True)
class Load:
    """Streams of so many tokens each, one starting every `stagger_s`, `interval_s` between tokens (0: full speed)."""

    name: str
    streams: int
    tokens: int
    interval_s: float
    stagger_s: float

    def scaled(self, streams: int) -> "Load":
        """The same with fewer streams."""
        return Load(self.name, streams, self.tokens, self.interval_s, self.stagger_s)


PACED: Final = Load("paced", 200, 100, 0.020, 0.005)
FULL: Final = Load("full speed", 50, 400, 0.0, 0.0)
TASKS: Final = Load("tasks", 400, 1, 0.0, 0.002)
WARM_UP: Final = Load("warm-up", 20, 20, 0.0, 0.0)


@dataclass(slots=True)
class Round:
    """What one round of one contender measured."""

    load: Load
    cpu_s: float
    waited_s: float
    elapsed_s: float
    first_token_s: list[float]
    rss_growth: int

    @property
    def us_per_token(self) -> float:
        return self.cpu_s / (self.load.streams * self.load.tokens) * 1e6

    @property
    def us_per_task(self) -> float:
        return self.cpu_s / self.load.streams * 1e6


@dataclass(slots=True)
class Tally:
    """All rounds of one contender by the name of their load."""

    contender: Contender
    rounds: dict[str, list[Round]] = field(default_factory=dict)

    def us_per_token(self, load: Load) -> float:
        return median([each.us_per_token for each in self.rounds[load.name]])

    def us_per_task(self) -> float:
        return median([each.us_per_task for each in self.rounds[TASKS.name]])

    def first_token_ms(self, share: float) -> float:
        """Median over the paced rounds of each round's percentile."""
        return median([percentile(each.first_token_s, share) * 1e3 for each in self.rounds[PACED.name]])

    def kib_per_stream(self) -> float:
        """Growth of resident memory in the first paced round, while all its streams were open."""
        first = self.rounds[PACED.name][0]
        return first.rss_growth / first.load.streams / 1024


async def _run_round(contender: Contender, engine: Engine, load: Load) -> Round:
    """One round, checked at both ends: the client's counts by run_streams, and that the engine was asked no more."""
    await engine.command(reset=True, token_interval_s=load.interval_s)
    orders = contenders.make_orders(contender, load.streams, load.tokens)
    async with Cost(contender.process) as cost:
        result: StreamsResult = await run_streams(
            contender.process.port,
            orders,
            contender.dialect,
            tokens=load.tokens,
            stagger_s=load.stagger_s,
            timeout_s=_ROUND_S,
        )
    seen = await engine.report()
    if (seen["generations"], seen["tokens_sent"]) != (load.streams, load.streams * load.tokens):
        raise BenchError(f"{contender.name} had the engine generate {seen}, not {load}")
    growth = cost.rss_peak - cost.rss_before
    return Round(load, cost.cpu_s, cost.waited_s, result.elapsed_s, result.first_token_s, growth)


async def measure(*, rounds: int, with_litellm: bool) -> Table:
    """Run all rounds: direct, llorch, vllm-router, LiteLLM, direct, … and so on."""
    engine = Engine()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(engine.process)
        direct, llorch, router = contenders.direct(engine), contenders.llorch(engine), contenders.vllm_router(engine)
        relays = [llorch, router]
        if with_litellm:
            relays.append(contenders.litellm(engine))
        for each in relays:
            log(f"starting {each.name}")
            await stack.enter_async_context(each.process)
            await _run_round(each, engine, WARM_UP)
        tallies = [Tally(each) for each in (direct, *relays)]
        for number in range(rounds):
            for load in (PACED, FULL, TASKS):
                for tally in tallies:
                    await _add_round(tally, engine, load, f"round {number + 1} of {rounds}")
    return _table(tallies, rounds)


async def _add_round(tally: Tally, engine: Engine, load: Load, label: str) -> None:
    if tally.contender.name == "litellm":
        load = load.scaled(LITELLM_STREAMS[load.name])
    measured = await _run_round(tally.contender, engine, load)
    tally.rounds.setdefault(load.name, []).append(measured)
    log(
        f"{label}, {load.name}, {tally.contender.name}: {measured.us_per_token:.1f} us/token"
        f" in {measured.elapsed_s:.1f} s, {measured.waited_s:.1f} s without a core"
    )


LITELLM_STREAMS: Final = {PACED.name: 30, FULL.name: 5, TASKS.name: 20}
"""LiteLLM gets fewer streams of the same length, since all of them would take minutes."""


def _table(tallies: Sequence[Tally], rounds: int) -> Table:
    direct, llorch, router, *others = tallies
    rows = [_row(tally, direct, router) for tally in (llorch, router, *others)]
    ratio = llorch.us_per_token(PACED) / router.us_per_token(PACED)
    bars = [Bar("CPU per relayed token at 200 paced streams: llorch / vllm-router", ratio, 1.5)]
    for other in others:
        ratio = llorch.us_per_token(PACED) / other.us_per_token(PACED)
        bars.append(Bar("the same: llorch / LiteLLM", ratio, 1 / 15))
    own = f"p50 {direct.first_token_ms(0.5):.1f} ms, p99 {direct.first_token_ms(0.99):.1f} ms"
    notes = [
        f"Medians of {rounds} interleaved rounds; submission is part of every stream.",
        f"paced: {PACED.streams} streams, {PACED.tokens} tokens each, {PACED.interval_s * 1e3:g} ms between tokens.",
        f"full: full speed, {FULL.streams} streams, {FULL.tokens} tokens each. us/task: one token.",
        f"TTFT +: added to the engine's own, asked directly: {own}.",
        "KiB/stream: growth of resident memory in the first paced round; llorch keeps transcripts for resuming.",
    ]
    if others:
        notes.append(f"LiteLLM had {LITELLM_STREAMS} streams of the same lengths.")
    return Table("The token path, server on a core of its own", rows, bars, notes, [_raw(each) for each in tallies])


def _row(tally: Tally, direct: Tally, router: Tally) -> Row:
    return Row(
        tally.contender.name,
        {
            "paced us/token": tally.us_per_token(PACED),
            "ratio paced": tally.us_per_token(PACED) / router.us_per_token(PACED),
            "full us/token": tally.us_per_token(FULL),
            "ratio full": tally.us_per_token(FULL) / router.us_per_token(FULL),
            "us/task": tally.us_per_task(),
            "TTFT +p50 ms": tally.first_token_ms(0.5) - direct.first_token_ms(0.5),
            "TTFT +p99 ms": tally.first_token_ms(0.99) - direct.first_token_ms(0.99),
            "KiB/stream": tally.kib_per_stream(),
        },
    )


def _raw(tally: Tally) -> dict[str, Any]:
    rounds = {
        name: [
            {
                "streams": each.load.streams,
                "tokens": each.load.tokens,
                "us_per_token": each.us_per_token,
                "cpu_s": each.cpu_s,
                "waited_s": each.waited_s,
                "elapsed_s": each.elapsed_s,
                "first_token_p50_ms": percentile(each.first_token_s, 0.5) * 1e3,
                "first_token_p99_ms": percentile(each.first_token_s, 0.99) * 1e3,
                "rss_growth_bytes": each.rss_growth,
            }
            for each in measured
        ]
        for name, measured in tally.rounds.items()
    }
    return {"name": tally.contender.name, "rounds": rounds}
