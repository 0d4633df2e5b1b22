"""ORCH-2007: how long a client is asked to stay away."""

from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.task import Fault
from llorch.errors import AdmissionReject
from llorch.service.patience import LONGEST_MS, spread, told


@given(st.integers(0, LONGEST_MS), st.text())
def test_wait_is_stretched_by_half_at_most_and_an_hour_is_the_most(wait_ms: int, task_id: str) -> None:
    spread_ms = spread(wait_ms, task_id)
    assert min(wait_ms, LONGEST_MS) <= spread_ms <= min(LONGEST_MS, round(1.5 * wait_ms))
    assert spread(wait_ms, task_id) == spread_ms


def test_peer_bug_26_tasks_refused_together_do_not_come_back_together() -> None:
    waits = [spread(10_000, f"6f1d0c5e-3b52-4f6b-9a51-{number:012x}") for number in range(1000)]
    by_second = [sum(at <= wait < at + 500 for wait in waits) for at in range(10_000, 15_000, 500)]
    assert all(60 <= count <= 140 for count in by_second)


def test_unknown_wait_stays_unknown() -> None:
    fault = Fault(AdmissionReject, "full", "reject")
    assert told(fault, "t") is fault
    known = told(Fault(AdmissionReject, "full", "reject", 2 * LONGEST_MS), "t")
    assert (known.retry_after_ms, known.message, known.policy_label) == (LONGEST_MS, "full", "reject")
