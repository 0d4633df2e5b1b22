"""The simple queues by hand: one slot, a token a second, and what each order makes of the same few tasks."""

import pytest

from tests.unit.simulator.stage import BATCH, fates, play, starts, task

BLOCKER = task(0.0, 10)
THREE = (
    task(1.0, 3, "a", BATCH, deadline_s=90.0),
    task(2.0, 2, "a", deadline_s=60.0),
    task(3.0, 1, "b", deadline_s=70.0),
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fcfs", [0, 10, 13, 15]),
        ("fcfs-unbounded", [0, 10, 13, 15]),
        ("priority", [0, 13, 10, 12]),
        ("edf", [0, 13, 10, 12]),
        ("rr", [0, 10, 14, 13]),
    ],
)
def test_order_of_three_that_waited(policy: str, expected: list[float]) -> None:
    outcome = play(policy, BLOCKER, *THREE)
    assert starts(outcome) == expected
    assert fates(outcome) == ["finished"] * 4


def test_edf_differs_from_priority_where_the_batch_task_is_due_first() -> None:
    urgent = task(1.0, 3, "a", BATCH, deadline_s=30.0)
    assert starts(play("edf", BLOCKER, urgent, *THREE[1:])) == [0, 10, 13, 15]
    assert starts(play("priority", BLOCKER, urgent, *THREE[1:])) == [0, 13, 10, 12]


def test_edf_takes_the_default_for_a_task_without_a_deadline() -> None:
    tasks = (BLOCKER, task(1.0, 2), task(2.0, 2, deadline_s=20.0))
    assert starts(play("edf", *tasks, queue={"edf_default_ms": 15_000})) == [0, 10, 12]
    assert starts(play("edf", *tasks, queue={"edf_default_ms": 25_000})) == [0, 12, 10]


def test_round_robin_gives_each_tenant_one_turn() -> None:
    tasks = [BLOCKER, *(task(1.0, 1, "a") for _ in range(3)), *(task(2.0, 1, "b") for _ in range(2)), task(3.0, 1, "c")]
    assert starts(play("rr", *tasks)) == [0, 10, 13, 15, 11, 14, 12]


def test_a_full_queue_refuses_the_newcomer_of_its_priority_alone() -> None:
    tasks = (BLOCKER, task(1.0, 1), task(2.0, 1), task(3.0, 1, priority=BATCH))
    bounded = play("fcfs", *tasks, queue={"capacity": 1})
    assert fates(bounded) == ["finished", "finished", "rejected", "finished"]
    assert bounded.reasons == {"queue full": 1}
    assert fates(play("fcfs-unbounded", *tasks, queue={"capacity": 1})) == ["finished"] * 4


def test_a_deadline_that_passes_in_the_queue_ends_the_task_and_frees_its_place() -> None:
    tasks = (BLOCKER, task(1.0, 1, deadline_s=4.0), task(6.0, 1))
    outcome = play("fcfs", *tasks, queue={"capacity": 1})
    assert fates(outcome) == ["finished", "expired", "finished"]
    assert outcome.ended_at[1] == 5.0
    assert starts(play("fcfs-unbounded", *tasks)) == [0, 10, 11]


def test_a_task_that_is_late_finishes_or_is_aborted_as_asked() -> None:
    late = task(0.0, 10, deadline_s=4.0)
    finished = play("fcfs", late)
    assert (fates(finished), finished.ended_at[0], finished.is_in_time(0)) == (["finished"], 10.0, False)
    aborted = play("fcfs", late, task(1.0, 1), on_deadline="abort")
    assert (fates(aborted), list(aborted.ended_at)) == (["aborted", "finished"], [4.0, 5.0])
    assert list(aborted.tokens) == [4, 1]


def test_an_aborted_run_keeps_its_slot_until_the_engine_lets_go() -> None:
    replicas = {"decode_s_per_token": 1.0, "release_s": 2.0}
    tasks = (task(0.0, 10, deadline_s=4.0), task(1.0, 1))
    for policy in ("fcfs", "ours"):
        assert starts(play(policy, *tasks, on_deadline="abort", replicas=replicas)) == [0, 6]


def test_the_least_busy_replica_takes_the_task() -> None:
    replicas = [{"decode_s_per_token": 1.0, "slots": 2}, {"decode_s_per_token": 5.0, "slots": 1}]
    outcome = play("fcfs", *(task(at * 0.1, 2) for at in range(4)), replicas=replicas)
    # The first and third go to the two slots of the fast one, the second to the slow one, the fourth waits.
    assert list(outcome.ended_at) == pytest.approx([2.0, 10.1, 2.2, 4.0])


def test_prompts_and_overhead_take_their_time() -> None:
    replicas = {"decode_s_per_token": 1.0, "prefill_s_per_token": 0.1, "overhead_s": 0.5}
    outcome = play("fcfs", task(1.0, 3, prompt_tokens=20), replicas=replicas)
    assert outcome.ended_at[0] == pytest.approx(1.0 + 0.5 + 2.0 + 3.0)
    assert outcome.busy_s == pytest.approx(5.5)
