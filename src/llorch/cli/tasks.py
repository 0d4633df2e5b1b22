"""Commands about tasks that exist: cancel, status."""

import asyncio
from collections.abc import Iterable

import click
from rich.table import Table

from llorch.cli.connection import Connection, connects
from llorch.cli.live import clean, print_json, table_console
from llorch.cli.words import budgets_left
from llorch.client import ApiError, ErrorCode, Session, Task, TaskState, TaskSummary, known

PAGE = 200


@click.command()
@click.argument("task_id")
@connects
def cancel(connection: Connection, task_id: str) -> None:
    """Cancel a task, queued or running. A task that has ended keeps its outcome."""

    async def run() -> None:
        async with connection.client() as client:
            await client.cancel(task_id)

    asyncio.run(run())


@click.command()
@click.argument("task_id", required=False)
@click.option("--state", type=click.Choice([state.value for state in TaskState]), help="Only tasks in this state.")
@click.option("--session", metavar="UUID", help="Only tasks of this session.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Most tasks to list.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every task.")
@connects
def status(
    connection: Connection, task_id: str | None, *, state: str | None, session: str | None, limit: int, as_json: bool
) -> None:
    """Show the task TASK_ID, or list your own tasks, newest first."""
    wanted = None if state is None else TaskState(state)
    if task_id is not None:
        task = asyncio.run(_get(connection, task_id))
        print_json([task]) if as_json else _print_task(task)
        return
    found = asyncio.run(_list(connection, wanted, session, limit))
    if as_json:
        print_json(found)
        return
    _print_list(found)
    if session is not None and (kept := asyncio.run(_find_session(connection, session))) is not None:
        click.echo(f"\n{_session_line(kept)}")


async def _get(connection: Connection, task_id: str) -> Task:
    async with connection.client() as client:
        return await client.get_task(task_id)


async def _list(connection: Connection, state: TaskState | None, session: str | None, limit: int) -> list[TaskSummary]:
    """The newest tasks, over as many pages as it takes."""
    found: list[TaskSummary] = []
    cursor: str | None = None
    async with connection.client() as client:
        while len(found) < limit:
            page_size = min(PAGE, limit - len(found))
            page = await client.list_tasks(state=state, session_id=session, limit=page_size, cursor=cursor)
            found += page.tasks
            cursor = page.next_cursor
            if cursor is None:
                break
    return found


async def _find_session(connection: Connection, session_id: str) -> Session | None:
    """The session; None for one that is no longer."""
    try:
        async with connection.client() as client:
            return await client.get_session(session_id)
    except ApiError as error:
        if error.code != ErrorCode.NOT_FOUND.value:
            raise
        return None


def _session_line(session: Session) -> str:
    ends = f"ends in {session.ttl_ms_remaining / 1000:.0f} s unless used"
    warm = {True: " · KV cache warm", False: " · KV cache cold", None: ""}[session.kv_warmth]
    return f"session: {session.turns} of {session.turns_max} turns · {ends}{warm}{budgets_left(session.budgets)}"


def _print_task(task: Task) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in _facts(task):
        if value is not None:
            grid.add_row(name, clean(value))
    table_console().print(grid)
    if task.output is not None:
        click.echo()
        click.echo(clean(task.output.text))


def _facts(task: Task) -> Iterable[tuple[str, str | None]]:
    """What is known of a task; None is not shown."""
    timeline, usage = task.timeline, task.usage
    yield "task", task.task_id
    yield "session", task.session_id
    yield "state", task.state.value
    yield "model", f"{task.model_ref} ({task.engine.value})"
    yield "priority", task.priority.value
    yield "determinism", f"{task.determinism.value}, seed {task.seed}"
    yield "position", None if task.queue_position is None else str(task.queue_position)
    yield "start in", None if task.predicted_start_ms is None else f"about {task.predicted_start_ms} ms"
    yield "accepted", timeline.accepted_at
    yield "waited", ", ".join([f"{timeline.waited_ms} ms", *(reason.value for reason in timeline.wait_reasons)])
    yield "preempted", f"{preemptions} times" if (preemptions := known(timeline.preemptions)) else None
    yield "started", timeline.started_at
    yield "first token", timeline.first_token_at
    yield "ended", timeline.ended_at
    if task.placement is not None:
        yield "placement", f"{task.placement.replica_id}, attempt {task.placement.attempt}"
    if task.finish_reason is not None:
        yield "finish reason", task.finish_reason.value
    if usage is not None:
        yield "tokens", f"{_known(usage.prompt_tokens)} in, {_known(usage.completion_tokens)} out"
    yield "labels", ", ".join(f"{name}={value}" for name, value in task.labels.items()) or None
    if task.error is not None:
        yield "error", f"{task.error.code.value}: {task.error.message}"
        yield "policy", task.error.policy_label
        yield "try again", None if task.error.retry_after_ms is None else f"in {task.error.retry_after_ms} ms"


def _known(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _print_list(tasks: list[TaskSummary]) -> None:
    table = Table("task", "state", "priority", "model", "accepted", "ended", "outcome", box=None, pad_edge=False)
    for task in tasks:
        outcome = task.finish_reason or task.error_code
        table.add_row(
            task.task_id, task.state.value, task.priority.value, task.model_ref, task.accepted_at, task.ended_at or "",
            outcome.value if outcome else "",
        )  # fmt: skip
    table_console().print(table)
