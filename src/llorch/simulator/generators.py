"""Workloads by seed: arrival processes and length distributions turned into tasks.

Every tenant draws from a stream of its own, seeded by the file's seed and its name, so that a change of one tenant
leaves the others' tasks as they were. Draws are inverse transforms of `random()`, whose sequence Python promises to
keep; so the same seed is the same workload everywhere.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, repeat, takewhile
from random import Random
from statistics import NormalDist

from llorch.simulator.replicas import Engine, engine_of
from llorch.simulator.spec import Distribution, Exponential, Fixed, Lognormal, Spec, Traffic, Uniform, members
from llorch.simulator.workload import Entry, Workload, read_workload

_MEAN_DRAWS = 20_000
_UNBOUNDED_MEANS = 8
_inverse_normal = NormalDist().inv_cdf
_Uniform = Callable[[], float]


def workload_of(spec: Spec) -> Workload:
    """The tasks of a simulation, generated or read. Raises ConfigError, WorkloadError."""
    return generate(spec) if spec.workload is None else read_workload(spec.workload)


def generate(spec: Spec) -> Workload:
    """Tasks until `spec.tasks` are there or `spec.duration_s` is over."""
    sources = _sources(spec)
    rate_of_share = _rate_of_share(spec, sources)
    merged: Iterator[_Drawn] = heapq.merge(*(source.tasks(at, rate_of_share) for at, source in enumerate(sources)))
    if spec.tasks is not None:
        merged = islice(merged, spec.tasks)
    if spec.duration_s is not None:
        end = spec.duration_s
        merged = takewhile(lambda drawn: drawn[0] < end, merged)
    workload = Workload()
    for source in sources:
        workload.tenant_id(source.tenant)
    for _, _, _, entry in merged:
        workload.add(entry)
    return workload


def mean_service_s(spec: Spec, workload: Workload) -> float:
    """True seconds of a slot that a task takes in the mean; of different replicas the mean weighted by their rate."""
    slots = sum(group.count * group.slots for group in spec.replicas)
    mean_prompt = sum(workload.prompt_tokens) / len(workload)
    return slots / _capacity(spec, mean_prompt, sum(workload.output_tokens) / len(workload))


def offered_load(spec: Spec, workload: Workload) -> float | None:
    """Work that arrives over what all slots can do until the last arrival; None when all arrives at once."""
    span = workload.arrival_s[-1] if len(workload) else 0.0
    slots = sum(group.count * group.slots for group in spec.replicas)
    return len(workload) / span * mean_service_s(spec, workload) / slots if span else None


def _capacity(spec: Spec, prompt_tokens: float, output_tokens: float) -> float:
    """Tasks of these mean lengths that all slots do in a second; service times are linear in both."""
    rates = (
        group.count * group.slots / engine_of(group).service_s(prompt_tokens, output_tokens) for group in spec.replicas
    )
    return sum(rates)


_Drawn = tuple[float, float, int, Entry]
"""Arrival, turn among arrivals at the same time, number of the source, task. The first three differ between tasks."""


@dataclass(frozen=True, slots=True)
class _Typical:
    """The means of a traffic, from draws of its own, and the bound of its outputs."""

    prompt_tokens: float
    output_tokens: float
    max_tokens: int


class _Source:
    """The stream of tasks of one tenant's traffic."""

    def __init__(
        self, tenant: str, part: int, traffic: Traffic, typical: _Typical, *, seed: int, engine: Engine
    ) -> None:
        self.tenant = tenant
        self.traffic = traffic
        self.typical = typical
        self._part = part
        self._engine = engine
        self._random = Random(f"{seed} {tenant} {part}")

    def tasks(self, source: int, rate_of_share: float) -> Iterator[_Drawn]:
        """Tasks without end, of the source with this number."""
        traffic, uniform = self.traffic, self._random.random
        rate_per_s = traffic.arrivals.rate_per_s or rate_of_share * traffic.share
        for number, arrival_s in enumerate(self.arrivals(rate_per_s)):
            prompt = round(_draw(traffic.prompt_tokens, uniform))
            output = _output(traffic, self.typical.max_tokens, uniform)
            entry = Entry(
                arrival_s=arrival_s,
                tenant=self.tenant,
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=self.typical.max_tokens,
                priority=traffic.priority,
                expected_tokens=self._expected(output),
                session=None if traffic.turns == 1 else f"{self._part}-{number // traffic.turns}",
                deadline_s=self._deadline(prompt),
            )
            yield arrival_s, number / traffic.share, source, entry

    def arrivals(self, rate_per_s: float) -> Iterator[float]:
        """Times of arrival, in seconds."""
        arrivals, uniform = self.traffic.arrivals, self._random.random
        match arrivals.process:
            case "at_once":
                return repeat(0.0)
            case "even":
                return (number / rate_per_s for number in count())
            case "poisson":
                return _poisson(rate_per_s, uniform)
            case "bursty":
                on_s, off_s = arrivals.on_s, arrivals.off_s
                return _bursts(_poisson(rate_per_s * (on_s + off_s) / on_s, uniform), on_s, off_s, uniform)

    def _expected(self, output: int) -> int:
        match self.traffic.expected:
            case "exact":
                return output
            case "mean":
                return max(1, round(self.typical.output_tokens))
            case "max":
                return self.typical.max_tokens
            case tokens:
                return min(tokens, self.typical.max_tokens)

    def _deadline(self, prompt: int) -> float | None:
        """Whoever sets a deadline knows the prompt and how long answers usually are, not how long this one will be."""
        deadline, uniform = self.traffic.deadline, self._random.random
        if deadline is None or uniform() >= deadline.fraction:
            return None
        return (
            _draw(deadline.slack, uniform) * self._engine.service_s(prompt, round(self.typical.output_tokens))
            + deadline.extra_s
        )


def _sources(spec: Spec) -> list[_Source]:
    engine = engine_of(spec.replicas[0])
    sources: list[_Source] = []
    for group, tenant in spec.tenants.items():
        for part, traffic in enumerate(tenant.traffic):
            typical = _typical(traffic, Random(f"{spec.seed} {group} {part} typical").random)
            sources += [
                _Source(name, part, traffic, typical, seed=spec.seed, engine=engine) for name in members(group, tenant)
            ]
    return sources


def _typical(traffic: Traffic, uniform: _Uniform) -> _Typical:
    most = traffic.max_tokens or _largest(traffic.output_tokens)
    prompts = outputs = 0
    for _ in range(_MEAN_DRAWS):
        prompts += round(_draw(traffic.prompt_tokens, uniform))
        outputs += _output(traffic, most, uniform)
    return _Typical(prompts / _MEAN_DRAWS, outputs / _MEAN_DRAWS, most)


def _output(traffic: Traffic, most: int, uniform: _Uniform) -> int:
    return min(max(1, round(_draw(traffic.output_tokens, uniform))), most)


def _largest(outputs: Distribution) -> int:
    match outputs:
        case Fixed(value=value):
            return max(1, round(value))
        case Uniform(high=high):
            return max(1, round(high))
        case Exponential() | Lognormal():
            return max(1, math.ceil(outputs.max or _UNBOUNDED_MEANS * outputs.mean))


def _rate_of_share(spec: Spec, sources: list[_Source]) -> float:
    """Tasks per second for a share of 1, so that all traffic without a rate of its own makes up `spec.load`."""
    paced = [source for source in sources if source.traffic.arrivals.rate_per_s is None]
    if spec.load is None or not paced:
        return 1.0
    shares = sum(source.traffic.share for source in paced)
    prompt = sum(source.traffic.share * source.typical.prompt_tokens for source in paced) / shares
    output = sum(source.traffic.share * source.typical.output_tokens for source in paced) / shares
    return spec.load * _capacity(spec, prompt, output) / shares


def _draw(distribution: Distribution, uniform: _Uniform) -> float:
    match distribution:
        case Fixed(value=value):
            return value
        case Uniform(low=low, high=high):
            return low + (high - low) * uniform()
        case Exponential(mean=mean, max=most):
            return min(-mean * math.log(1.0 - uniform()), most or math.inf)
        case Lognormal(mean=mean, cv=cv, max=most):
            var = math.log(1.0 + cv * cv)
            deviation = math.sqrt(var) * _inverse_normal(uniform() or 2.0**-54)
            return min(mean * math.exp(deviation - var / 2), most or math.inf)


def _poisson(rate_per_s: float, uniform: _Uniform) -> Iterator[float]:
    now = 0.0
    while True:
        now -= math.log(1.0 - uniform()) / rate_per_s
        yield now


def _bursts(busy: Iterator[float], on_s: float, off_s: float, uniform: _Uniform) -> Iterator[float]:
    """Arrivals in the time that is on, with pauses put in between."""
    paused = 0.0
    end = -on_s * math.log(1.0 - uniform())
    for at in busy:
        while at >= end:
            paused -= off_s * math.log(1.0 - uniform())
            end -= on_s * math.log(1.0 - uniform())
        yield at + paused
