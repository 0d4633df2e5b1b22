"""Commands about nodes: list them, make a token, be the pool manager of one."""

import asyncio
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llorch.cli.connection import Connection, connects
from llorch.cli.live import clean, print_json, table_console
from llorch.cli.operate import check_name, quoted
from llorch.cli.words import seconds
from llorch.client import HostFacts, Node

_FILE = click.Path(dir_okay=False, exists=True)
_GIB = 1 << 30
_MILLISECONDS = re.compile(r"\.\d+(?=Z$)")
"""Of a time; a table on 100 columns has no room for them."""


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every node.")
@connects
@click.pass_context
def nodes(ctx: click.Context, connection: Connection, as_json: bool) -> None:
    """Show the hosts whose pool managers may join. Needs a key with the scope control."""
    if ctx.invoked_subcommand is not None:
        return
    found = asyncio.run(_read(connection))
    if as_json:
        print_json(found)
    elif not found:
        click.echo("no nodes are configured; `llorch nodes new` makes the token and the entry of one", err=True)
    else:
        table_console().print(Group(_table(found), *_gpus(found)))


async def _read(connection: Connection) -> list[Node]:
    async with connection.client() as client:
        return (await client.list_nodes()).nodes


def _table(found: list[Node]) -> Table:
    table = Table(
        "node", "state", "since", "lease", "version", "address", "memory", "replicas", box=None, pad_edge=False
    )
    for node in found:
        lease = "" if node.lease_remaining_ms is None else seconds(node.lease_remaining_ms)
        replicas = ", ".join(f"{r.replica_id} {r.phase.value}" for r in node.replicas)
        table.add_row(
            node.node_id, node.state.value, _MILLISECONDS.sub("", node.since or ""), lease,
            clean(node.manager_version or ""), clean(node.address or ""), _memory(node.host), clean(replicas),
        )  # fmt: skip
    return table


def _memory(host: HostFacts | None) -> str:
    if host is None:
        return ""
    return f"{host.ram_available_bytes / _GIB:.1f} of {host.ram_total_bytes / _GIB:.1f} GiB free"


def _gpus(found: list[Node]) -> list[Text]:
    lines = []
    for node in found:
        for gpu in node.host.gpus if node.host is not None else ():
            busy = "" if gpu.utilization is None else f", {gpu.utilization:.0%} busy"
            state = (
                "LOST" if gpu.is_lost else f"{gpu.used_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB used{busy}"
            )
            lines.append(Text(clean(f"{node.node_id} GPU {gpu.index} {gpu.name}: {state}")))
    return [Text(), *lines] if lines else []


@nodes.command("new")
@click.option("--id", "node_id", required=True, callback=check_name, help="Name of the node.")
@click.option(
    "--pool", "pools", multiple=True, callback=lambda c, p, v: [check_name(c, p, each) for each in v],
    help="A pool whose replicas it may run; may be repeated. Without, those of every pool that names it.",
)  # fmt: skip
@click.option(
    "--network", "networks", multiple=True, default=("127.0.0.0/8", "::1/128"), show_default=True,
    help="Addresses that it may join from and whose engines may be at; may be repeated.",
)  # fmt: skip
def nodes_new(node_id: str, pools: Sequence[str], networks: Sequence[str]) -> None:
    """Make the token of a node. It is printed this once; the configuration holds its sha256 only."""
    from llorch.api.auth import NODE_PREFIX, new_key

    token, digest = new_key(NODE_PREFIX)
    click.echo("The token, shown this once, and its entry for the configuration:", err=True)
    click.echo(token)
    click.echo("\nnodes:")
    click.echo(f"  - id: {quoted(node_id)}")
    click.echo(f"    sha256: {quoted(digest)}")
    if pools:
        click.echo(f"    pools: [{', '.join(map(quoted, dict.fromkeys(pools)))}]")
    click.echo(f"    networks: [{', '.join(map(quoted, dict.fromkeys(networks)))}]")


@click.command("pool-manager")
@click.option("--join", "url", required=True, metavar="URL", envvar="LLORCH_URL", show_envvar=True, help="The server.")
@click.option("--node", "node_id", callback=check_name, help="Which node this is; by default the host's name.")
@click.option(
    "--token", envvar="LLORCH_NODE_TOKEN", show_envvar=True, help="Its token; better given by the environment."
)
@click.option("--token-file", type=_FILE, help="File with the token.")
@click.option("--address", help="Where the server reaches the engines of this host; by default what --listen says.")
@click.option("--listen", default="127.0.0.1", show_default=True, help="Address that the relays to the engines bind.")
@click.option("--ca", type=_FILE, help="Certificates in PEM that the server's is checked against.")
@click.option("--cert", type=_FILE, help="Certificate chain in PEM: what the server connects to then speaks TLS.")
@click.option("--key", type=_FILE, help="Its private key in PEM.")
@click.option("--log-format", type=click.Choice(["json", "console"]), default="json", show_default=True)
def pool_manager(
    *,
    url: str,
    node_id: str | None,
    token: str | None,
    token_file: str | None,
    address: str | None,
    listen: str,
    ca: str | None,
    cert: str | None,
    key: str | None,
    log_format: str,
) -> None:
    """Keep the engines of this host alive for a llorch server elsewhere, until SIGTERM or Ctrl-C.

    What is run here, the server's configuration says (replicas with managed.node).
    """
    secret = _secret(token, token_file)
    if (cert is None) != (key is None):
        raise click.UsageError("--cert and --key go together")
    os.environ.pop("LLORCH_NODE_TOKEN", None)  # engines inherit the environment

    from llorch import app

    app.run_pool_manager(
        app.NodeOptions(
            url=url,
            token=secret,
            node_id=node_id or socket.gethostname(),
            address=address or listen,
            listen=listen,
            ca_file=ca,
            cert_file=cert,
            key_file=key,
            log_format=log_format,
        )
    )


def _secret(token: str | None, file: str | None) -> str:
    """The token, of whichever of the two is given. Raises UsageError when that is none or both, or has no token."""
    if (token is None) == (file is None):
        raise click.UsageError("give the token by LLORCH_NODE_TOKEN, --token or --token-file, one of them")
    try:
        words = (Path(file).read_text(encoding="ascii") if file is not None else token or "").split()
    except (OSError, UnicodeDecodeError):
        words = []
    if len(words) != 1:
        raise click.UsageError(f"there is no token in {file or '--token'}")
    return words[0]
