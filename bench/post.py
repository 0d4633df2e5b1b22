"""What `POST /v1/tasks` costs: queued, with tokenizing, and with the task started, beside a bare ASGI application."""

import sys
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from bench import contenders
from bench.client import run_requests
from bench.contenders import MODEL, PROMPT, Engine, encode_request
from bench.measure import Cost, median
from bench.processes import SERVER_CORE, BenchError, ServerProcess, find_free_port
from bench.report import Bar, Row, Table, log

_CTX: Final = 2048
_TOKENS: Final = 128
_TOKENS_TO_TOKENIZE: Final = _CTX - len(PROMPT)
"""With so many to generate the bytes of the prompt no longer prove that it fits, its tokens do."""
_ROUND_S: Final = 120.0


@dataclass(slots=True)
class Variant:
    """One way to take a task. `requests` of them make a round; `max_tokens` decides what the server has to do."""

    name: str
    process: ServerProcess
    max_tokens: int
    requests: int
    cpu_us: list[float] = field(default_factory=list)
    elapsed_us: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)


async def measure(*, rounds: int, requests: int) -> Table:
    """Run all rounds: bare, queued, tokenized, started, bare, … `requests` of bare and queued in a round."""
    held, free = Engine("engine-held", slots=1), Engine("engine-free")
    port = find_free_port()
    bare = ServerProcess("bare", [sys.executable, "-m", "bench.bare", str(port)], port, SERVER_CORE, "/")
    streams = {"records_per_tenant": 1_000_000}
    queueing = contenders.llorch(held, "llorch-queueing", slots=1, streams=streams)
    starting = contenders.llorch(free, "llorch-starting", streams=streams)
    variants = [
        Variant("bare ASGI, same model", bare, _TOKENS, requests),
        Variant("llorch, queued", queueing.process, _TOKENS, requests),
        Variant("llorch, tokenized, queued", queueing.process, _TOKENS_TO_TOKENIZE, requests // 3),
        Variant("llorch, started, 1 token, end", starting.process, 1, requests // 3),
    ]
    async with AsyncExitStack() as stack:
        for process in (held.process, free.process, bare, queueing.process, starting.process):
            await stack.enter_async_context(process)
        await _occupy(held, queueing.process)
        for variant in variants:
            await _run_round(variant, 200)
        for variant in variants:
            variant.cpu_us.clear()
        for number in range(rounds):
            for variant in variants:
                await _run_round(variant, variant.requests)
                log(f"round {number + 1} of {rounds}, {variant.name}: {variant.cpu_us[-1]:.0f} us/request")
            await _check(held, free, variants, number + 1)
    return _table(variants, rounds)


async def _occupy(engine: Engine, process: ServerProcess) -> None:
    """Have one task hold the only slot until the end."""
    await engine.command(set={"hold": True})
    await run_requests(process.port, [_request(_TOKENS)], status=202, timeout_s=_ROUND_S)


async def _run_round(variant: Variant, requests: int) -> None:
    bodies = [_request(variant.max_tokens) for _ in range(requests)]
    async with Cost(variant.process) as cost:
        elapsed = await run_requests(variant.process.port, bodies, status=202, timeout_s=_ROUND_S)
    variant.cpu_us.append(cost.cpu_s / requests * 1e6)
    variant.elapsed_us.append(elapsed / requests * 1e6)
    variant.waited_s.append(cost.waited_s)


async def _check(held: Engine, free: Engine, variants: list[Variant], rounds: int) -> None:
    """The tasks that should wait did wait, and those that should run did run."""
    if (seen := await held.report())["generations"] != 1:
        raise BenchError(f"queued tasks were started: {seen}")
    started = 200 + rounds * variants[-1].requests
    if (seen := await free.report())["generations"] < started - 1:
        raise BenchError(f"{started} tasks should have been started: {seen}")


def _request(max_tokens: int) -> bytes:
    """A task with 14 fields, about 450 bytes."""
    body: dict[str, Any] = {
        "task_id": str(uuid.uuid4()),
        "workload": "completion",
        "model_ref": MODEL,
        "engine": "llamacpp",
        "ctx": _CTX,
        "priority": "interactive",
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "seed": 7,
        "determinism": "best_effort",
        "sampling": {"temperature": 0.7, "top_p": 0.95},
        "kv_hint": "reuse",
        "on_disconnect": "continue",
        "labels": {"team": "search", "run": "nightly"},
    }
    return encode_request("POST", "/v1/tasks", body)


def _table(variants: list[Variant], rounds: int) -> Table:
    base, queued = median(variants[0].cpu_us), median(variants[1].cpu_us)
    rows = [
        Row(
            each.name,
            {
                "CPU us/request": median(each.cpu_us),
                "ratio": median(each.cpu_us) / base,
                "us elapsed": median(each.elapsed_us),
            },
        )
        for each in variants
    ]
    raw = [{"name": v.name, "cpu_us": v.cpu_us, "elapsed_us": v.elapsed_us, "waited_s": v.waited_s} for v in variants]
    bars = [Bar("CPU per POST /v1/tasks that stays queued: llorch / bare ASGI", queued / base, 3.0)]
    notes = [f"Medians of {rounds} interleaved rounds; one keep-alive connection; llorch checks a key, bare does not."]
    return Table("POST /v1/tasks, server on a core of its own", rows, bars, notes, raw)
