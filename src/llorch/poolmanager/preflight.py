"""Whether an order can be started on this host, before anything is started.

A refusal has one cause, and a message of one sentence with its remedy. It starts nothing and holds nothing back: what
is free now may be taken a moment later, and then the start fails by itself.
"""

import asyncio
import errno
import hashlib
import os
import shutil
import socket
from collections import defaultdict, deque
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from llorch.domain.devices import (
    Demand,
    Device,
    check_alike,
    check_split,
    fit,
    fit_ram,
    format_bytes,
    needed_bytes,
)
from llorch.errors import ConfigError, LaunchError, PoolUnavailable, UntrustedArtifact
from llorch.launch.commands import BUILT_IN, needs_model, program_of
from llorch.launch.gguf import GgufHeader, find_parts, kv_bytes_per_token, read_header
from llorch.poolmanager.devices import Devices
from llorch.service.launching import Cause, Gpu, HostFacts, LaunchOrder

_HOST: Final = "127.0.0.1"
_PORTS_REMEMBERED: Final = 64
_GGUF_ONLY: Final = (BUILT_IN, "llama-server")
_ONE_GPU: Final = "vllm"
"""Without a mask this launcher takes the first GPU; the others take all."""


class Refusal(LaunchError):
    """An engine process cannot be started on this host."""

    code = PoolUnavailable.code

    def __init__(self, cause: Cause, message: str) -> None:
        self.cause = cause
        super().__init__(message)


class UntrustedRefusal(Refusal):
    """The model file is not the one that the pool names."""

    code = UntrustedArtifact.code

    def __init__(self, message: str) -> None:
        super().__init__(Cause.DIGEST, message)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was measured. `model_digest` is `sha256:…` of a model file, None of a directory; `port` 0: the engine's."""

    engine_version: str | None
    model_digest: str | None
    port: int


@dataclass(frozen=True, slots=True)
class _Model:
    """`size` in bytes, all parts and files; `header` of a GGUF file only."""

    size: int = 0
    header: GgufHeader | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.header) if self.header else 0


class Preflight:
    """The checks of one host. What is slow runs in a thread; digests are computed once for each state of a file."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._hashing: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ports: deque[int] = deque(maxlen=_PORTS_REMEMBERED)

    async def check(self, order: LaunchOrder) -> Checked:
        """Return when the order can be started as things are now. Raises Refusal with the first cause against it.

        The order of the checks: binary, model, digest, GPUs, memory, port.
        """
        engine_version = await asyncio.to_thread(_check_binary, order)
        model = await asyncio.to_thread(_check_model, order)
        digest = await self._check_digest(order)
        host = await asyncio.to_thread(self._devices.read)
        gpus = _check_gpus(order, host)
        _check_memory(order, model, host=host, gpus=gpus)
        return Checked(engine_version, digest, self._check_port(order))

    # ---- digest

    async def _check_digest(self, order: LaunchOrder) -> str | None:
        wanted = order.model_digest
        if order.model_path is None or not await asyncio.to_thread(Path(order.model_path).is_file):
            if wanted is not None:
                raise UntrustedRefusal(
                    f"Pool {order.pool_id} names the digest {wanted}, but its model is no file that could be measured:"
                    " leave model_digest out, or name a file."
                )
            return None
        found = await self._read_digest(Path(order.model_path))
        if wanted is not None and found != wanted.lower():
            raise UntrustedRefusal(
                f"{order.model_path} has {found} where pool {order.pool_id} names {wanted}: put the right file there,"
                " or correct model_digest."
            )
        return found

    async def _read_digest(self, path: Path) -> str:
        async with self._hashing[path]:  # replicas of one model would read it all at once
            try:
                state = await asyncio.to_thread(_state, path)
                known = self._digests.get(path)
                if known is not None and known[0] == state:
                    return known[1]
                digest = await asyncio.to_thread(_hash, path)
                if await asyncio.to_thread(_state, path) == state:
                    self._digests[path] = (state, digest)
            except OSError as exc:
                raise _unreadable(path, exc) from exc
            return digest

    # ---- port

    def _check_port(self, order: LaunchOrder) -> int:
        if order.port:
            _check_free(order)
            return order.port
        return 0 if order.launcher == BUILT_IN else self._take_port()

    def _take_port(self) -> int:
        """A free port that was not given out lately: its engine may not listen yet."""
        for _ in range(_PORTS_REMEMBERED + 1):
            with socket.socket() as probe:
                probe.bind((_HOST, 0))
                port = int(probe.getsockname()[1])
            if port not in self._ports:
                break
        else:
            raise Refusal(Cause.PORT, "No free port was found: end processes that listen, or give the pool ports.")
        self._ports.append(port)
        return port


# ---- binary


def _check_binary(order: LaunchOrder) -> str | None:
    """The version of the engine, where it is known without running it."""
    try:
        program = program_of(order)
    except ConfigError as exc:
        raise Refusal(Cause.BINARY, exc.message) from exc
    if shutil.which(program, path=dict(order.environment).get("PATH")) is None:
        raise Refusal(
            Cause.BINARY,
            f"The program {program} of pool {order.pool_id} is not there or not executable: install it, or give its"
            " path as binary.",
        )
    return None if order.launcher != BUILT_IN else _built_in_version(order)


def _built_in_version(order: LaunchOrder) -> str | None:
    if order.binary is not None:
        return None  # whatever it is, it need not be what is installed here
    try:
        return f"xllamacpp-{metadata.version('xllamacpp')}"
    except metadata.PackageNotFoundError as exc:
        raise Refusal(
            Cause.BINARY, "The local engine is not installed: `make setup`, or `pip install 'llorch[local]'`."
        ) from exc


# ---- model


def _check_model(order: LaunchOrder) -> _Model:
    if order.model_path is None:
        if needs_model(order):
            raise Refusal(Cause.MODEL, f"Pool {order.pool_id} names no model file: add its path.")
        return _Model()
    path = Path(order.model_path)
    try:
        model = _measure(path, is_gguf=path.suffix.lower() == ".gguf" or order.launcher in _GGUF_ONLY)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    except LaunchError as exc:
        raise Refusal(Cause.MODEL, exc.message) from exc
    except ValueError as exc:
        raise Refusal(Cause.MODEL, f"{order.model_path!r} is no path: correct the pool's path.") from exc
    trained = model.header.context_length if model.header else 0
    if trained and order.ctx > trained:
        raise Refusal(
            Cause.MODEL,
            f"{path} was trained for {trained} tokens of context and pool {order.pool_id} asks for {order.ctx}:"
            f" set ctx to {trained} or less.",
        )
    return model


def _measure(path: Path, *, is_gguf: bool) -> _Model:
    """Raises OSError, or LaunchError of a file that is not whole."""
    if path.is_dir():
        with os.scandir(path):  # readable at all
            return _Model(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    parts = find_parts(path) if is_gguf else (path,)
    for part in parts:
        if not part.is_file() and part.exists():
            raise LaunchError(f"{part} is neither a file nor a directory: give the path of the model.")
        with part.open("rb"):
            pass
    headers = [read_header(part) for part in parts] if is_gguf else [None]
    return _Model(sum(part.stat().st_size for part in parts), headers[0])


def _unreadable(path: Path, exc: OSError) -> Refusal:
    return Refusal(
        Cause.MODEL,
        f"The model {exc.filename or path} cannot be read ({exc.strerror}): put it there, or correct the pool's path"
        " or the file's rights.",
    )


# ---- GPUs


def _check_gpus(order: LaunchOrder, host: HostFacts) -> tuple[Gpu, ...]:
    """The GPUs that the engine will use; none when it runs on the CPU."""
    if order.allow_cpu and not order.devices:
        return ()
    there = {gpu.index: gpu for gpu in host.gpus if not gpu.is_lost}
    mask = order.devices or tuple(there)
    missing = [index for index in mask if index not in there]
    if order.allow_cpu and len(missing) == len(mask):
        return ()
    if missing or not mask:
        raise Refusal(Cause.GPU, _tell_missing(order, host, missing))
    problem = check_split(mask, order.tensor_split)
    if problem is not None:
        raise Refusal(Cause.GPU, problem)
    gpus = tuple(there[index] for index in mask)
    return gpus[:1] if order.launcher == _ONE_GPU and not order.devices else gpus


def _tell_missing(order: LaunchOrder, host: HostFacts, missing: list[int]) -> str:
    lost = [gpu.index for gpu in host.gpus if gpu.is_lost]
    told = f"GPU {', '.join(map(str, missing))} of pool {order.pool_id}" if missing else f"A GPU for {order.pool_id}"
    have = ", ".join(str(gpu.index) for gpu in host.gpus if not gpu.is_lost) or "none"
    gone = f"; the driver gave up {', '.join(map(str, lost))}: reset it or restart the host" if lost else ""
    return f"{told} is not on this host, which has {have}: correct devices, or set allow_cpu: true{gone}."


# ---- memory


def _check_memory(order: LaunchOrder, model: _Model, *, host: HostFacts, gpus: tuple[Gpu, ...]) -> None:
    told = order.headroom.kv_bytes_per_token
    per_token = model.kv_bytes_per_token if told is None else told
    kv_bytes = needed_bytes(0, order.ctx, slots=order.slots, kv_bytes_per_token=per_token)
    if gpus:
        _check_vram(order, Demand(model.size, kv_bytes, order.headroom.vram_bytes), gpus)
        in_ram = Demand(0, 0, order.headroom.ram_bytes)
    else:
        in_ram = Demand(model.size, kv_bytes, order.headroom.ram_bytes)
        _check_limit(order, in_ram)
    _refuse_headroom(order, fit_ram(host.ram_available_bytes, in_ram))


def _check_vram(order: LaunchOrder, demand: Demand, gpus: tuple[Gpu, ...]) -> None:
    devices = [Device(gpu.index, gpu.total_bytes, max(0, gpu.total_bytes - gpu.used_bytes)) for gpu in gpus]
    problem = check_alike(devices, order.tensor_split)
    if problem is not None:
        raise Refusal(Cause.HEADROOM, problem)
    _refuse_headroom(order, fit(devices, demand, split=order.tensor_split))


def _check_limit(order: LaunchOrder, demand: Demand) -> None:
    """The manager would have to end a process for what it needs anyway."""
    limit = order.memory_limit_bytes
    if limit is not None and demand.split_bytes > limit:
        raise Refusal(
            Cause.HEADROOM,
            f"Pool {order.pool_id} needs {format_bytes(demand.split_bytes)} for model and KV cache, and its"
            f" memory_limit is {format_bytes(limit)}: raise it, or lower ctx or slots.",
        )


def _refuse_headroom(order: LaunchOrder, problem: str | None) -> None:
    if problem is not None:
        raise Refusal(
            Cause.HEADROOM, f"Pool {order.pool_id} {problem}: free memory, lower ctx or slots, or take a smaller model."
        )


# ---- port


def _check_free(order: LaunchOrder) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, order.port))
        except OSError as exc:
            why = "is taken" if exc.errno == errno.EADDRINUSE else f"cannot be used ({exc.strerror})"
            raise Refusal(
                Cause.PORT,
                f"Port {order.port} of pool {order.pool_id} {why}: end what listens there, give the pool another port,"
                " or 0 for any.",
            ) from exc


# ---- files


def _state(path: Path) -> tuple[int, int, int]:
    """What differs after every change of a file: size, time of change, inode."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
