"""What measures the bars notices what it is there for."""

import random

import pytest

from llorch.domain.ledger import Ledger
from tests.prove import __main__ as prove
from tests.prove.histories import History
from tests.prove.leaks import KILLS
from tests.prove.load import Books, Ran, Window
from tests.prove.report import Figure, at_least, at_most, not_measured

END = {"usage": {"prompt_tokens": 30, "completion_tokens": 10}}


def play(seed: int, kind: str) -> list[str]:
    history = History(seed)
    for _ in range(12):
        history.step()
    KILLS[kind](history, random.Random(seed))
    history.drain()
    return history.broken()


@pytest.mark.parametrize("kind", KILLS)
def test_histories_leave_no_reservation_whoever_is_killed(kind: str) -> None:
    assert [problem for seed in range(25) for problem in play(seed, kind)] == []


def test_histories_notice_a_task_that_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "settle_task", lambda *_: None)
    assert any("holds" in problem for seed in range(25) for problem in play(seed, "task"))


def test_histories_notice_a_budget_that_is_settled_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Ledger.settle_task

    def forget_prompt(self: Ledger, key: tuple[str, str], use: object, now: float) -> None:
        use.prompt_tokens = 0  # type: ignore[attr-defined]
        settle(self, key, use, now)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "settle_task", forget_prompt)
    assert any("used" in problem for seed in range(25) for problem in play(seed, "reader"))


def test_a_history_is_the_same_again() -> None:
    one, two = History(7), History(7)
    for _ in range(40):
        one.step()
        two.step()
    assert (one.seen, one.now, one.accounts) == (two.seen, two.now, two.accounts)


def test_a_window_has_the_prompt_of_what_started_in_it_and_its_part_of_the_output() -> None:
    ran = Ran("a", 0.0, {}, started={}, started_at=10.0, end=END, ended_at=20.0)
    assert ran.cost_within(0.0, 30.0) == 30 + 20
    assert ran.cost_within(0.0, 15.0) == 30 + 10
    assert ran.cost_within(15.0, 30.0) == 10
    assert ran.cost_within(20.0, 30.0) == 0
    books = Books(ran=[ran, Ran("b", 0.0, {})])
    window = Window(0.0, 15.0, 0, {})
    assert dict(window.served(books)) == {"a": 40.0, "b": 0.0}
    assert dict(window.starts(books)) == {"a": 1}


def test_a_bar_is_met_at_its_limit_and_not_beyond() -> None:
    assert at_least(1, "a", 0.95, 0.95).is_met
    assert not at_least(1, "a", 0.9499, 0.95).is_met
    assert at_most(1, "a", 5.0, 5.0).is_met
    assert not at_most(1, "a", 5.01, 5.0).is_met
    assert not at_most(1, "a", float("nan"), 5.0).is_met
    assert not not_measured(1, "a", "why").is_met


@pytest.mark.parametrize(("is_met", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_tells_whether_all_bars_are_met(
    is_met: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [Figure(1, "shares", "≤ 5 %", "3 %", is_met=True), Figure(1, "others", "", "", is_met)]
    monkeypatch.setattr(prove, "measure", lambda *_: figures)
    monkeypatch.setattr(prove, "write", lambda *_: None)
    assert prove.main(["1"]) == status
    assert ("UNMET" in capsys.readouterr().out) == (status == 1)
