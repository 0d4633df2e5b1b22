"""Commands for whoever runs the server: serve, check-config, keys, engine.

The rooms that do the work are imported when a command runs.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import click

from llorch.client import Priority

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--config", type=_FILE, envvar="LLORCH_CONFIG", show_envvar=True, help="The configuration, as llorch.yaml."
)
def serve(config: Path | None) -> None:
    """Run the server.

    Without a configuration it serves a small model on the CPU, as a demonstration, on 127.0.0.1:8080.
    """
    from llorch import app

    app.serve(config)


@click.command("check-config")
@click.argument("file", type=_FILE, default="llorch.yaml")
def check_config(file: Path) -> None:
    """Check a configuration file, with the environment put over it (LLORCH_SERVER__PORT=9000 and the like).

    Prints a line for each problem: file and line, setting, what was expected.
    """
    from llorch import config
    from llorch.launch.gguf import trained_context

    config.load(file, os.environ, warn=lambda warning: click.echo(warning, err=True), inspect_model=trained_context)
    click.echo(f"{file}: ok")


@click.group()
def keys() -> None:
    """API keys."""


def check_name(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Raise BadParameter for what the configuration would not take as a name."""
    if value is not None and not _NAME.fullmatch(value):
        raise click.BadParameter(
            "1 to 64 letters, digits, dots, hyphens and underscores, beginning with a letter or digit"
        )
    return value


@keys.command("new")
@click.option("--tenant", required=True, callback=check_name, help="Whom the key belongs to.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(["data", "control", "admin"]), default=("data",),
    show_default=True, help="What the key may do; may be repeated.",
)  # fmt: skip
@click.option(
    "--priority", "priorities", multiple=True, type=click.Choice([level.value for level in Priority]),
    default=tuple(level.value for level in Priority), show_default=True, help="Priorities its tasks may use.",
)  # fmt: skip
@click.option("--id", "key_id", callback=check_name, help="Name of the key in logs; made up when absent.")
def keys_new(tenant: str, scopes: Sequence[str], priorities: Sequence[str], key_id: str | None) -> None:
    """Make a key. It is printed this once; the configuration holds its sha256 only."""
    from llorch.api.auth import new_key

    key, digest = new_key()
    click.echo("The key, shown this once, and its entry for the configuration:", err=True)
    click.echo(key)
    click.echo("\nkeys:")
    click.echo(f"  - id: {quoted(key_id or f'{tenant[:55]}-{digest[:8]}')}")
    click.echo(f"    sha256: {quoted(digest)}")
    click.echo(f"    tenant: {quoted(tenant)}")
    click.echo(f"    scopes: [{', '.join(dict.fromkeys(scopes))}]")
    click.echo(f"    priorities: [{', '.join(dict.fromkeys(priorities))}]")


def quoted(name: str) -> str:
    """As a YAML string even where it looks like a number; the characters of names need no escapes."""
    return f"'{name}'"


@click.group()
def engine() -> None:
    """Engines that llorch brings along."""


@engine.command()
@click.option("--model", required=True, type=_FILE, help="The model, a GGUF file.")
@click.option("--port", required=True, type=click.IntRange(0, 65535), help="TCP port to bind; 0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--slots", type=click.IntRange(min=1), default=1, show_default=True, help="Tasks at once. Exact with 1 only."
)
@click.option(
    "--ctx", type=click.IntRange(min=16), default=4096, show_default=True, help="Context of a slot, in tokens."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads that compute; by default all cores but one.")
@click.option("--alias", help="Name of the model; by default its file's.")
def llamacpp(
    *, model: Path, port: int, host: str, slots: int, ctx: int, threads: int | None, alias: str | None
) -> None:
    """Run the genuine llama.cpp server (extra `llorch[local]`) until it is told to end.

    LLORCH_ENGINE_KEY in the environment is the key that it asks of its clients.
    """
    from llorch.launch.llamacpp import run_server

    run_server(model, host=host, port=port, slots=slots, ctx=ctx, threads=threads, alias=alias)
