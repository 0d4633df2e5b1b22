"""How a command reaches the server: the options that say where it is, and the client made of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from llorch.client import DEFAULT_URL, AsyncClient, ClientError


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is, and how long to bear with it."""

    url: str
    key: str | None
    patience_s: float

    def client(self, notify: Callable[[float, ClientError], None] | None = None) -> AsyncClient:
        return AsyncClient(self.url, self.key, patience_s=self.patience_s, notify=notify)


def connects(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a Connection, handed over as `connection`."""

    @click.option(
        "--url", envvar="LLORCH_URL", show_envvar=True, default=DEFAULT_URL, show_default=True, help="The server."
    )
    @click.option("--key", envvar="LLORCH_KEY", show_envvar=True, help="API key; better given by the environment.")
    @click.option(
        "--patience", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="SECONDS",
        help="How long to wait in all when the server refuses for now, as it advises.",
    )  # fmt: skip
    @functools.wraps(command)
    def with_connection(*args: Any, url: str, key: str | None, patience: float, **kwargs: Any) -> Any:
        return command(*args, connection=Connection(url, key or None, patience), **kwargs)

    return with_connection
