"""Mean waits against the formulas of queueing theory: M/M/1, M/M/c (Erlang C) and M/D/1 (Pollaczek-Khinchine)."""

import math

import pytest

from llorch.simulator.compare import POLICIES
from llorch.simulator.generators import generate, mean_service_s, offered_load
from llorch.simulator.run import simulate
from llorch.simulator.spec import parse_spec

SERVICE_S = 1.0
EXPONENTIAL = {"distribution": "exponential", "mean": 1000, "max": 20_000}


def erlang_c(servers: int, load: float) -> float:
    """The chance to wait in M/M/c at `load` of each server."""
    offered = servers * load
    below = sum(offered**at / math.factorial(at) for at in range(servers))
    top = offered**servers / math.factorial(servers) / (1 - load)
    return top / (below + top)


def mean_wait(policy: str, outputs: object, *, load: float, slots: int, seed: int) -> tuple[float, float, float]:
    """Mean wait in seconds, with load and mean service as they came out."""
    tree = {
        "seed": seed, "tasks": 30_000, "load": load, "queue": {"capacity": 1_000_000},
        "replicas": {"decode_s_per_token": SERVICE_S / 1000, "slots": slots}, "token_batches": 1,
        "tenants": {"a": {"traffic": {"prompt_tokens": 0, "output_tokens": outputs}}},
    }  # fmt: skip
    spec = parse_spec(tree, "theory")
    workload = generate(spec)
    outcome = simulate(spec, workload, POLICIES[policy])
    waits = [start - at for start, at in zip(outcome.started_at, workload.arrival_s, strict=True)]
    offered = offered_load(spec, workload)
    assert offered is not None
    return math.fsum(waits) / len(waits), offered, mean_service_s(spec, workload)


@pytest.mark.parametrize("policy", ["fcfs", "ours"])
def test_mean_wait_of_m_m_1(policy: str) -> None:
    wait, load, service = mean_wait(policy, EXPONENTIAL, load=0.5, slots=1, seed=1)
    assert wait == pytest.approx(load / (1 - load) * service, rel=0.08)


def test_mean_wait_of_m_d_1() -> None:
    wait, load, service = mean_wait("fcfs", 1000, load=0.7, slots=1, seed=2)
    assert wait == pytest.approx(load / (2 * (1 - load)) * service, rel=0.08)


def test_mean_wait_of_m_m_c() -> None:
    wait, load, service = mean_wait("fcfs", EXPONENTIAL, load=0.7, slots=4, seed=3)
    assert wait == pytest.approx(erlang_c(4, load) * service / (4 * (1 - load)), rel=0.1)
