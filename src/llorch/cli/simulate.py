"""The command simulate: what a policy would do to a workload, without a server.

The room that does the work is imported when the command runs.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from llorch.cli.exits import Complaint, Exit

POLICIES = ("ours", "fcfs", "priority", "edf", "rr", "fcfs-unbounded")
_QUIET_S = 2.0
_EVERY_S = 1.0
_FILE = click.Path(dir_okay=False, path_type=Path)


def _check_policies(_ctx: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = list(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in POLICIES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(POLICIES)}")
    return names


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--policy", "policies", default="ours,fcfs,priority,edf,rr", show_default=True, callback=_check_policies,
    metavar="NAME,…", help=f"What to play the workload with: {', '.join(POLICIES)}.",
)  # fmt: skip
@click.option(
    "--set", "changes", multiple=True, metavar="SETTING=VALUE",
    help="Change a setting of the file, as tenants.b.weight=4; may be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option("--plot", "picture", type=_FILE, help="Also write a picture, a PNG file (extra `llorch[simulate]`).")
@click.option("--save-workload", "saved", type=_FILE, help="Also write the tasks, one JSON object a line.")
def simulate(
    *,
    file: Path,
    policies: Sequence[str],
    changes: Sequence[str],
    as_json: bool,
    picture: Path | None,
    saved: Path | None,
) -> None:
    """Run the real scheduler under a virtual clock against modelled replicas, next to simple queues.

    FILE is a YAML file that declares replicas, queue, tenants and their traffic, and a seed. The same file gives the
    same numbers. Queue settings have the names that they have in llorch.yaml.
    """
    from llorch.simulator import compare, generators, report, spec, workload

    if picture is not None:
        from llorch.simulator.plot import check_can_plot

        check_can_plot()
    declared = spec.load_spec(file, changes)
    begin = time.monotonic()
    work = generators.workload_of(declared)
    if not len(work):
        raise Complaint.line("INVALID_PARAMS", f"{file}: no task arrives", "", Exit.USAGE)
    if saved is not None:
        workload.write_workload(work, saved)
    _say(begin, f"workload: {len(work):,} tasks")
    results = compare.compare(declared, work, policies, lambda policy: _watch(policy, len(work)))
    heading = compare.heading_of(declared, work)
    click.echo((report.as_json if as_json else report.as_text)(heading, results))
    if picture is not None:
        from llorch.simulator.plot import plot

        plot(heading, results, picture)


def _say(begin: float, text: str) -> None:
    """Tell people what took so long, if it did."""
    passed_s = time.monotonic() - begin
    if passed_s >= _QUIET_S:
        click.echo(f"{text} ({passed_s:.0f} s)", err=True)


def _watch(policy: str, count: int) -> Callable[[int, float], None]:
    """A line on stderr now and then, where a run takes long."""
    begin = time.monotonic()
    told = begin + _QUIET_S - _EVERY_S

    def progress(ended: int, now: float) -> None:
        nonlocal told
        passed = time.monotonic()
        if passed - told < _EVERY_S:
            return
        told = passed
        rate = ended / (passed - begin)
        left = f", {(count - ended) / rate:.0f} s left" if rate else ""
        part = f"{ended:,} of {count:,} tasks ({ended / count:.0%})"
        line = f"{policy}: {part}, at {now:.0f} s of virtual time, {rate:,.0f} tasks/s{left}"
        is_terminal = sys.stderr.isatty()
        click.echo(f"\r{line}\x1b[K" if is_terminal else line, err=True, nl=not is_terminal)

    return progress
