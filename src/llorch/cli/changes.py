"""The commands drain and reload: begin a change, show how far it is, and end as it ended."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
from rich.console import Console

from llorch.cli.connection import Connection, connects
from llorch.cli.exits import Complaint, Exit
from llorch.cli.live import LiveLine, clean, print_json
from llorch.cli.words import change_line, config_line
from llorch.client import AsyncClient, ChangeState, ConfigChange, ConfigStatus, PoolChange

LOOK_S = 0.2
"""Between two looks at how far a change is."""

T = TypeVar("T", PoolChange, ConfigStatus)
C = TypeVar("C", PoolChange, ConfigChange)

_deadline = click.option(
    "--deadline-s", type=click.FloatRange(0, 86400), metavar="SECONDS",
    help="How long running tasks may go on before they are moved or ended; by default what the pool says (drain_s).",
)  # fmt: skip
_no_wait = click.option("--no-wait", is_flag=True, help="Do not wait until it is over.")
_json = click.option("--json", "as_json", is_flag=True, help="How it ended, as one JSON object.")


@click.command()
@click.argument("pool")
@_deadline
@_no_wait
@_json
@connects
def drain(connection: Connection, pool: str, *, deadline_s: float | None, no_wait: bool, as_json: bool) -> None:
    """Drain POOL: let nothing start there, move or end what runs, and stop its engines.

    `llorch reload POOL` starts it again. Needs a key with the scope admin.
    """

    async def run() -> PoolChange:
        async with connection.client() as client:
            begun = await client.drain_pool(pool, _ms(deadline_s))
            return begun if no_wait else await _follow_pool(client, pool, begun)

    _tell_pool(pool, asyncio.run(run()), as_json=as_json)


@click.command()
@click.argument("pool", required=False)
@click.option("--config", "is_config", is_flag=True, help="Reload the configuration file instead of a pool.")
@click.option("--revert", is_flag=True, help="Go back to the configuration before the latest reload.")
@_deadline
@_no_wait
@_json
@connects
def reload(
    connection: Connection,
    pool: str | None,
    *,
    is_config: bool,
    revert: bool,
    deadline_s: float | None,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Replace the engines of POOL one after the other, without losing a task; or reload the configuration.

    A new engine is ready before the old one goes where memory allows. When a new one fails, the old ones serve on.
    Needs a key with the scope admin.
    """
    if (pool is None) != (is_config or revert) or (is_config and revert):
        raise click.UsageError("name a POOL, or one of --config and --revert")
    if pool is None and deadline_s is not None:
        raise click.UsageError("--deadline-s goes with a POOL; a configuration says itself how long its pools have")
    if pool is not None:
        _tell_pool(pool, asyncio.run(_reload_pool(connection, pool, deadline_s, no_wait=no_wait)), as_json=as_json)
    else:
        _tell_config(asyncio.run(_change_config(connection, revert=revert, no_wait=no_wait)), as_json=as_json)


async def _reload_pool(connection: Connection, pool: str, deadline_s: float | None, *, no_wait: bool) -> PoolChange:
    async with connection.client() as client:
        begun = await client.reload_pool(pool, _ms(deadline_s))
        return begun if no_wait else await _follow_pool(client, pool, begun)


async def _change_config(connection: Connection, *, revert: bool, no_wait: bool) -> ConfigStatus:
    async with connection.client() as client:
        begun = await (client.revert_config() if revert else client.reload_config())
        return begun if no_wait else await _follow_config(client, begun)


async def _follow_config(client: AsyncClient, begun: ConfigStatus) -> ConfigStatus:
    async def look() -> ConfigStatus:
        status = await client.get_config()
        _known(status.change, begun.change)
        return status

    return await _follow(look, begun, config_line, _is_config_over)


async def _follow_pool(client: AsyncClient, pool: str, begun: PoolChange) -> PoolChange:
    async def look() -> PoolChange:
        return _known((await client.get_pool_health(pool)).change, begun)

    return await _follow(look, begun, lambda change: f"{pool}: {change_line(change)}", _is_over)


async def _follow(
    look: Callable[[], Awaitable[T]], begun: T, words: Callable[[T], str], is_over: Callable[[T], bool]
) -> T:
    """Show how far it is until it is over."""
    line = LiveLine(Console(stderr=True), is_answer_here=False)
    change = begun
    try:
        while not is_over(change):
            line.show(clean(words(change)))
            await asyncio.sleep(LOOK_S)
            change = await look()
    finally:
        line.hide()
    return change


def _known(seen: C | None, begun: C | None) -> C:
    """What the server tells, as long as that is the change that this command has begun."""
    if seen is None or begun is None or seen.started_at != begun.started_at:
        raise Complaint(
            "llorch: how it ended is not known: the server was restarted, or another change has begun since."
            " `llorch pools` shows how it is now.",
            Exit.FAILED,
        )
    return seen


def _is_over(change: PoolChange) -> bool:
    return change.state is not ChangeState.running


def _is_config_over(status: ConfigStatus) -> bool:
    return status.change is None or status.change.state is not ChangeState.running


def _tell_pool(pool: str, change: PoolChange, *, as_json: bool) -> None:
    if as_json:
        print_json([change])
    else:
        click.echo(clean(f"{pool}: {change_line(change)}"))
    _check(change.state)


def _tell_config(status: ConfigStatus, *, as_json: bool) -> None:
    if as_json:
        print_json([status])
    else:
        click.echo(clean(config_line(status)))
    if status.change is not None:
        _check(status.change.state)


def _check(state: ChangeState) -> None:
    """A change that failed ends the command as a failure; what it was about has been told."""
    if state is ChangeState.rolled_back:
        raise Complaint("llorch: it failed; everything is as it was before.", Exit.FAILED)
    if state is ChangeState.failed:
        raise Complaint("llorch: it failed, and not everything could be put back: see `llorch pools`.", Exit.FAILED)


def _ms(deadline_s: float | None) -> int | None:
    return None if deadline_s is None else round(deadline_s * 1000)
