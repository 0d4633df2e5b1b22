"""CPU and memory of one task in the service rooms alone: submit, start, tokens, end, one reader; no HTTP, no engine.

`python -m bench.tasks_inprocess [--tasks N] [--burst TOKENS] [--profile]`. What the edge, the adapter and sockets cost
is not in it; `--burst 100` hands all tokens over at once, and so leaves the token path out, too.
"""

import argparse
import asyncio
import cProfile
import gc
import io
import os
import pstats
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from llorch import telemetry_log
from llorch.domain.events import ReplicaChanged
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import RoutePolicy
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Cohort, TaskKey
from llorch.service.dispatcher import Dispatcher
from llorch.service.inventory import Fact
from llorch.service.limits import Limits
from llorch.service.pools import Pools
from llorch.service.ports import Completed, Generation, OnTokens, Usage
from llorch.service.probes import Pool, ReplicaConfig
from llorch.service.records import Records, Retention
from llorch.service.routes import Route, Routes
from llorch.service.runner import Runner
from llorch.service.streams import OpenReaders, Reader
from llorch.service.submission import Submission
from llorch.service.tasks import Tasks
from llorch.stores.memory import MemoryJournal
from llorch.telemetry import RouteScope, Telemetry
from llorch.testing.engine import FakeEnginePort
from llorch_contract.metrics import FAMILIES

TOKENS = 100
TOGETHER = 50
ROUTE, TENANT, COHORT = "llamacpp/m", "acme", Cohort("b1", "sha256:aa", exact=False)
TEXTS = [f" token{number}" for number in range(TOKENS)]


class _Instant(FakeEnginePort):
    """Gives all its tokens in one turn of the loop, `burst` with each push."""

    def __init__(self, burst: int) -> None:
        super().__init__()
        self._pushes = [TEXTS[at : at + burst] for at in range(0, TOKENS, burst)]

    async def generate(self, generation: Generation, on_tokens: OnTokens) -> Completed:
        await asyncio.sleep(0)
        for texts in self._pushes:
            on_tokens(texts)
        return Completed("length", Usage(len(generation.prompt), TOKENS, None))


class _Clock:
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class _Follower:
    """Stands for a client's connection: takes everything, and leaves behind the terminal frame."""

    __slots__ = ("_reader", "done")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        reader.on_ready = self._take
        reader.write = self._write
        self._take()

    def _take(self) -> None:
        self._reader.take()
        if self._reader.is_done and not self.done.done():
            self.done.set_result(None)

    def _write(self, _piece: bytes) -> bool:
        return True


class Bench:
    """A whole service around one replica with enough slots."""

    def __init__(self, *, burst: int, level: str) -> None:
        clock, ledger = _Clock(), Ledger(SessionLimits(turns=10**9))
        route = Route(ROUTE, "llamacpp", "m", "q4", 4096, "1")
        pool = Pool("p", route)
        engine = _Instant(burst)
        scheduler = Scheduler(RoutePolicy(), ledger)
        replica = ReplicaConfig("p/0", pool, engine, TOGETHER, Fact("b1", "stated"), Fact("sha256:aa", "stated"))
        pools = Pools(
            routes=Routes([route]), pools=[pool], replicas=[replica], schedulers={ROUTE: scheduler}, clock=clock
        )
        null = Path(os.devnull).open("wb", buffering=0)  # noqa: SIM115 (for as long as the process lives)
        log = telemetry_log.make_logger(level, "json", stream=null)
        telemetry = Telemetry(FAMILIES, [RouteScope(ROUTE, "llamacpp", "m")], log, self._describe)
        self.records = Records(Retention(records_per_tenant=10**9))
        self.dispatcher = Dispatcher(
            schedulers={ROUTE: scheduler},
            ledger=ledger,
            records=self.records,
            journal=MemoryJournal(),
            runner=Runner({"p/0": engine}.__getitem__),
            telemetry=telemetry,
            clock=clock,
            on_suspect=pools.suspect,
        )
        self.tasks = Tasks(
            dispatcher=self.dispatcher,
            pools=pools,
            limits=Limits(),
            readers=OpenReaders(15.0),
            telemetry=telemetry,
            clock=clock,
        )
        self.dispatcher.post(ROUTE, ReplicaChanged(Replica("p/0", "p", TOGETHER, COHORT, ReplicaState.READY)))

    def _describe(self, key: TaskKey) -> dict[str, str]:
        record = self.dispatcher.find(key)
        if record is None:
            return {}
        return {"correlation_id": record.correlation_id, "session_id": record.submission.session_id}

    async def run(self, numbers: Sequence[int]) -> None:
        """Do these tasks, TOGETHER at a time."""
        for at in range(0, len(numbers), TOGETHER):
            await asyncio.gather(*[self._one(number) for number in numbers[at : at + TOGETHER]])
        await self.dispatcher.wait_idle()

    async def _one(self, number: int) -> None:
        task_id = f"8d6a1c7e-0000-4000-a000-{number:012d}"
        submission = Submission(
            tenant=TENANT,
            task_id=task_id,
            session_id=f"00000000-0000-4000-a000-{number:012d}",
            model_ref="m",
            max_tokens=TOKENS,
            digest=number.to_bytes(32),
            prompt="once upon a time there was a queue " + task_id,
            kv_hint="auto",
        )
        await self.tasks.submit(submission, f"correlation-{number}")
        reader = self.tasks.follow(TENANT, task_id, 0)
        assert reader is not None
        await _Follower(reader).done
        reader.leave()


async def measure_cpu(bench: Bench, tasks: int, *, profile: bool) -> float:
    """Microseconds of CPU per task."""
    await bench.run(range(10**6, 10**6 + 10 * TOGETHER))
    gc.collect()
    gc.freeze()
    gc.disable()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    before = time.process_time()
    await bench.run(range(tasks))
    spent = time.process_time() - before
    if profile:
        profiler.disable()
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(60)
        print(out.getvalue())
    gc.enable()
    return spent / tasks * 1e6


async def measure_garbage(bench: Bench) -> Counter[str]:
    """What 200 tasks leave to the collector once their records have expired, by type."""
    gc.collect()
    gc.disable()
    await bench.run(range(2 * 10**6, 2 * 10**6 + 200))
    bench.records.expire(time.monotonic() + 10**6)
    await asyncio.sleep(0.01)
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    kinds = Counter(type(each).__qualname__ for each in gc.garbage)
    gc.garbage.clear()
    gc.enable()
    return kinds


async def measure_memory(bench: Bench, tasks: int) -> float:
    """Bytes that a finished record keeps once its transcript has expired, its session included."""
    bench.records.expire(time.monotonic() + 10**6)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    await bench.run(range(3 * 10**6, 3 * 10**6 + tasks))
    bench.records.expire(time.monotonic() + Retention().transcript_s + 60.0)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / tasks


async def main(options: Any) -> None:
    """Measure and print."""
    bench = Bench(burst=options.burst, level=options.level)
    cpu = [await measure_cpu(bench, options.tasks, profile=options.profile)]
    print(f"cpu_us_per_task {cpu[0]:.1f} (burst {options.burst}, log level {options.level})")
    if options.memory:
        print(f"garbage of 200 tasks: {dict((await measure_garbage(bench)).most_common(12))}")
        print(f"bytes_per_finished_record {await measure_memory(bench, 2000):.0f}")
    await bench.dispatcher.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--burst", type=int, default=1)
    parser.add_argument("--level", default="info")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    uvloop.run(main(parser.parse_args()))
