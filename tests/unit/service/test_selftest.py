"""ORCH-3049: what a replica must show before it is Ready."""

import asyncio

import pytest

from llorch.errors import LlorchError, PoolUnready, WorkerReset
from llorch.service.selftest import CANCEL_TOKENS, DECODE_TOKENS, self_test
from llorch.testing.clock import VirtualTimeLoop
from llorch.testing.engine import FakeEnginePort, PacedEnginePort


def run(engine: FakeEnginePort, timeout_s: float = 30.0) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(self_test(engine, timeout_s=timeout_s))


def test_sound_replica_decodes_to_the_end_and_lets_go_of_what_is_broken_off() -> None:
    engine = PacedEnginePort()
    run(engine)
    assert [order.max_tokens for order in engine.orders] == [DECODE_TOKENS, CANCEL_TOKENS]
    assert engine.sent[0] == DECODE_TOKENS
    assert engine.sent[1] == 1, "broken off after its first token"
    assert engine.released == [0]
    assert all(order.strict for order in engine.orders)


def test_model_that_ends_at_once_passes() -> None:
    run(FakeEnginePort(answer=[]))


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ({"health": PoolUnready("loading")}, "preload: loading"),
        ({"start": PoolUnready("503")}, "decode: 503"),
        ({"start": WorkerReset("broken pipe")}, "decode: broken pipe"),
        ({"foreign": 1}, "telemetry: 1 of its slots still work"),
    ],
)
def test_replica_that_fails_a_step_says_which_and_why(fault: dict[str, LlorchError | int], step: str) -> None:
    engine = PacedEnginePort()
    for name, value in fault.items():
        setattr(engine, name, value)
    with pytest.raises(PoolUnready, match=step):
        run(engine)


def test_replica_that_never_answers_is_given_up_in_time() -> None:
    with pytest.raises(PoolUnready, match=r"not over within 5 s; it hung at decode"):
        run(PacedEnginePort(mute=True), timeout_s=5)


def test_replica_that_does_not_let_go_is_given_up_in_time() -> None:
    engine = PacedEnginePort()
    engine.releasing.shut()
    with pytest.raises(PoolUnready, match="hung at cancel"):
        run(engine, timeout_s=5)
