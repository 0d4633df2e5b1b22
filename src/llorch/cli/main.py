"""The group of all commands, and how whatever they raise ends."""

import os
import sys
from typing import Any, NoReturn

import click

from llorch.cli.changes import drain, reload
from llorch.cli.exits import EPILOG, Complaint, Exit, complaint
from llorch.cli.nodes import nodes, pool_manager
from llorch.cli.operate import check_config, engine, keys, serve
from llorch.cli.pools import pools
from llorch.cli.simulate import simulate
from llorch.cli.submit import submit
from llorch.cli.tasks import cancel, status
from llorch.client import ClientError
from llorch.errors import LlorchError


class Commands(click.Group):
    """A group whose commands may raise what the client and the service raise."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LlorchError, ClientError) as exc:
            _end(ctx, complaint(exc))
        except Complaint as exc:
            _end(ctx, exc)
        except KeyboardInterrupt:
            ctx.exit(Exit.INTERRUPTED)
        except BrokenPipeError:
            # Python flushes stdout once more on its way out; that must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(Exit.CUT_OFF)


def _end(ctx: click.Context, told: Complaint) -> NoReturn:
    click.echo(str(told), err=True)
    ctx.exit(told.exit_code)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llorch")
def cli() -> None:
    """One fair, honest, deterministic queue in front of your LLM inference engines.

    Commands that speak to a server take its address from LLORCH_URL and the key from LLORCH_KEY. Everything meant for
    programs is on stdout; messages and the live line are on stderr.
    """


for _command in (
    serve, check_config, keys, engine, submit, cancel, status, pools, drain, reload, nodes, pool_manager, simulate,
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """The entry point of the `llorch` script."""
    cli(prog_name="llorch")
