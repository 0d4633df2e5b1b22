"""Bar 1: shares in tokens on a live server, and what fairness costs in throughput."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import uvloop

from tests.prove.live import Live, Site, deployed, make_people
from tests.prove.load import OUTPUT_COST, PROMPT_COST, Books, Flow, InvalidRun, Load, Window
from tests.prove.report import Figure, at_least, at_most, progress
from tests.support.identities import Identity

SLOTS: Final = 4
MAX_TOKENS: Final = 32
SHORT, LONG = 20, 200
"""Words, and so tokens, of a prompt."""
QUEUED: Final = 16
OUTSTANDING: Final = SLOTS + QUEUED + 4
"""Open tasks of a flow: when all slots are its, and some answers are on their way, QUEUED still wait."""
BOUND: Final = 2 * max(PROMPT_COST * LONG, OUTPUT_COST * SLOTS * MAX_TOKENS)
"""Of the difference in service per weight between two backlogged flows (Sheng et al., OSDI 2024)."""
RUN: Final = 40 * BOUND
"""Weighted tokens per weight that every flow gets in a window: twice what the bar asks."""
LEVEL_SHARE: Final = 8 / 9
TOLERANCE: Final = 0.05
BATCH_TENANTS: Final = 100
EQUAL_TENANTS: Final = 10

MODEL: Final = "fake"


def measure(number: int) -> list[Figure]:
    """Six stretches on one server: 1:1, FCFS, 1:2, FCFS, ten equals, 100 beside one."""
    equals = make_people([f"equal-{each}" for each in range(EQUAL_TENANTS)])
    crowd = make_people([f"crowd-{each}" for each in range(BATCH_TENANTS)])
    pair = make_people(["one", "two", "double", "alone", "single"])
    site = Site(
        MODEL,
        SLOTS,
        options={"token_interval_ms": 10, "tokens_per_segment": 2},
        settings={"queue": {"capacity": 1024}},
    )
    with deployed([site], [*pair, *equals, *crowd], [{"name": "double", "weight": 2}]) as live:
        one, two, double, alone, single = pair
        even, fair = _pair(live, one, two, 1.0)
        fcfs = [_fcfs(live, alone)]
        uneven, fair_again = _pair(live, one, double, 2.0)
        fcfs.append(_fcfs(live, alone))
        index = _jain(live, equals)
        level = _level(live, single, crowd)
    throughput = (fair + fair_again) / sum(fcfs)
    percent = 100 * TOLERANCE
    return [
        at_most(
            number,
            "two tenants 1:1, one with prompts ten times as long: share off its weight, live",
            100 * even,
            percent,
            " %",
        ),
        at_most(number, "two tenants 1:2, the long prompts weigh 2: the same, live", 100 * uneven, percent, " %"),
        at_least(number, f"Jain's index over {EQUAL_TENANTS} equal tenants, live", index, 0.95),
        at_least(
            number, "throughput of both pairs / FCFS (one flow) in the same run, live", 100 * throughput, 97, " %"
        ),
        at_least(
            number,
            f"one interactive tenant beside {BATCH_TENANTS} batch tenants: its share / its level's 8/9, live",
            level / LEVEL_SHARE,
            1 - TOLERANCE,
        ),
    ]


def _pair(live: Live, short: Identity, long: Identity, weight: float) -> tuple[float, float]:
    """Two flows; `weight` is that of the one with the long prompts. How far its share of a flow is off, at most and
    relatively, and the output tokens per second.
    """
    flows = [_flow("short", short, SHORT, OUTSTANDING), _flow("long", long, LONG, OUTSTANDING)]
    weights = {"short": 1.0, "long": weight}

    def is_enough(served: Counter[str]) -> bool:
        return all(served[name] >= RUN * weight for name, weight in weights.items())

    window, books = _run(live, flows, is_enough)
    served = window.served(books)
    total = sum(served.values())
    shares = {name: served[name] / total for name in weights}
    off = max(abs(shares[name] * sum(weights.values()) / each - 1) for name, each in weights.items())
    progress(
        f"1:{weight:g} in {window.ended - window.begun:.1f} s: {_rounded(served)}, {window.tokens_per_s:.0f} tokens/s"
    )
    return off, window.tokens_per_s


def _fcfs(live: Live, who: Identity) -> float:
    """The load of a pair in one flow, where fair is first come, first served: output tokens per second."""
    flows = [_flow("short", who, SHORT, OUTSTANDING), _flow("long", who, LONG, OUTSTANDING)]
    window, _ = _run(live, flows, lambda _: True, least_s=12.0)
    progress(f"one flow in {window.ended - window.begun:.1f} s: {window.tokens_per_s:.0f} tokens/s")
    return window.tokens_per_s


def _jain(live: Live, people: Sequence[Identity]) -> float:
    """Jain's index of the weighted tokens of equal tenants."""
    flows = [_flow(who.tenant, who, SHORT * (1 + each % 3), OUTSTANDING) for each, who in enumerate(people)]
    window, books = _run(live, flows, lambda served: all(served[who.tenant] > 2000 for who in people), least_s=12.0)
    served = window.served(books)
    shares = [served[who.tenant] for who in people]
    progress(f"equals in {window.ended - window.begun:.1f} s: {_rounded(served)}")
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def _level(live: Live, single: Identity, crowd: Sequence[Identity]) -> float:
    """The share of weighted tokens of one interactive tenant beside many in batch."""
    flows = [_flow("interactive", single, SHORT, OUTSTANDING)]
    flows += [_flow("batch", who, LONG, 3, priority="batch") for who in crowd]
    window, books = _run(live, flows, lambda served: served["interactive"] >= RUN, least_s=12.0)
    served = window.served(books)
    progress(f"one beside {len(crowd)} in {window.ended - window.begun:.1f} s: {_rounded(served)}")
    return served["interactive"] / sum(served.values())


def _run(
    live: Live, flows: Sequence[Flow], is_enough: Callable[[Counter[str]], bool], least_s: float = 8.0
) -> tuple[Window, Books]:
    """One stretch, begun when every flow waits, with QUEUED tasks of every flow waiting throughout."""

    async def run() -> tuple[Window, Books]:
        async with Load(live.port, MODEL, flows) as load:
            await load.until(lambda books: _all_wait(books, flows) and len(books.ran) > 2 * SLOTS + len(flows))
            await load.until(lambda books: sum(ran.ended_at is not None for ran in books.ran) > 2 * SLOTS)
            return await load.window(is_enough, least_s=least_s, most_s=90.0), load.books

    window, books = uvloop.run(run())
    lacking = {flow.name: window.least_waiting[flow.name] for flow in flows if not _waits(window.least_waiting, flow)}
    if lacking:
        raise InvalidRun(f"not always {QUEUED} tasks waited: {lacking}")
    if books.refused:
        raise InvalidRun(f"refused: {books.refused}")
    live.wait_idle()
    return window, books


def _all_wait(books: Books, flows: Sequence[Flow]) -> bool:
    return all(_waits(books.waiting, flow) for flow in flows)


def _waits(waiting: Mapping[str, int], flow: Flow) -> bool:
    return waiting.get(flow.name, 0) >= QUEUED


def _flow(name: str, who: Identity, words: int, outstanding: int, priority: str = "interactive") -> Flow:
    prompt = "w " * words

    def make() -> Mapping[str, Any]:
        return {"prompt": prompt, "max_tokens": MAX_TOKENS}

    return Flow(name, who, make, outstanding, priority)


def _rounded(served: Counter[str]) -> dict[str, int]:
    return {name: round(value) for name, value in served.items()}
