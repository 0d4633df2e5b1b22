"""FakeEngine as a process of its own: its command line, the line that announces it, and ending before its time."""

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import uvloop

from llorch.testing.fake_faults import Faults


class Engine(Protocol):
    """The engine, as its process sees it."""

    faults: Faults
    port: int

    async def start(self, host: str, port: int) -> None:
        """Listen."""
        ...

    async def aclose(self) -> None:
        """Reset every connection and stop listening."""
        ...


@dataclass(frozen=True, slots=True)
class Crash:
    """The end of the process by itself: `after_s` seconds after it listens, 0: before it does.

    With a `file` it happens only when that file exists at the start. `status` is the exit status; a negative one is the
    number of the signal that ends the process.
    """

    after_s: float | None
    status: int
    file: Path | None
    last_words: str

    def due_s(self) -> float | None:
        """When it happens, in seconds; None: never. To be asked at the start of the process."""
        if self.file is not None and not self.file.exists():
            return None
        return (self.after_s or 0.0) if self.after_s is not None or self.file is not None else None

    def happen(self) -> NoReturn:
        """Say the last words on stderr, and end without any order."""
        sys.stderr.write(f"{self.last_words}\n")
        sys.stderr.flush()
        if self.status < 0:
            os.kill(os.getpid(), -self.status)
        os._exit(self.status)


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line: where it listens, what the engine is made of, and what goes wrong from the start."""

    host: str
    port: int
    engine: dict[str, Any]
    faults: Faults
    crash: Crash


def main(make_engine: Callable[..., Engine]) -> None:
    """Be an engine until SIGTERM or SIGINT, with exit status 0, or until told to crash."""
    settings = _parse(sys.argv[1:])
    if settings.crash.due_s() == 0:
        settings.crash.happen()
    gc.freeze()
    try:
        uvloop.run(_serve_until_told(make_engine(**settings.engine), settings))
    except OSError as exc:
        sys.exit(f"fake engine: cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}")


async def _serve_until_told(engine: Engine, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    engine.faults = settings.faults
    await engine.start(settings.host, settings.port)
    line = {"event": "listening", "url": f"http://{settings.host}:{engine.port}", "port": engine.port}
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()
    due_s = settings.crash.due_s()
    if due_s is not None:
        loop.call_later(due_s, settings.crash.happen)
    await told.wait()
    await engine.aclose()


def _parse(arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m llorch.testing.fake_engine", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks one; the line on stdout tells which")
    _add_engine(parser)
    _add_misbehaviour(parser)
    options = parser.parse_args(arguments)
    return Settings(
        host=options.host,
        port=options.port,
        engine=_read_engine(options),
        faults=Faults(freeze=options.freeze, error_status=options.error_status, hog_mib=options.hog_mib),
        crash=Crash(options.crash_after_s, options.exit_code, options.crash_file, options.last_words),
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--token-interval-ms", type=float, default=0.0)
    parser.add_argument("--tokens-per-segment", type=int, default=1)
    parser.add_argument("--prefill-interval-ms", type=float, default=0.0, help="per 64 prompt tokens")
    parser.add_argument("--overhead-ms", type=float, default=0.0, help="per generation")
    parser.add_argument("--prefill-token-ms", type=float, default=0.0, help="per prompt token")
    parser.add_argument("--decode-token-ms", type=float, default=0.0, help="per token")
    parser.add_argument("--can-erase", type=int, choices=(0, 1), default=1, help="whether slots can be erased")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--dialects", default="llamacpp,openai")


def _add_misbehaviour(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load-s", type=float, default=0.0, help="how long it answers that its model is loading")
    parser.add_argument("--crash-after-s", type=float, default=None, help="ends by itself; 0: before it listens")
    parser.add_argument("--crash-file", type=Path, default=None, help="crashes only if this is there at the start")
    parser.add_argument("--exit-code", type=int, default=1, help="of the crash; -9: ends by SIGKILL")
    parser.add_argument("--last-words", default="fake engine: error: told to crash", help="on stderr, at the crash")
    parser.add_argument("--freeze", action="store_true", help="accepts connections and never answers")
    parser.add_argument("--error-status", type=int, default=None, help="of every generation")
    parser.add_argument("--hog-mib", type=int, default=0, help="memory that is touched at the start")


def _read_engine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "slots": options.slots,
        "ctx": options.ctx,
        "token_interval_s": options.token_interval_ms / 1000,
        "tokens_per_segment": options.tokens_per_segment,
        "prefill_interval_s": options.prefill_interval_ms / 1000,
        "overhead_s": options.overhead_ms / 1000,
        "prefill_token_s": options.prefill_token_ms / 1000,
        "decode_token_s": options.decode_token_ms / 1000,
        "can_erase": bool(options.can_erase),
        "load_s": options.load_s,
        "model": options.model,
        "api_key": options.api_key,
        "speaks": tuple(options.dialects.split(",")),
    }
