"""How a route and its tenants are to be treated: plain values from the configuration, checked there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llorch.domain.task import Priority


class FullPolicy(StrEnum):
    """What a full queue does with the submission of a flow that has its fair share of places already (ORCH-3005)."""

    REJECT = "reject"
    DROP_LRU = "drop-lru"
    SHED_LOW_PRIORITY = "shed-low-priority"


class Fairness(StrEnum):
    """Between priorities: shares by weight, or the more urgent one first whatever waits below it."""

    WFQ = "wfq"
    STRICT = "strict"


class Order(StrEnum):
    """Within a flow: as admitted, or by deadline."""

    FIFO = "fifo"
    EDF = "edf"


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Bounds and order of one route's queue.

    `capacity`: tasks that may wait, by priority. `weights`: of tenants, 1 for one that is not named. A prompt token
    costs `prompt_cost`, a generated one `output_cost`. Under Order.EDF a task without a deadline is due
    `edf_default_s` after its arrival.
    """

    capacity: Mapping[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 256))
    full_policy: Mapping[Priority, FullPolicy] = field(
        default_factory=lambda: {Priority.INTERACTIVE: FullPolicy.REJECT, Priority.BATCH: FullPolicy.DROP_LRU}
    )
    fairness: Fairness = Fairness.WFQ
    order: Order = Order.FIFO
    edf_default_s: float = 60.0
    level_weights: Mapping[Priority, float] = field(
        default_factory=lambda: {Priority.INTERACTIVE: 8.0, Priority.BATCH: 1.0}
    )
    weights: Mapping[str, float] = field(default_factory=dict)
    prompt_cost: float = 1.0
    output_cost: float = 2.0


@dataclass(frozen=True, slots=True)
class PreemptionPolicy:
    """When running work is broken off for more urgent work: never unless `hard`.

    At most `per_minute` times in any minute on the route, `per_task` times for one task, and never a task of a
    `protected` priority.
    """

    hard: bool = False
    per_minute: int = 6
    per_task: int = 2
    protected: frozenset[Priority] = frozenset({Priority.INTERACTIVE})


@dataclass(frozen=True, slots=True)
class Prices:
    """Cost of one token, in the unit of the configuration."""

    prompt: float = 0.0
    output: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """How a route treats its tasks. Times in seconds; `attempts` is the most runs of one task before a first token.

    While others wait, a task whose chance to meet its deadline is below `feasible_probability` is refused, or ended
    when its turn comes: what it would take for nothing, they could use.
    A session stays on its replica unless that has more than `detour_s` seconds of work per slot above the least; of at
    most `bindings` sessions it is known where they are.
    """

    queue: QueuePolicy = field(default_factory=QueuePolicy)
    wall_s: float = 600.0
    unread_grace_s: float = 10.0
    attempts: int = 3
    preemption: PreemptionPolicy = field(default_factory=PreemptionPolicy)
    prices: Prices = field(default_factory=Prices)
    feasible_probability: float = 0.7
    detour_s: float = 0.5
    bindings: int = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: `per_s` requests a second in the long run, `burst` at once."""

    per_s: float
    burst: float


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may use over all routes; None is without limit.

    `max_queued`: tasks that wait. `max_concurrent`: attempts that run. `rate`: submissions, by priority.
    `tokens_per_minute`: prompt and generated tokens. `kv_tokens`: context of all its running attempts.
    """

    max_queued: int | None = None
    max_concurrent: int | None = None
    rate: Mapping[Priority, Rate] = field(default_factory=dict)
    tokens_per_minute: int | None = None
    kv_tokens: int | None = None


NO_QUOTA = Quota()
