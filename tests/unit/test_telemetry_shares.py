"""ORCH-3076: admission_share is a moving average that adds up to one and keeps nothing of who is gone."""

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.telemetry_shares import TIME_CONSTANT_S, Shares

A, B, OTHER = ("a", "batch"), ("b", "interactive"), ("other", "other")


def test_shares_are_those_of_the_tokens() -> None:
    shares = Shares(8, OTHER)
    assert dict(shares) == {}
    shares.add(A, 30.0, 1.0)
    shares.add(B, 10.0, 1.0)
    assert dict(shares) == {A: 0.75, B: 0.25}


def test_old_tokens_count_less_and_less() -> None:
    shares = Shares(8, OTHER)
    shares.add(A, 100.0, 0.0)
    shares.add(B, 100.0, TIME_CONSTANT_S)
    faded = exp(-1)
    assert dict(shares)[A] == pytest.approx(faded / (1 + faded))
    shares.add(A, 100.0 - 100.0 * faded, TIME_CONSTANT_S)
    assert dict(shares)[A] == pytest.approx(0.5)


def test_share_of_a_flow_that_is_idle_for_long_is_absent() -> None:
    shares = Shares(8, OTHER)
    shares.add(A, 100.0, 0.0)
    shares.add(B, 100.0, 20 * TIME_CONSTANT_S)
    assert dict(shares) == {B: pytest.approx(1.0)}


def test_peer_bug_17_flows_beyond_the_bound_count_together() -> None:
    shares = Shares(2, OTHER)
    for name in "abcdef":
        shares.add((name, "batch"), 10.0, 0.0)
    assert len(shares) <= 3
    assert dict(shares)[OTHER] == pytest.approx(4 / 6)


def test_peer_bug_15_flows_that_are_gone_make_room() -> None:
    shares = Shares(2, OTHER)
    for number in range(1000):
        shares.add((f"t{number}", "batch"), 10.0, number * 20 * TIME_CONSTANT_S)
    assert len(shares) <= 2
    assert OTHER not in dict(shares)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 1e6), st.floats(0, 1e5)), min_size=1, max_size=50))
def test_shares_add_up_to_one_whoever_came_and_went(history: list[tuple[str, float, float]]) -> None:
    shares = Shares(4, OTHER)
    now = 0.0
    for name, amount, pause in history:
        now += pause
        shares.add((name, "batch"), amount, now)
    told = dict(shares)
    assert sum(told.values()) == pytest.approx(1.0) or sum(amount for _, amount, _ in history[-1:]) == 0.0
    assert all(0 <= share <= 1 + 1e-9 for share in told.values())
    assert len(told) <= 5
