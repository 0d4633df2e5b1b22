"""The arithmetic of results, on cases small enough to do by hand."""

import math

import pytest

from llorch.simulator.outcome import Fate, Outcome
from llorch.simulator.results import Results, Setting, jain_index, quantile, results_of
from tests.unit.simulator.stage import BATCH, INTERACTIVE, make_workload, play, task

SETTING = Setting(weights={"b": 3.0}, level_weights={INTERACTIVE: 8.0, BATCH: 1.0}, slots=2, mean_service_s=2.0)


def summed(outcome: Outcome, setting: Setting = SETTING) -> Results:
    return results_of("test", outcome, setting)


@pytest.mark.parametrize(
    ("amounts", "expected"), [([1, 1, 1, 1], 1.0), ([4, 0, 0, 0], 0.25), ([1, 2, 3], 36 / 42), ([5], 1.0)]
)
def test_jain_index(amounts: list[float], expected: float) -> None:
    assert jain_index(amounts) == pytest.approx(expected)


@pytest.mark.parametrize("amounts", [[], [0.0, 0.0]])
def test_jain_index_of_nothing_is_no_number(amounts: list[float]) -> None:
    assert math.isnan(jain_index(amounts))


@pytest.mark.parametrize(("part", "expected"), [(0.5, 5), (0.95, 10), (0.9, 9), (0.01, 1), (1.0, 10)])
def test_quantile_is_a_value_that_was(part: float, expected: float) -> None:
    assert quantile(range(1, 11), part) == expected


def test_counts_waits_and_rates_of_a_schedule_by_hand() -> None:
    # One slot, a token a second: 0..4, then 4..6 (late), then one expires at 5, then 6..7.
    tasks = (task(0.0, 4), task(1.0, 2, deadline_s=4.0), task(2.0, 9, deadline_s=3.0), task(3.0, 1, deadline_s=9.0))
    one = summed(play("fcfs", *tasks), Setting({}, SETTING.level_weights, 1, 2.0))
    assert one.fates == {"finished": 3, "deadline passed in the queue": 1}
    assert (one.goodput, one.deadlines) == (2, 3)
    assert one.deadline_hit_ratio == pytest.approx(1 / 3)
    assert (one.span_s, one.end_s, one.utilisation) == (3.0, 7.0, 1.0)
    assert one.goodput_per_s == 0.0
    assert one.tokens_per_s == 1.0
    assert (one.waits.count, one.waits.p50_s, one.waits.p99_s) == (3, 3.0, 3.0)
    assert one.waits.mean_s == pytest.approx(2.0)


def test_a_task_that_ends_at_its_very_deadline_is_in_time() -> None:
    assert summed(play("fcfs", task(0.0, 4, deadline_s=4.0))).goodput == 1


def test_shares_count_prompt_and_output_at_their_cost_while_all_wait() -> None:
    outcome = Outcome(make_workload(task(0.0, 4, "a"), task(0.0, 4, "b")), prompt_cost=1.0, output_cost=2.0)
    outcome.wait(0, 0.0)
    outcome.produce(0, 1, 1.0)
    outcome.wait(1, 2.0)
    outcome.first_token(0, 10, 3.0)
    outcome.produce(1, 15, 3.0)
    outcome.unwait(0, 5.0)
    outcome.produce(1, 100, 6.0)
    one = summed(outcome)
    assert one.contended_s == 3.0
    assert [group.contended_share for group in one.tenants] == [0.25, 0.75]
    assert [group.share for group in one.tenants] == pytest.approx([12 / 242, 230 / 242])
    assert [group.fair_share for group in one.tenants] == [0.25, 0.75]
    assert (one.jain, one.jain_is_contended) == (1.0, True)


def test_fair_shares_are_of_levels_and_then_of_tenants() -> None:
    tasks = (task(0.0, 1, "a"), task(0.0, 1, "b", BATCH), task(0.0, 1, "c", BATCH))
    assert [group.fair_share for group in summed(play("fcfs", *tasks)).tenants] == pytest.approx(
        [8 / 9, 1 / 9 * 3 / 4, 1 / 9 / 4]
    )


def test_without_contention_jain_is_of_the_whole_run() -> None:
    one = summed(play("fcfs", task(0.0, 3, "a"), task(5.0, 1, "b")))
    assert not one.jain_is_contended
    assert one.jain == pytest.approx(jain_index([3 / 0.25, 1 / 0.75]))
    assert math.isnan(one.tenants[0].contended_share)
    assert one.as_json()["tenants"][0]["contended_share"] is None


def test_predictions_are_compared_with_what_happened() -> None:
    count = 50
    outcome = Outcome(make_workload(*(task(0.0, 1) for _ in range(count))), prompt_cost=1.0, output_cost=2.0)
    for index in range(count):
        outcome.wait(index, 0.0)
        outcome.told.ahead[index] = index
        outcome.told.wait_s[index] = index + 2.0  # true: index; the reference says index + 1
        outcome.told.on_time[index] = 0.1 if index < 25 else 0.9
        outcome.start(index, float(index))
        is_early = index % 25 < 5 if index < 25 else index % 25 < 20
        outcome.end(index, Fate.FINISHED if is_early else Fate.FAILED, 100.0)
    honesty = summed(outcome).honesty
    assert honesty.starts == count - 2
    assert (honesty.median_error_s, honesty.reference_error_s) == (2.0, 1.0)
    assert honesty.chances == count
    assert honesty.brier == pytest.approx((5 * 0.81 + 20 * 0.01) / 25)
    assert honesty.brier_base == pytest.approx(0.25)
    assert [part.tasks for part in honesty.bins] == [10] * 5
    assert [part.told for part in honesty.bins] == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])
    assert [part.happened for part in honesty.bins] == [0.5, 0.0, 0.5, 1.0, 0.5]
