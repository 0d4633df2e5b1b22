"""The HTTP server: uvicorn on httptools and uvloop, with a signal that asks instead of cutting.

uvicorn by itself closes its listener at SIGTERM and hangs on open streams. Here the first signal only asks the service
to drain; the listener goes on answering until that is done. A second signal asks to hurry.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llorch.api.protocol import Protocol

LAST_WORDS_S = 5
"""Seconds that open connections have, after the drain, to take their last frames."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, with which certificate, and how much to take.

    `cert` and `key` are files in PEM, both or neither; `connections` is the most that may be open at once.
    """

    host: str
    port: int
    cert: str | None = None
    key: str | None = None
    header_bytes: int = 32 * 1024
    connections: int | None = None


class Server(uvicorn.Server):
    """Serves `app` until a signal came and `drain` has returned; another signal calls `hurry`."""

    def __init__(
        self,
        app: ASGIApp,
        address: Address,
        drain: Callable[[], Coroutine[Any, Any, None]],
        hurry: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=address.host,
                port=address.port,
                ssl_certfile=address.cert,
                ssl_keyfile=address.key,
                http=partial(Protocol, header_bytes=address.header_bytes, connections=address.connections),  # type: ignore[arg-type]  # uvicorn calls it, and asks for no more
                loop="uvloop",
                ws="none",
                lifespan="on",
                interface="asgi3",
                access_log=False,
                proxy_headers=False,
                log_config=None,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=LAST_WORDS_S,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what it tells of its life, we tell ourselves
        self._drain = drain
        self._hurry = hurry
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Listen; called by uvicorn once the lifespan has begun."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn gives it)
        """The first signal drains, the next ends the grace; either way open streams get their last frames."""
        if self._loop is None:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit())
        else:
            self._hurry()

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True
