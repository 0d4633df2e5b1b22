"""Memory: a thousand open streams in one llorch, twice; what they add the first time, and what the second time."""

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from bench import contenders
from bench.client import run_streams
from bench.contenders import Contender, Engine
from bench.measure import Cost
from bench.processes import BenchError, ServerProcess
from bench.report import Bar, Row, Table, log

STREAMS: Final = 1000
TOKENS: Final = 128
KIB_PER_STREAM_MAX: Final = 64.0
SECOND_ROUND_MAX: Final = 0.10
"""What a second round may add, as a share of what the first one did."""

_STAGGER_S: Final = 0.004
_TRANSCRIPT_TTL_S: Final = 1.0
_ROUND_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes: before, and the peaks while all streams were open; `warnings` are lines of the log."""

    before: int
    first_peak: int
    second_peak: int
    warnings: list[str]

    @property
    def kib_per_stream(self) -> float:
        return (self.first_peak - self.before) / STREAMS / 1024

    @property
    def second_share(self) -> float:
        return max(0, self.second_peak - self.first_peak) / max(1, self.first_peak - self.before)


async def measure_memory() -> Memory:
    """Two rounds of open streams; BenchError when a stream is not complete or they were not all open at once."""
    engine = Engine()
    contender = contenders.llorch(engine, "llorch-streams", streams={"transcript_ttl_s": _TRANSCRIPT_TTL_S})
    async with engine.process, contender.process:
        await engine.command(set={"hold": True})
        before = contender.process.rss_bytes()
        first = await _run_round(contender, engine)
        # Not a wait for something to happen: this is the time that transcripts are kept by configuration.
        await asyncio.sleep(_TRANSCRIPT_TTL_S * 2)
        second = await _run_round(contender, engine)
    return Memory(before, first, second, find_warnings(contender.process))


async def _run_round(contender: Contender, engine: Engine) -> int:
    """Peak of resident memory; the engine sends no token before all streams are open."""

    async def release() -> None:
        await engine.command(release=TOKENS)

    orders = contenders.make_orders(contender, STREAMS, TOKENS)
    async with Cost(contender.process) as cost:
        result = await run_streams(
            contender.process.port,
            orders,
            contender.dialect,
            tokens=TOKENS,
            stagger_s=_STAGGER_S,
            timeout_s=_ROUND_S,
            on_all_open=release,
        )
    if result.peak_open != STREAMS:
        raise BenchError(f"only {result.peak_open} of {STREAMS} streams were open at once")
    log(f"{STREAMS} streams in {result.elapsed_s:.1f} s, {cost.cpu_s:.1f} s CPU, RSS {cost.rss_peak / 2**20:.1f} MiB")
    return cost.rss_peak


def find_warnings(process: ServerProcess) -> list[str]:
    """Lines of a llorch log that are not JSON, or that warn or worse."""
    return [line.rstrip() for line in process.log_lines() if _level(line) not in ("debug", "info")]


def _level(line: str) -> str | None:
    try:
        entry: dict[str, Any] = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return entry.get("level")


async def measure() -> Table:
    """The same as a table."""
    memory = await measure_memory()
    row = Row(
        "llorch",
        {
            "RSS before MiB": memory.before / 2**20,
            "first peak MiB": memory.first_peak / 2**20,
            "second peak MiB": memory.second_peak / 2**20,
            "KiB/stream": memory.kib_per_stream,
            "second adds": memory.second_share,
        },
    )
    bars = [
        Bar("KiB of resident memory per open stream", memory.kib_per_stream, KIB_PER_STREAM_MAX),
        Bar("growth in the second round, as a share of the first", memory.second_share, SECOND_ROUND_MAX),
        Bar("lines in the log that warn", len(memory.warnings), 0),
    ]
    return Table(f"{STREAMS} open streams of {TOKENS} tokens in one process", [row], bars, memory.warnings[:5])
