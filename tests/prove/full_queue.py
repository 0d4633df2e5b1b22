"""Bar 2: a light tenant's share of starts beside one that keeps the queue full, under each full policy."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import uvloop

from tests.prove.live import Live, Site, deployed, make_people
from tests.prove.load import Books, Flow, InvalidRun, Load, Window
from tests.prove.report import Figure, at_least, progress
from tests.support.identities import Identity

POLICIES: Final = ("reject", "drop-lru", "shed-low-priority")
CAPACITY: Final = 32
SLOTS: Final = 4
LIGHT_OUTSTANDING: Final = SLOTS + 4
"""Few, and enough that the light tenant has work waiting when every slot is its."""
HOG_RETRY_S: Final = 0.05
FAIR: Final = 0.5
TOLERANCE: Final = 0.05
WINDOW_S: Final = 10.0
FULL: Final = 0.8
"""Share of the capacity that must wait throughout for the queue to have been kept full: the light tenant's evictions
empty a place for a moment."""
REFUSALS: Final = {
    "reject": {"reject", "fair-share"},
    "drop-lru": {"drop-lru", "fair-share"},
    "shed-low-priority": {"shed-low-priority", "fair-share", "reject", "drop-lru"},
}
"""Policy labels that a loser may be told."""


def measure(number: int) -> list[Figure]:
    """One stretch for each policy, each on a route of its own."""
    hog, light = make_people(["hog", "light"])
    sites = [_site(policy) for policy in POLICIES]
    with deployed(sites, [hog, light]) as live:
        shares = {policy: _share(live, policy, hog, light) for policy in POLICIES}
    return [
        at_least(number, f"{policy}: starts of the light tenant / its fair half, live", share / FAIR, 1 - TOLERANCE)
        for policy, share in shares.items()
    ]


def _site(policy: str) -> Site:
    queue = {"capacity": CAPACITY, "full_policy": {"interactive": policy, "batch": policy}}
    options = {"token_interval_ms": 10, "tokens_per_segment": 2}
    return Site(_model(policy), SLOTS, options=options, settings={"queue": queue})


def _model(policy: str) -> str:
    return f"full-{policy}"


def _share(live: Live, policy: str, hog: Identity, light: Identity) -> float:
    """The light tenant's share of the starts, while it has work that waits or is refused."""
    open_tasks = CAPACITY + SLOTS + 8
    flows = [
        Flow("hog", hog, _task, open_tasks, retry_s=HOG_RETRY_S),
        Flow("light", light, _task, LIGHT_OUTSTANDING),
    ]
    if policy == "shed-low-priority":
        flows.append(Flow("hog's batch", hog, _task, open_tasks, priority="batch", retry_s=HOG_RETRY_S))

    async def run() -> tuple[Window, Books]:
        async with Load(live.port, _model(policy), flows) as load:
            await load.until(lambda books: sum(books.waiting.values()) >= CAPACITY)
            await load.until(lambda books: books.refused.total() + _lost(books) > 0)
            return await load.window(lambda _: True, least_s=WINDOW_S, most_s=2 * WINDOW_S), load.books

    window, books = uvloop.run(run())
    _check(policy, window, books)
    live.wait_idle()
    starts = window.starts(books)
    contended = Counter({name: starts[name] for name in ("hog", "light")})
    progress(f"{policy}: started {dict(starts)}, refused {dict(books.refused)}, ended {dict(_ends(books))}")
    return contended["light"] / contended.total()


def _task() -> Mapping[str, Any]:
    return {"prompt": "w " * 16, "max_tokens": 16}


def _lost(books: Books) -> int:
    return sum(ran.error is not None for ran in books.ran)


def _ends(books: Books) -> Counter[tuple[str, str]]:
    """How tasks ended that did not succeed: by flow, code and policy label."""
    return Counter(
        (ran.flow, f"{ran.error['code']} {ran.error['policy_label']}") for ran in books.ran if ran.error is not None
    )


def _check(policy: str, window: Window, books: Books) -> None:
    """The queue was full all the time, and whoever lost was told so by the policy's name."""
    waited = sum(window.least_waiting.get(name, 0) for name in ("hog", "light", "hog's batch"))
    if waited < FULL * CAPACITY - LIGHT_OUTSTANDING:
        raise InvalidRun(f"the queue was not kept full: at times {waited} of {CAPACITY} waited")
    strange = {label for _, label in books.refused} - REFUSALS[policy]
    if strange:
        raise InvalidRun(f"{policy}: refused with {strange}")
    codes = {str(ran.error["code"]) for ran in books.ran if ran.error is not None}
    if not codes <= {"ADMISSION_REJECT", "QUEUE_FULL_DROP_LRU"}:
        raise InvalidRun(f"{policy}: tasks ended in {codes}")
    silent = [ran for ran in books.ran if ran.error is not None and ran.error["policy_label"] not in REFUSALS[policy]]
    if silent:
        raise InvalidRun(f"{policy}: a loser's frame says {silent[0].error}")
