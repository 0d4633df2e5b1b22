"""Pools and replicas as an operator may see them: the values that the pools use case hands to the edge."""

from collections.abc import Mapping
from dataclasses import dataclass

from llorch.domain.policy import FullPolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Cohort, Priority
from llorch.service.launching import LastError, LaunchReport
from llorch.service.routes import Route

__all__ = [
    "ConfigChange",
    "ConfigStatus",
    "Fact",
    "LastError",
    "PoolChange",
    "PoolView",
    "ReplicaHealth",
    "ReplicaSetView",
    "SloSnapshot",
]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a replica set is pinned to, and how it is known: `stated`, `measured` or `unverified` (value None)."""

    value: str | None
    source: str


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """A replica now. `slots_busy` counts leases, also those that are being released.

    `kv_usage` is the part of the engine's KV cache in use, from 0 to 1, None while it is not told; `node` the host that
    runs it, None for this one; `process` what its pool manager told last, None when somebody else started it.
    """

    replica_id: str
    pool_id: str
    state: ReplicaState
    slots: int
    slots_busy: int
    engine_version: Fact
    model_digest: Fact
    is_exact: bool
    last_error: LastError | None
    devices: tuple[int, ...] = ()
    kv_usage: float | None = None
    node: str | None = None
    process: LaunchReport | None = None


@dataclass(frozen=True, slots=True)
class PoolChange:
    """A drain or reload of a pool, as far as it is. Times in seconds since the Unix epoch.

    `kind` is `drain` or `reload`, `state` one of `running`, `done`, `failed` and `rolled_back`. `ready_s` is from the
    order of the newest replacement until it was Ready.
    """

    kind: str
    state: str
    started_at: float
    deadline_at: float | None = None
    ended_at: float | None = None
    replicas_total: int = 0
    replicas_done: int = 0
    running: int = 0
    queued: int = 0
    moved: int = 0
    ready_s: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """What became of the latest reload. `changed` are paths of settings, never values; `state` as in PoolChange."""

    state: str
    started_at: float
    ended_at: float | None = None
    changed: tuple[str, ...] = ()
    message: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigStatus:
    """The configuration in force. `revision` 1 is that of the start; `loaded_at` in seconds since the Unix epoch."""

    revision: int
    loaded_at: float
    can_revert: bool
    change: ConfigChange | None = None


@dataclass(frozen=True, slots=True)
class SloSnapshot:
    """What the tasks of one priority that ended within the last `window_s` got; times in seconds, None for nothing."""

    priority: Priority
    tasks: int
    first_token_p95_s: float | None
    total_p95_s: float | None
    error_ratio: float
    window_s: float


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool now. `depth` is that of the queue of its route, which pools of one route share."""

    pool_id: str
    route: Route
    allow_cpu: bool
    notice: str | None
    capacity: Mapping[Priority, int]
    full_policy: Mapping[Priority, FullPolicy]
    depth: Mapping[Priority, int]
    is_draining: bool
    replicas: tuple[ReplicaHealth, ...]
    change: PoolChange | None = None


@dataclass(frozen=True, slots=True)
class ReplicaSetView:
    """Replicas of one route that agree in what determinism depends on."""

    route: Route
    cohort: Cohort
    replicas: tuple[ReplicaHealth, ...]
    queued: int
    slo: tuple[SloSnapshot, ...] = ()
