"""`llorch simulate` as it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llorch.cli import simulate as command
from llorch.cli.exits import Exit
from llorch.cli.main import cli
from llorch.simulator.compare import POLICIES

SPEC = """\
title: small
seed: 9
tasks: 60
load: 1.2
replicas: {decode_s_per_token: 0.01, slots: 2}
tenants:
  a: {traffic: {prompt_tokens: 5, output_tokens: {distribution: exponential, mean: 50}, deadline: {slack: 4}}}
  b: {weight: 2, traffic: {prompt_tokens: 5, output_tokens: 20, priority: batch}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["simulate", *map(str, arguments)])


def test_the_command_knows_every_policy() -> None:
    assert tuple(POLICIES) == command.POLICIES


def test_tables_stand_side_by_side_with_the_seed(file: Path) -> None:
    result = run(file, "--policy", "ours,fcfs,rr")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("small · seed 9\n60 tasks of 2 tenants")
    [header] = [line for line in result.stdout.splitlines() if line.split()[:2] == ["tasks", "ours"]]
    assert header.split() == ["tasks", "ours", "fcfs", "rr"]
    assert "share of weighted tokens" in result.stdout


def test_json_holds_every_policy_and_tenant(file: Path) -> None:
    tree = json.loads(run(file, "--json", "--policy", "edf,ours").stdout)
    assert [one["policy"] for one in tree["policies"]] == ["edf", "ours"]
    assert [group["name"] for group in tree["policies"][0]["tenants"]] == ["a", "b"]
    assert all(sum(one["fates"].values()) == tree["tasks"] == 60 for one in tree["policies"])


def test_set_changes_what_is_asked_and_nothing_else(file: Path) -> None:
    before, after = (
        json.loads(run(file, "--json", "--policy", "fcfs", *change).stdout)["policies"][0]
        for change in ((), ("--set", "tenants.b.weight=6"))
    )
    assert [group.pop("weight") for group in before["tenants"]] == [1.0, 2.0]
    assert [group.pop("weight") for group in after["tenants"]] == [1.0, 6.0]
    assert before["fates"] == after["fates"]
    assert before["waits"] == after["waits"]


def test_a_saved_workload_gives_the_same_numbers(file: Path, tmp_path: Path) -> None:
    first = json.loads(run(file, "--json", "--save-workload", tmp_path / "w.jsonl").stdout)
    again = json.loads(run(file, "--json", "--set", "workload=w.jsonl").stdout)
    assert len((tmp_path / "w.jsonl").read_text().splitlines()) == 60
    assert first == again


def test_the_picture_is_a_png(file: Path, tmp_path: Path) -> None:
    result = run(file, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_a_picture_is_refused_before_the_work(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(file, "--plot", tmp_path / "p.png")
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert "llorch[simulate]" in result.stderr
    assert run(file).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policy", "ours,lifo"), "'lifo' is none of ours, fcfs"),
        (("--set", "tenants.a.wait=1"), "tenants.a.wait"),
        (("--set", "workload=none.jsonl"), "none.jsonl"),
        (("--plot", "/no/such/directory/p.png"), "/no/such/directory/p.png"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(file: Path, arguments: tuple[str, ...], told: str) -> None:
    result = run(file, *arguments)
    assert result.exit_code == Exit.USAGE
    assert told in result.stderr


def test_an_empty_workload_is_refused(file: Path) -> None:
    file.with_name("w.jsonl").write_text("")
    result = run(file, "--set", "workload=w.jsonl")
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert "no task arrives" in result.stderr


def test_other_commands_do_not_load_the_simulator() -> None:
    code = "import sys, llorch.cli.main; sys.exit(any(name.startswith('llorch.simulator') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
