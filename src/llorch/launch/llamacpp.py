"""llama.cpp as an engine that llorch brings along: the genuine server, through xllamacpp, as a process of its own.

It knows neither pools nor tasks; to keep the process alive is for the pool manager, to speak with it for the adapter.
"""

import json
import os
import signal
import socket
import sys
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from llorch.errors import LaunchError

CTX_DEFAULT: Final = 4096
KEY_VARIABLE: Final = "LLORCH_ENGINE_KEY"
"""Environment variable that hands the engine its key: a command line could be read by every user of the machine."""

_BATCH_TOKENS: Final = 64
"""Between two batches the engine looks whether its client has gone: 2048 made that 13 s, 64 make it half a second."""
_LOG_WARNINGS: Final = 2


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


def installed_version() -> str:
    """The version of the local engine, as `xllamacpp-…`. Raises LaunchError when it is not installed."""
    try:
        return f"xllamacpp-{metadata.version('xllamacpp')}"
    except metadata.PackageNotFoundError as exc:
        raise LaunchError(_NOT_INSTALLED) from exc
