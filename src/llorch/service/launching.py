"""How a replica's process is to be run, and what is told of it: between the service and its pool managers.

A pool manager keeps the engine processes of one host alive. The service tells it what it wants and hears what became
of it; both are plain values, so that a manager may be in this process or behind `/v1/nodes`. Neither knows tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from llorch.domain.backoff import Breaker, RestartPolicy


@dataclass(frozen=True, slots=True)
class LastError:
    """The newest thing that went wrong with a replica; `at` in seconds since the Unix epoch."""

    code: str
    message: str
    at: float


class Phase(Enum):
    """Where the process of a replica is. Only UP answers; STOPPED is for good, WAITING ends by itself."""

    WAITING = "waiting"
    """No process: it ended or could not be started, and the next start is due later."""
    STARTING = "starting"
    LOADING = "loading"
    """The process answers that it is not ready yet."""
    UP = "up"
    STOPPING = "stopping"
    STOPPED = "stopped"
    LOST = "lost"
    """The host that runs it is silent; nobody knows."""


class Cause(Enum):
    """Why a process ended, was ended, or could not be started."""

    EXIT = "exit"
    SIGNAL = "signal"
    VRAM_OOM = "vram-oom"
    HOST_OOM = "host-oom"
    START_TIMEOUT = "start-timeout"
    UNRESPONSIVE = "unresponsive"
    SELF_TEST = "self-test"
    DRIVER_RESET = "driver-reset"
    HEADROOM = "headroom"
    PORT = "port"
    BINARY = "binary"
    MODEL = "model"
    DIGEST = "digest"
    GPU = "gpu"
    """No GPU of the mask is there, and the pool does not allow the CPU."""

    @property
    def is_refusal(self) -> bool:
        """No process was started at all."""
        return self in (Cause.HEADROOM, Cause.PORT, Cause.BINARY, Cause.MODEL, Cause.DIGEST, Cause.GPU)


@dataclass(frozen=True, slots=True)
class Supervision:
    """How long a process may take, in seconds, and how it is started again."""

    start_s: float = 300.0
    """From its start until it answers that it is ready; then it is ended."""
    unresponsive_s: float = 15.0
    """That it may leave health checks unanswered once it was up; then it is killed."""
    stop_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True)
class Headroom:
    """What must stay free beside the model and its KV cache, in bytes; None for a KV size that the file tells."""

    vram_bytes: int = 512 * 1024 * 1024
    ram_bytes: int = 512 * 1024 * 1024
    kv_bytes_per_token: int | None = None


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """How a pool manager is to run one replica. Orders that differ in anything want another process.

    `generation` differs where nothing else does and the process must be a new one all the same. `model_digest` is
    `sha256:…` that the file must have, None where any will do. `port` 0 takes a free one. `command` is an argument list
    in which `{port}`, `{host}`, `{model}`, `{alias}`, `{slots}`, `{ctx}`, `{ctx_total}`, `{api_key}` and
    `{tensor_split}` are filled in; of launchers other than `command` it is empty.
    """

    replica_id: str
    pool_id: str
    engine: str
    launcher: str
    model: str
    """Its name in the API, which the engine is told as its alias."""
    model_path: str | None
    model_digest: str | None
    ctx: int
    slots: int
    allow_cpu: bool = False
    devices: tuple[int, ...] = ()
    """GPU indices; empty: every GPU that there is, or the CPU."""
    tensor_split: tuple[float, ...] = ()
    port: int = 0
    threads: int | None = None
    binary: str | None = None
    arguments: tuple[str, ...] = ()
    """Added to what the launcher makes."""
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    health_path: str = "/health"
    memory_limit_bytes: int | None = None
    headroom: Headroom = field(default_factory=Headroom)
    supervision: Supervision = field(default_factory=Supervision)
    generation: int = 0


@dataclass(frozen=True, slots=True)
class LaunchReport:
    """What became of an order, as it is now.

    `incarnation` counts the starts of this replica, over all its orders, and never goes back while its manager lives.
    `url`, `api_key`, `engine_version` and `model_digest` are known in LOADING or UP at the latest. `next_start_s` is
    how many seconds from the report the next start is due, of WAITING only.
    """

    replica_id: str
    generation: int
    phase: Phase
    incarnation: int = 0
    pid: int | None = None
    url: str | None = None
    api_key: str | None = None
    engine_version: str | None = None
    model_digest: str | None = None
    cause: Cause | None = None
    """Of the latest end or refusal; it stays while a later start is under way."""
    error: LastError | None = None
    restarts: Mapping[Cause, int] = field(default_factory=dict)
    breaker: Breaker = Breaker.CLOSED
    next_start_s: float | None = None
    load_s: float | None = None
    """From the latest start to UP."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as last read. `utilization` from 0 to 1, None where it is not told; `is_lost`: the driver gave it up."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    utilization: float | None = None
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a manager tells of its host. `driver_resets` counts those that it saw since it started."""

    gpus: tuple[Gpu, ...] = ()
    ram_total_bytes: int = 0
    ram_available_bytes: int = 0
    driver_resets: int = 0


class Manager(Protocol):
    """Keeps the processes of one host. Nothing here blocks or raises; what becomes of an order is told by reports."""

    def want(self, order: LaunchOrder) -> None:
        """Run this. What runs under the same replica_id by another order is ended first."""
        ...

    def release(self, replica_id: str) -> None:
        """End it for good; a report of STOPPED tells that its process is gone. Nothing for an unknown id."""
        ...

    def restart(self, replica_id: str, incarnation: int, cause: Cause) -> None:
        """End this incarnation, if it is still the one, and start anew as after any failure."""
        ...

    @property
    def host(self) -> HostFacts:
        """The host as last read."""
        ...
