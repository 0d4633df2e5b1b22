"""The command pools: what is there to run tasks, and how it fares."""

import asyncio

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llorch.cli.connection import Connection, connects
from llorch.cli.live import clean, print_json, table_console
from llorch.client import Pool, PoolHealth


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every pool: {pool, health}.")
@connects
def pools(connection: Connection, as_json: bool) -> None:
    """Show pools, their queues and their replicas. Needs a key with the scope control."""
    found = asyncio.run(_read(connection))
    if as_json:
        print_json({"pool": pool, "health": health} for pool, health in found)
    else:
        table_console().print(Group(_pools(found), Text(), _replicas(found), *_notices(found)))


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
        return "draining"
    if health.ready:
        return "ready"
    return "unready" if health.live else "down"


def _replicas(found: list[tuple[Pool, PoolHealth]]) -> Table:
    table = Table("replica", "state", "busy", "engine version", "determinism", "last error", box=None, pad_edge=False)
    for _, health in found:
        for replica in health.replicas:
            version = replica.engine_version or "unknown"
            error = replica.last_error
            table.add_row(
                replica.replica_id, replica.state.value, f"{replica.slots_busy}/{replica.slots}",
                clean(f"{version} ({replica.engine_version_source.value})"), replica.determinism.value,
                clean(f"{error.code.value}: {error.message} ({error.at})") if error else "",
            )  # fmt: skip
    return table


def _notices(found: list[tuple[Pool, PoolHealth]]) -> list[Text]:
    return [Text(clean(f"\n{pool.id}: {pool.notice}"), style="bold") for pool, _ in found if pool.notice]
