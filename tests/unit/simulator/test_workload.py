"""The workload file: what is written is read again, and what cannot be read says where."""

import math
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.errors import ConfigError
from llorch.simulator.workload import Entry, WorkloadError, parse_workload, read_workload, write_workload
from tests.unit.simulator.stage import BATCH, INTERACTIVE, make_workload, task

GOOD = b'{"arrival_s":1.5,"tenant":"a","prompt_tokens":3,"output_tokens":5,"max_tokens":8}'


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    most = draw(st.integers(1, 2**31 - 1))
    return Entry(
        arrival_s=draw(st.floats(0, 1e6)),
        tenant=draw(st.sampled_from(["a", "b", "ü \n"])),
        prompt_tokens=draw(st.integers(0, 2**31 - 1)),
        output_tokens=draw(st.integers(1, most)),
        max_tokens=most,
        priority=draw(st.sampled_from([INTERACTIVE, BATCH])),
        expected_tokens=draw(st.integers(1, most)),
        session=draw(st.none() | st.sampled_from(["s", "t"])),
        deadline_s=draw(st.none() | st.floats(0.001, 1e6)),
    )


@given(st.lists(entry(), max_size=20).map(lambda tasks: sorted(tasks, key=lambda one: one.arrival_s)))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, tasks: list[Entry]) -> None:
    file = tmp_path_factory.mktemp("workload") / "w.jsonl"
    write_workload(make_workload(*tasks), file)
    assert list(read_workload(file).entries()) == tasks


def test_absent_fields_have_their_defaults() -> None:
    workload = parse_workload([GOOD, b"\n", GOOD], "w")
    assert len(workload) == 2
    assert list(workload.expected_tokens) == [8, 8]
    assert all(math.isnan(deadline) for deadline in workload.deadline_s)
    assert workload.session_name(0) != workload.session_name(1)


def test_sessions_of_two_tenants_with_one_name_are_two() -> None:
    lines = [GOOD.replace(b'"a"', b'"%s","session":"s"' % tenant) for tenant in (b"a", b"b", b"a")]
    assert list(parse_workload(lines, "w").session) == [0, 1, 0]


@pytest.mark.parametrize(
    ("line", "field", "what"),
    [
        (GOOD.replace(b"1.5", b'"soon"'), "arrival_s", "Expected `float`"),
        (GOOD.replace(b"1.5", b"-1"), "arrival_s", ">= 0"),
        (GOOD.replace(b"1.5", b"0.5"), "arrival_s", "before the task above"),
        (GOOD.replace(b'"tenant":"a",', b""), "tenant", "missing"),
        (GOOD.replace(b'"output_tokens":5', b'"output_tokens":0'), "output_tokens", ">= 1"),
        (GOOD.replace(b'"output_tokens":5', b'"output_tokens":9'), "output_tokens", "more than max_tokens"),
        (GOOD.replace(b"}", b',"expected_tokens":9}'), "expected_tokens", "more than max_tokens"),
        (GOOD.replace(b"}", b',"priority":"vip"}'), "priority", "vip"),
        (GOOD.replace(b"}", b',"deadline_s":0}'), "deadline_s", "> 0"),
        (GOOD.replace(b"}", b',"color":1}'), "color", "unknown"),
        (b"[]", None, "Expected `object`"),
        (b"{", None, "not JSON"),
        (b"\xff", None, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(line: bytes, field: str | None, what: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_workload([GOOD, b"", line], "w.jsonl")
    assert (caught.value.line, caught.value.field) == (3, field)
    assert str(caught.value).startswith(f"w.jsonl:3: {field}: " if field else "w.jsonl:3: ")
    assert what in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_of_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_workload(tmp_path / "none.jsonl")


def test_a_task_takes_no_more_than_fifty_bytes() -> None:
    workload = make_workload(*[task(float(at), 5) for at in range(1000)])
    columns: list[array[int] | array[float]] = [
        workload.arrival_s, workload.tenant, workload.level, workload.session, workload.prompt_tokens,
        workload.output_tokens, workload.expected_tokens, workload.max_tokens, workload.deadline_s,
    ]  # fmt: skip
    assert sum(column.itemsize for column in columns) <= 50
