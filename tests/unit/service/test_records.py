"""What is remembered of tasks, and for how long."""

import pytest

from llorch.domain.task import ANYWHERE, Priority, Task, TaskSpec, WaitReason
from llorch.errors import NotFound, StreamGone
from llorch.service.records import Record, Records, Retention
from tests.unit.service.house import route, submission

ROUTE = route()
KEEP = Retention(transcript_s=10.0, record_s=100.0, records_per_tenant=3)


def record(task_id: str, tenant: str = "acme") -> Record:
    asked = submission(task_id, tenant=tenant)
    made = Record(asked, ROUTE, seed=0, correlation_id="c", accepted_wall=0.0, prompt=None)
    spec = TaskSpec(made.key, (tenant, "s"), Priority.BATCH, 1, 1)
    made.task = Task(spec, order=1, accepted_at=0.0, need=ANYWHERE)
    return made


def filed(records: Records, task_id: str, tenant: str = "acme", *, ended_at: float | None = None) -> Record:
    made = record(task_id, tenant)
    records.file(made)
    if ended_at is not None:
        made.stream.append_tokens(["a"])
        made.stream.close("end", {})
        records.settle(made, ended_at)
    return made


def kept(records: Records, tenant: str = "acme") -> list[str]:
    return [each.submission.task_id for each in records.newest_first(tenant, None)]


def test_record_is_found_by_tenant_and_task_id_only() -> None:
    records = Records(KEEP)
    made = filed(records, "a")
    assert records.get(("acme", "a")) is made
    for key in [("other", "a"), ("acme", "b")]:
        assert records.find(key) is None
        with pytest.raises(NotFound):
            records.get(key)


def test_transcript_expires_first_and_the_record_later() -> None:
    """ORCH-2031, ORCH-2037."""
    records = Records(KEEP)
    made = filed(records, "a", ended_at=5.0)
    assert records.next_expiry() == 15.0
    records.expire(14.9)
    assert made.stream.output() == "a"
    records.expire(15.0)
    assert made.stream.is_gone
    with pytest.raises(StreamGone):
        made.stream.join(0, lambda: None)
    assert records.next_expiry() == 105.0
    records.expire(104.9)
    assert kept(records) == ["a"]
    records.expire(105.0)
    assert kept(records) == []
    assert records.next_expiry() is None


def test_task_that_has_not_ended_is_never_forgotten() -> None:
    records = Records(KEEP)
    filed(records, "live")
    records.expire(1e9)
    for number in range(10):
        filed(records, f"t{number}", ended_at=float(number))
    assert "live" in kept(records)


def test_peer_bug_15_finished_records_of_a_tenant_are_bounded_and_the_oldest_end_goes_first() -> None:
    """ORCH-2031."""
    records = Records(KEEP)
    first, second = filed(records, "a"), filed(records, "b")
    records.settle(second, 1.0)
    records.settle(first, 2.0)
    filed(records, "c", ended_at=3.0)
    filed(records, "d")
    assert kept(records) == ["d", "c", "a"]
    assert second.stream.is_gone


def test_peer_bug_15_another_tenant_crowds_nobody_out() -> None:
    records = Records(KEEP)
    filed(records, "mine", ended_at=0.0)
    for number in range(50):
        filed(records, f"t{number}", "other", ended_at=1.0)
    assert kept(records) == ["mine"]
    assert len(kept(records, "other")) == 3


def test_peer_bug_15_nothing_holds_on_to_what_was_crowded_out() -> None:
    records = Records(KEEP)
    for number in range(1000):
        filed(records, f"t{number}", ended_at=0.0)
    assert len(records._records) == len(records._transcripts) == 3


def test_more_live_tasks_than_records_are_all_kept() -> None:
    records = Records(KEEP)
    for number in range(10):
        filed(records, f"t{number}")
    assert len(kept(records)) == 10


def test_record_that_was_crowded_out_does_not_take_its_successor_along() -> None:
    records = Records(KEEP)
    filed(records, "a", ended_at=0.0)
    for name in "bcd":
        filed(records, name, ended_at=50.0)
    assert records.find(("acme", "a")) is None
    again = filed(records, "a")
    records.expire(100.0)
    assert records.find(("acme", "a")) is again


def test_records_come_newest_first_and_in_pages() -> None:
    records = Records(Retention())
    made = [filed(records, f"t{number}") for number in range(5)]
    assert kept(records) == ["t4", "t3", "t2", "t1", "t0"]
    page = [each.submission.task_id for each in records.newest_first("acme", made[2].number)]
    assert page == ["t1", "t0"]
    assert list(records.newest_first("nobody", None)) == []


def test_wait_reasons_are_remembered_once_for_each_change() -> None:
    made = record("a")
    for reason in (WaitReason.TASKS_AHEAD, WaitReason.TASKS_AHEAD, WaitReason.SLOTS_BUSY, WaitReason.TASKS_AHEAD):
        made.note_wait(reason)
    assert made.wait_reasons == [WaitReason.TASKS_AHEAD, WaitReason.SLOTS_BUSY, WaitReason.TASKS_AHEAD]
