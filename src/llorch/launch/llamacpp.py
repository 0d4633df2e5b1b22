"""llama.cpp as an engine that llorch runs itself: the server process, and its keeper in the process that started it.

`run_server` is the engine process: the genuine llama.cpp server, through xllamacpp. `EngineProcess` starts one, waits
until it answers, and ends it. Neither knows pools or tasks, and speaking to the engine is the adapter's business.
"""

import asyncio
import ctypes
import json
import os
import secrets
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, Self

from llorch.errors import LaunchError
from llorch.launch.model_file import read_digest

CTX_DEFAULT: Final = 4096
KEY_VARIABLE: Final = "LLORCH_ENGINE_KEY"
"""Environment variable that hands the engine its key: a command line could be read by every user of the machine."""
PARENT_VARIABLE: Final = "LLORCH_ENGINE_PARENT"

_BATCH_TOKENS: Final = 64
"""Between two batches the engine looks whether its client has gone: 2048 made that 13 s, 64 make it half a second."""
_LOG_WARNINGS: Final = 2
_LOG_LINES: Final = 20
_PR_SET_PDEATHSIG: Final = 1


# ---- the engine process


def run_server(
    model: Path,
    *,
    port: int,
    host: str = "127.0.0.1",
    slots: int = 1,
    ctx: int = CTX_DEFAULT,
    threads: int | None = None,
    alias: str | None = None,
    api_key: str | None = None,
) -> NoReturn:
    """Be a llama.cpp server until SIGTERM or SIGINT ends the process, with exit status 0.

    `port` 0 picks a free one. `ctx` is the context of each slot in tokens. `threads` compute; by default all cores
    but one. Without `api_key` the key in the environment variable KEY_VARIABLE counts, if there is one. Once the
    model is loaded one line of JSON on stdout tells the address: `{"event": "listening", "url": …}`.

    Raises LaunchError when xllamacpp is not installed, the model file is missing or not readable as a model, or the
    port is taken.
    """
    _die_with_parent()
    key = api_key or os.environ.pop(KEY_VARIABLE, None)
    xllamacpp = _import_xllamacpp()
    _check_model(model)
    _check_port(host, port)
    parameters = _parameters(xllamacpp, model, slots=slots, ctx=ctx, threads=threads, alias=alias or model.stem)
    parameters.hostnames = [host]
    parameters.port = port
    if key:
        parameters.api_keys = [key]
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as exc:
        raise LaunchError(f"llama.cpp could not start with {model}; its own messages say why.") from exc
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    line = {"event": "listening", "engine": "llamacpp", "url": server.listening_address, "pid": os.getpid()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    while True:
        signal.pause()


def _import_xllamacpp() -> Any:
    try:
        import xllamacpp  # an extra: only this process needs it
    except ImportError as exc:
        raise LaunchError(_NOT_INSTALLED) from exc
    return xllamacpp


_NOT_INSTALLED: Final = "The local engine is not installed: `make setup`, or `pip install 'llorch[local]'`."


def _parameters(xllamacpp: Any, model: Path, *, slots: int, ctx: int, threads: int | None, alias: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {alias}
    parameters.n_parallel = slots
    parameters.n_ctx = ctx * slots  # llama.cpp divides it among its slots
    parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
    parameters.cont_batching = True
    count = threads or max(1, (os.cpu_count() or 1) - 1)
    parameters.cpuparams.n_threads = count
    parameters.cpuparams_batch.n_threads = count
    parameters.fit_params = False  # what was asked for, or an error: never a smaller context
    parameters.warmup = False
    parameters.endpoint_slots = True
    parameters.endpoint_props = True
    parameters.endpoint_metrics = True
    parameters.ui = False
    parameters.verbosity = _LOG_WARNINGS
    return parameters


def _check_model(model: Path) -> None:
    try:
        with model.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise LaunchError(f"The model file {model} cannot be read: {exc.strerror}.") from exc
    if magic != b"GGUF":
        raise LaunchError(f"{model} is not a GGUF model file.")


def _check_port(host: str, port: int) -> None:
    """llama.cpp itself does not tell a port that is taken from a model that it cannot load."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise LaunchError(f"The engine cannot listen on {host}:{port}: {exc.strerror}.") from exc


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    # Not sys.exit: taking the server down in order would wait for the generations under way.
    os._exit(0)


def _die_with_parent() -> None:
    """Have the kernel end this process when the one that started it dies, however it dies (Linux; else no effect)."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(1)  # it died before we asked


# ---- its keeper


class EngineProcess:
    """A llama.cpp server in a process of its own, which dies with this one. Start it once; stop is final.

    `command` is what comes before the options; by default llorch's own `engine llamacpp`.
    """

    def __init__(
        self,
        model: Path,
        *,
        slots: int = 1,
        ctx: int = CTX_DEFAULT,
        threads: int | None = None,
        alias: str | None = None,
        port: int = 0,
        start_timeout_s: float = 120.0,
        command: Sequence[str] = (sys.executable, "-m", "llorch", "engine", "llamacpp"),
    ) -> None:
        options = {"--model": model, "--port": port, "--slots": slots, "--ctx": ctx, "--threads": threads}
        options["--alias"] = alias
        given = [(name, str(value)) for name, value in options.items() if value is not None]
        self._arguments = [*command, *(word for pair in given for word in pair)]
        self._model = model
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._reader: asyncio.Task[None] | None = None
        self.api_key = secrets.token_urlsafe(32)
        """What the engine asks of its clients; new for every process."""
        self.url = ""
        self.engine_version: str | None = None
        self.model_digest: str | None = None

    @property
    def pid(self) -> int | None:
        """The process id, once started."""
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def last_log(self) -> str:
        """The last lines that the engine wrote."""
        return "\n".join(self._log)

    async def start(self) -> None:
        """Return when the engine answers that it is ready; `url`, `engine_version` and `model_digest` are set then.

        Raises LaunchError, with the engine's last words, when it ends before that or takes longer than
        `start_timeout_s`; no process is left then.
        """
        self.engine_version = installed_version()
        self.model_digest = await read_digest(self._model)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                process = await self._spawn()
                self.url = await self._read_address(process)
                await self._wait_ready()
        except BaseException as exc:
            await self.stop()
            if isinstance(exc, TimeoutError):
                raise LaunchError(
                    f"The engine was not ready within {self._start_timeout_s:g} s.{self._said()}"
                ) from exc
            raise

    async def wait(self) -> int:
        """Return the exit status when the process has ended (negative: the signal that ended it)."""
        if self._process is None:
            raise LaunchError("The engine was not started.")
        return await self._process.wait()

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the process: SIGTERM, and SIGKILL after `grace_s` seconds. Returns when it is gone. Idempotent."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await process.wait()
            except TimeoutError:
                self._signal(signal.SIGKILL)
                await process.wait()
        if self._reader is not None:
            await self._reader

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def _spawn(self) -> asyncio.subprocess.Process:
        environment = {**os.environ, KEY_VARIABLE: self.api_key, PARENT_VARIABLE: str(os.getpid())}
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for llorch, which lets running tasks end
        )
        if self._process.stderr is not None:
            self._reader = asyncio.create_task(self._keep_log(self._process.stderr), name="engine-log")
        return self._process

    async def _read_address(self, process: asyncio.subprocess.Process) -> str:
        """The URL in the line that the engine writes when its model is loaded."""
        while process.stdout is not None and (line := await process.stdout.readline()):
            with suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and said.get("event") == "listening":
                    return str(said["url"])
        status = await process.wait()
        if self._reader is not None:
            await self._reader
        raise LaunchError(f"The engine ended with status {status} before it was ready.{self._said()}")

    async def _wait_ready(self) -> None:
        while not await _is_healthy(self.url):
            if not self.is_running:
                raise LaunchError(f"The engine ended before it was ready.{self._said()}")
            await asyncio.sleep(0.05)

    async def _keep_log(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # a line longer than the reader's buffer, which has dropped it
            if not line:
                return
            self._log.append(line.decode("utf-8", "replace").rstrip())

    def _said(self) -> str:
        return f" It said:\n{self.last_log}" if self._log else ""

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def installed_version() -> str:
    """The version of the local engine, as `xllamacpp-…`. Raises LaunchError when it is not installed."""
    try:
        return f"xllamacpp-{metadata.version('xllamacpp')}"
    except metadata.PackageNotFoundError as exc:
        raise LaunchError(_NOT_INSTALLED) from exc


async def _is_healthy(url: str) -> bool:
    """Whether GET /health answers 200."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    try:
        writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status_line = await reader.readline()
        return status_line.split(b" ")[1:2] == [b"200"]
    except OSError:
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
