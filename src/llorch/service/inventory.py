"""Pools and replicas as an operator may see them: the values that the pools use case hands to the edge."""

from collections.abc import Mapping
from dataclasses import dataclass

from llorch.domain.policy import FullPolicy
from llorch.domain.pool import ReplicaState
from llorch.domain.task import Cohort, Priority
from llorch.service.routes import Route


@dataclass(frozen=True, slots=True)
class LastError:
    """The newest thing that went wrong with a replica; `at` in seconds since the Unix epoch."""

    code: str
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a replica set is pinned to, and how it is known: `stated`, `measured` or `unverified` (value None)."""

    value: str | None
    source: str


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """A replica now. `slots_busy` counts leases, also those that are being released."""

    replica_id: str
    pool_id: str
    state: ReplicaState
    slots: int
    slots_busy: int
    engine_version: Fact
    model_digest: Fact
    is_exact: bool
    last_error: LastError | None


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


@dataclass(frozen=True, slots=True)
class ReplicaSetView:
    """Replicas of one route that agree in what determinism depends on."""

    route: Route
    cohort: Cohort
    replicas: tuple[ReplicaHealth, ...]
    queued: int
