"""Bar 3: tasks finished in time at 1.5 times overload, in the simulator beside FCFS and EDF, and live beside both."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import uvloop

from llorch.simulator.compare import compare
from llorch.simulator.generators import workload_of
from llorch.simulator.spec import Spec, load_spec
from llorch.simulator.workload import LEVELS, Workload
from llorch.testing.fake_dialects import BATCH_TOKENS, make_tokens
from tests.prove.live import Live, Site, deployed, make_people
from tests.prove.load import Books, follow
from tests.prove.report import Figure, at_least, at_most, progress
from tests.prove.wire import Http
from tests.support.identities import Identity
from tests.support.processes import ROOT

WORKLOADS: Final = ROOT / "bench" / "workloads"
TIGHT: Final = "tight_deadlines"
RIVALS: Final = ("fcfs", "edf", "fcfs-unbounded")
LIVE: Final = {TIGHT: 1000, "mixed_deadlines": 1000}
"""Workloads that are replayed live, and how many of their tasks: some 40 s of each."""
AGREEMENT: Final = 0.10
TIGHT_GAIN: Final = 1.2
UNBOUNDED_GAIN: Final = 5.0
STOP_TOKENS: Final = 4
"""So many of the tokens that would follow make a stop sequence: the engine ends where the model would have."""


def measure(number: int) -> list[Figure]:
    """All workloads with deadlines in the simulator, two of them live."""
    files = sorted(WORKLOADS.glob("*deadlines.yaml"))
    goodput = {file.stem: _simulate(load_spec(file), ("ours", *RIVALS)) for file in files}
    figures = [
        at_least(number, f"{name}: goodput / the better of FCFS and EDF", _gain(each, "fcfs", "edf"), 1.0)
        for name, each in goodput.items()
    ]
    figures.append(at_least(number, f"{TIGHT}: goodput / FCFS", _gain(goodput[TIGHT], "fcfs"), TIGHT_GAIN))
    least = min(goodput, key=lambda name: _gain(goodput[name], "fcfs-unbounded"))
    gain = _gain(goodput[least], "fcfs-unbounded")
    figures.append(at_least(number, f"goodput / unbounded FCFS, least of all: {least}", gain, UNBOUNDED_GAIN))
    return figures + [_agreement(number, name, tasks) for name, tasks in LIVE.items()]


def _simulate(spec: Spec, policies: tuple[str, ...]) -> dict[str, int]:
    results = compare(spec, workload_of(spec), policies)
    goodput = {each.policy: each.goodput for each in results}
    progress(f"{spec.title}, {results[0].tasks} tasks: {goodput}")
    return goodput


def _gain(goodput: Mapping[str, int], *rivals: str) -> float:
    best = max(goodput[rival] for rival in rivals)
    return goodput["ours"] / best if best else math.inf


def _agreement(number: int, name: str, tasks: int) -> Figure:
    """The first tasks of a workload, in the simulator and live."""
    spec = load_spec(WORKLOADS / f"{name}.yaml", [f"tasks={tasks}"])
    workload = workload_of(spec)
    modelled = _simulate(spec, ("ours",))["ours"]
    people = make_people(workload.tenants)
    tenants = [{"name": name, "weight": tenant.weight} for name, tenant in spec.names().items()]
    with deployed([_site(spec)], people, tenants) as live:
        real = _replay(live, workload, {who.tenant: who for who in people})
    what = f"{name}, {tasks} tasks: goodput live ({real}) off the simulator's ({modelled})"
    return at_most(number, what, 100 * abs(real / modelled - 1), 100 * AGREEMENT, " %")


def _site(spec: Spec) -> Site:
    """Engines with the modelled rates, and the queue with the very settings of the simulation, defaults included."""
    [group] = spec.replicas
    settings = spec.queue.model_dump(mode="json")
    queue = {name: value for name, value in settings.items() if value != {}}
    queue["edf_default_ms"] = round(queue["edf_default_ms"])
    options = {
        "token_interval_ms": group.decode_s_per_token * 1000,
        "prefill_interval_ms": group.prefill_s_per_token * 1000 * BATCH_TOKENS,
    }
    return Site("replayed", group.slots, engines=group.count, options=options, settings={"queue": queue})


def _replay(live: Live, workload: Workload, people: Mapping[str, Identity]) -> int:
    """Submit every task at its time; how many finished in time, by what the server told of each."""
    bodies = [_body(workload, index) for index in range(len(workload))]
    books = Books()

    async def one(http: Http, index: int, begun: float) -> bool:
        await asyncio.sleep(begun + workload.arrival_s[index] - time.monotonic())
        tenant = workload.tenants[workload.tenant[index]]
        ran = await follow(http, tenant, people[tenant], bodies[index], books)
        if ran is None or ran.end is None:
            return False
        assert ran.output_tokens == workload.output_tokens[index], (ran.output_tokens, workload.output_tokens[index])
        deadline = workload.deadline_s[index]
        took_ms = ran.end["first_token_ms"] + (ran.end["decode_ms"] or 0)
        return math.isnan(deadline) or bool(took_ms <= deadline * 1000)

    async def run() -> int:
        http = Http(live.port)
        begun = time.monotonic() + 0.5
        in_time = await asyncio.gather(*(one(http, index, begun) for index in range(len(workload))))
        http.close()
        return sum(in_time)

    in_time = uvloop.run(run())
    errors = Counter(ran.error["code"] for ran in books.ran if ran.error is not None)
    progress(f"live: {in_time} of {len(workload)} in time; refused {dict(books.refused)}, ended {dict(errors)}")
    live.wait_idle()
    return in_time


def _body(workload: Workload, index: int) -> dict[str, Any]:
    """A task that the fake engine gives as many tokens as the workload says."""
    output, most = workload.output_tokens[index], workload.max_tokens[index]
    prompt = f"{index:05d}" + " word" * (workload.prompt_tokens[index] - 1)
    body: dict[str, Any] = {
        "model_ref": "replayed",
        "priority": LEVELS[workload.level[index]].value,
        "prompt": prompt,
        "max_tokens": most,
        "expected_tokens": workload.expected_tokens[index],
        "seed": _seed(prompt, output, most),
        "on_disconnect": "cancel",
    }
    if output < most:
        tokens = make_tokens(prompt, body["seed"], most)
        body["sampling"] = {"stop": ["".join(tokens[output : output + STOP_TOKENS])]}
    if not math.isnan(workload.deadline_s[index]):
        body["deadline_ms"] = max(1, round(workload.deadline_s[index] * 1000))
    return body


def _seed(prompt: str, output: int, most: int) -> int:
    """A seed under which the stop sequence occurs first where the output is to end."""
    for seed in range(1000):
        tokens = make_tokens(prompt, seed, most)
        text, stop = "".join(tokens), "".join(tokens[output : output + STOP_TOKENS])
        if output == most or text.find(stop) == len("".join(tokens[:output])):
            return seed
    raise AssertionError(f"no seed ends the output after {output} of {most} tokens")
