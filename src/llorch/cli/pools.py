"""The command pools: what is there to run tasks, and how it fares."""

import asyncio
from collections.abc import Iterator

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llorch.cli.connection import Connection, connects
from llorch.cli.live import clean, print_json, table_console
from llorch.cli.words import change_line, seconds
from llorch.client import Pool, PoolHealth, ReplicaHealth, ReplicaProcess


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every pool: {pool, health}.")
@connects
def pools(connection: Connection, as_json: bool) -> None:
    """Show pools, their queues and their replicas. Needs a key with the scope control."""
    found = asyncio.run(_read(connection))
    if as_json:
        print_json({"pool": pool, "health": health} for pool, health in found)
        return
    told = [*_changes(found), *_errors(found), *_notices(found)]
    table_console().print(Group(_pools(found), Text(), _replicas(found), *told))


async def _read(connection: Connection) -> list[tuple[Pool, PoolHealth]]:
    async with connection.client() as client:
        return [(pool, await client.get_pool_health(pool.id)) for pool in (await client.list_pools()).pools]


def _pools(found: list[tuple[Pool, PoolHealth]]) -> Table:
    table = Table("pool", "engine", "model", "quant", "ctx", "state", "ready", "queued", box=None, pad_edge=False)
    for pool, health in found:
        route = pool.route
        queued = ", ".join(
            f"{queue.priority.value} {queue.depth}/{queue.capacity} ({queue.full_policy.value})"
            for queue in pool.queues
        )
        table.add_row(
            pool.id, route.engine.value, route.model, route.quant or "", str(route.ctx), _state(health),
            f"{pool.replicas.ready}/{pool.replicas.total}", queued,
        )  # fmt: skip
    return table


def _state(health: PoolHealth) -> str:
    if health.draining:
        return "draining" if any(r.slots_busy or r.state.value == "draining" for r in health.replicas) else "drained"
    if health.ready:
        return "ready"
    return "unready" if health.live else "down"


def _replicas(found: list[tuple[Pool, PoolHealth]]) -> Table:
    table = Table("replica", "state", "busy", "process", "engine version", "determinism", box=None, pad_edge=False)
    for _, health in found:
        for replica in health.replicas:
            version = replica.engine_version or "unknown"
            table.add_row(
                replica.replica_id, replica.state.value, f"{replica.slots_busy}/{replica.slots}",
                clean(_process(replica)), clean(f"{version} ({replica.engine_version_source.value})"),
                replica.determinism.value,
            )  # fmt: skip
    return table


def _process(replica: ReplicaHealth) -> str:
    """Where and how the process of a managed replica is, in few words."""
    process = replica.process
    if process is None:
        return "not managed"
    words = [process.phase.value]
    if process.next_start_ms is not None:
        words[0] += f" {seconds(process.next_start_ms)}"
    if process.pid is not None:
        words.append(f"pid {process.pid}")
    if replica.node is not None:
        words.append(f"on {replica.node}")
    if replica.devices:
        words.append(f"GPU {','.join(map(str, replica.devices))}")
    return ", ".join([*words, *_failures(process)])


def _failures(process: ReplicaProcess) -> Iterator[str]:
    if process.restarts:
        yield f"{process.restarts} failure{'s' if process.restarts > 1 else ''}"
    if process.breaker.value != "closed":
        yield f"breaker {process.breaker.value}"


def _changes(found: list[tuple[Pool, PoolHealth]]) -> list[Text]:
    told = [(pool, health.change) for pool, health in found if health.change is not None]
    return [Text(clean(f"\n{pool.id}: {change_line(change)}")) for pool, change in told]


def _errors(found: list[tuple[Pool, PoolHealth]]) -> Iterator[Text]:
    """The last error of every replica that has had one; those of the past are told as such."""
    for _, health in found:
        for replica in health.replicas:
            error = replica.last_error
            if error is None:
                continue
            cause = replica.process.cause if replica.process is not None else None
            what = f"{error.code.value}{f' ({cause.value})' if cause is not None else ''}: {error.message}"
            when = f"last error, {error.at}" if replica.state.value == "ready" else error.at
            yield Text(clean(f"\n{replica.replica_id}: {what} [{when}]"))


def _notices(found: list[tuple[Pool, PoolHealth]]) -> list[Text]:
    return [Text(clean(f"\n{pool.id}: {pool.notice}"), style="bold") for pool, _ in found if pool.notice]
