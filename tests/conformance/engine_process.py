"""The genuine llama.cpp with the tiny model that `make setup` puts into the cache, as the engine suites need it."""

import asyncio
import os
import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from llorch.launch.llamacpp import KEY_VARIABLE
from tests.support.processes import free_port

TINY_MODEL = Path(__file__).resolve().parents[2] / ".cache" / "models" / "tiny.gguf"


class EngineProcess:
    """`llorch engine llamacpp` with one thread. Entering it waits until it listens, leaving it ends it."""

    def __init__(self, model: Path, *, ctx: int, slots: int = 1, alias: str | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.api_key = secrets.token_urlsafe(16)
        options = {
            "model": model,
            "port": self.port,
            "ctx": ctx,
            "slots": slots,
            "threads": 1,
            "alias": alias or "tiny",
        }
        self._words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def spawn(self) -> None:
        """Start it, and wait for nothing."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llorch", "engine", "llamacpp"),
            *self._words,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, KEY_VARIABLE: self.api_key},
        )

    async def __aenter__(self) -> Self:
        await self.spawn()
        assert self._process is not None
        assert self._process.stdout is not None
        assert b"listening" in await self._process.stdout.readline()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.signal(signal.SIGTERM)
        await self.wait()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """The exit status, once it has ended."""
        assert self._process is not None
        return await self._process.wait()


def launch_tiny(*, slots: int = 1, ctx: int = 1024, alias: str | None = None) -> EngineProcess:
    """An engine process with the tiny model, not started yet."""
    return EngineProcess(TINY_MODEL, slots=slots, ctx=ctx, alias=alias)
