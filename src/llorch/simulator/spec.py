"""The declaration of a simulation as its YAML file holds it: replicas, the policy of the route, tenants, their traffic.

Settings of the route and of tenants have the names that they have in the configuration of the service. Everything is
checked here, so that the rest of the room can rely on it; it draws no random numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llorch.domain import policy
from llorch.domain.task import Priority
from llorch.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _listed(value: object) -> object:
    """One section stands for a list of one."""
    return [value] if isinstance(value, Mapping) else value


def _fixed(value: object) -> object:
    """A bare number stands for a fixed value."""
    return {"distribution": "fixed", "value": value} if isinstance(value, int | float) else value


class Section(BaseModel):
    """A mapping of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Fixed(Section):
    """Always the same."""

    distribution: Literal["fixed"]
    value: NotNegative


class Uniform(Section):
    """Any value from `low` to `high` alike."""

    distribution: Literal["uniform"]
    low: NotNegative
    high: NotNegative


class Exponential(Section):
    """Memoryless; values above `max` are cut to it."""

    distribution: Literal["exponential"]
    mean: Positive
    max: Positive | None = None


class Lognormal(Section):
    """Heavy-tailed by a high `cv`, the standard deviation over the mean; values above `max` are cut to it."""

    distribution: Literal["lognormal"]
    mean: Positive
    cv: Positive
    max: Positive | None = None


Distribution = Annotated[
    Annotated[Fixed | Uniform | Exponential | Lognormal, Field(discriminator="distribution")], BeforeValidator(_fixed)
]


class Arrivals(Section):
    """When tasks come: as Poisson process, in bursts, evenly, or all at 0 s.

    `rate_per_s` is the mean in the long run; without it the `load` of the whole file sets it. Bursty: a Poisson process
    that is on and off for exponential times with these means, in seconds; all tasks come while it is on.
    """

    process: Literal["poisson", "bursty", "even", "at_once"] = "poisson"
    rate_per_s: Positive | None = None
    on_s: Positive = 5.0
    off_s: NotNegative = 20.0


class Deadline(Section):
    """`slack` times what its prompt and a usual answer take on an idle replica of the first group, plus `extra_s`.

    This `fraction` of the tasks has one.
    """

    slack: Distribution
    extra_s: NotNegative = 0.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


class Traffic(Section):
    """What one tenant sends. `share`: of all arriving tasks, relative to the others', where `load` sets the rates.

    `expected`: what is told of the output's length: `exact` is the true one, `mean` the mean of all, `max` max_tokens.
    `max_tokens`: by default the largest output, or eight means of an unbounded one, which is cut there.
    `turns`: how many tasks in a row share a session.
    """

    share: Positive = 1.0
    priority: Priority = Priority.INTERACTIVE
    arrivals: Arrivals = Arrivals()
    prompt_tokens: Distribution
    output_tokens: Distribution
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    expected: Literal["exact", "mean", "max"] | Annotated[int, Field(ge=1)] = "mean"
    deadline: Deadline | None = None
    turns: Annotated[int, Field(ge=1)] = 1


class Rate(Section):
    """Submissions of one priority."""

    per_s: Positive
    burst: Annotated[float, Field(ge=1)]


class Tenant(Section):
    """A tenant, or `count` alike, which are named `<name>-<number>`."""

    count: Annotated[int, Field(ge=1)] = 1
    weight: Positive = 1.0
    max_queued: Annotated[int, Field(ge=0)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    rate: dict[Priority, Rate] = Field(default_factory=dict)
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    kv_tokens: Annotated[int, Field(ge=1)] | None = None
    traffic: Annotated[list[Traffic], BeforeValidator(_listed)] = Field(default_factory=list)

    def quota(self) -> policy.Quota:
        """Its limits as the Ledger takes them."""
        return policy.Quota(
            max_queued=self.max_queued,
            max_concurrent=self.max_concurrent,
            rate={level: policy.Rate(rate.per_s, rate.burst) for level, rate in self.rate.items()},
            tokens_per_minute=self.tokens_per_minute,
            kv_tokens=self.kv_tokens,
        )


class TokenCost(Section):
    """Weight of a token in fairness."""

    prompt: NotNegative = 1.0
    output: NotNegative = 2.0


class Queue(Section):
    """As `pools[].queue` of the configuration; `capacity` may be one number for each priority."""

    capacity: Annotated[int, Field(ge=0)] | dict[Priority, Annotated[int, Field(ge=0)]] = 256
    full_policy: policy.FullPolicy | dict[Priority, policy.FullPolicy] = Field(default_factory=dict)
    fairness: policy.Fairness = policy.Fairness.WFQ
    order: policy.Order = policy.Order.FIFO
    edf_default_ms: Positive = 60_000.0
    level_weights: dict[Priority, Positive] = Field(default_factory=dict)
    token_cost: TokenCost = TokenCost()
    feasible_probability: Annotated[float, Field(ge=0, le=1)] = 0.7

    def bounds(self) -> dict[Priority, int]:
        """Tasks that may wait, by priority."""
        if isinstance(self.capacity, int):
            return dict.fromkeys(Priority, self.capacity)
        return {level: self.capacity.get(level, 256) for level in Priority}

    def policy(self, weights: Mapping[str, float]) -> policy.QueuePolicy:
        """As the domain takes it; what is absent is as by default there."""
        base = policy.QueuePolicy()
        given = self.full_policy if isinstance(self.full_policy, dict) else dict.fromkeys(Priority, self.full_policy)
        return policy.QueuePolicy(
            capacity=self.bounds(),
            full_policy={**base.full_policy, **given},
            fairness=self.fairness,
            order=self.order,
            edf_default_s=self.edf_default_ms / 1000,
            level_weights={**base.level_weights, **self.level_weights},
            weights=weights,
            prompt_cost=self.token_cost.prompt,
            output_cost=self.token_cost.output,
        )


class Preemption(Section):
    """As `pools[].preemption` of the configuration."""

    mode: Literal["soft", "hard"] = "soft"
    per_minute: Annotated[int, Field(ge=0)] = 6
    protected: list[Priority] = Field(default_factory=lambda: [Priority.INTERACTIVE])


class Sessions(Section):
    """As `sessions` of the configuration."""

    ttl_s: Positive = 600.0
    turns: Annotated[int, Field(ge=1)] = 8
    bindings: Annotated[int, Field(ge=0)] = 10_000
    detour_ms: NotNegative = 500.0


class Replicas(Section):
    """`count` replicas alike, each with `slots` that do not slow each other down.

    A run takes `overhead_s`, then `prefill_s_per_token` for each prompt token until its first token, then
    `decode_s_per_token` for each further one. An aborted run lets go of its slot after `release_s`. With `mtbf_s` a
    replica breaks down after exponential times with that mean and is back after `repair_s`.
    """

    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    slots: Annotated[int, Field(ge=1)] = 1
    overhead_s: NotNegative = 0.0
    prefill_s_per_token: NotNegative = 0.0
    decode_s_per_token: Positive
    release_s: NotNegative = 0.0
    mtbf_s: Positive | None = None
    repair_s: Positive = 30.0


class Spec(Section):
    """The whole file. The traffic is either generated from `seed`, or read from the file `workload`.

    `tasks` or `duration_s` ends the generation. `load` is offered work over what all slots can do, and sets the rate of
    all traffic that has none of its own. `on_deadline` is what happens to a running task at its deadline. A task
    reports its tokens in `token_batches`.
    """

    title: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    tasks: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    duration_s: Positive | None = None
    load: Positive | None = None
    workload: Path | None = None
    on_deadline: Literal["finish", "abort"] = "finish"
    token_batches: Annotated[int, Field(ge=1)] = 4
    wall_s: Positive = 600.0
    replicas: Annotated[list[Replicas], BeforeValidator(_listed), Field(min_length=1)]
    queue: Queue = Queue()
    preemption: Preemption = Preemption()
    sessions: Sessions = Sessions()
    tenants: dict[Name, Tenant] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> "Spec":
        if self.workload is not None:
            return self
        traffic = [traffic for tenant in self.tenants.values() for traffic in tenant.traffic]
        if not traffic:
            raise ValueError("expected `workload`, or tenants with traffic")
        if (self.tasks is None) == (self.duration_s is None):
            raise ValueError("expected one of `tasks` and `duration_s`")
        for one in traffic:
            is_paced = one.arrivals.process != "at_once"
            if is_paced and self.load is None and one.arrivals.rate_per_s is None:
                raise ValueError("expected `load`, or `rate_per_s` for all arrivals")
            if not is_paced and self.tasks is None:
                raise ValueError("expected `tasks`, as arrivals at once have no end")
        return self

    def names(self) -> dict[str, Tenant]:
        """Every single tenant."""
        return {name: tenant for group, tenant in self.tenants.items() for name in members(group, tenant)}

    def route_policy(self) -> policy.RoutePolicy:
        """How the route treats its tasks, as the domain takes it."""
        return policy.RoutePolicy(
            queue=self.queue.policy({name: tenant.weight for name, tenant in self.names().items()}),
            wall_s=self.wall_s,
            preemption=policy.PreemptionPolicy(
                hard=self.preemption.mode == "hard",
                per_minute=self.preemption.per_minute,
                protected=frozenset(self.preemption.protected),
            ),
            feasible_probability=self.queue.feasible_probability,
            detour_s=self.sessions.detour_ms / 1000,
            bindings=self.sessions.bindings,
        )

    def quotas(self) -> dict[str, policy.Quota]:
        """Limits of those tenants that have some."""
        given = {name: tenant.quota() for name, tenant in self.names().items()}
        return {name: quota for name, quota in given.items() if quota != policy.NO_QUOTA}


def members(group: str, tenant: Tenant) -> list[str]:
    """The names of the tenants that one entry of the file stands for."""
    if tenant.count == 1:
        return [group]
    width = len(str(tenant.count))
    return [f"{group}-{number:0{width}}" for number in range(1, tenant.count + 1)]


def load_spec(file: Path, changes: Sequence[str] = ()) -> Spec:
    """Read a file and put `changes` over it, each `path.to.setting=value`. Raises ConfigError naming the setting."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of settings")
    for change in changes:
        _change(tree, change)
    spec = parse_spec(tree, str(file))
    if spec.workload is not None:
        return spec.model_copy(update={"workload": file.parent / spec.workload})
    return spec


def parse_spec(tree: Mapping[str, Any], name: str) -> Spec:
    """Check a tree of settings. `name` stands for the file in the ConfigError, which has a line for each problem."""
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = (f"{name}: {_path(problem['loc'])}{problem['msg']}" for problem in problems)
        raise ConfigError("\n".join(lines)) from error


def _path(steps: tuple[int | str, ...]) -> str:
    path = ".".join(str(step) for step in steps)
    return f"{path}: " if path else ""


def _change(tree: dict[str, Any], change: str) -> None:
    path, sign, value = change.partition("=")
    steps = path.split(".")
    if not sign or not all(steps):
        raise ConfigError(f"--set {change}: expected path.to.setting=value")
    if steps[0] == "tenants" and len(steps) > 2 and "workload" not in tree:  # whose file may have other tenants
        tenants = tree.get("tenants") or {}
        if steps[1] not in tenants:
            raise ConfigError(f"--set {change}: the file has no tenant {steps[1]}; it has {', '.join(tenants)}")
    node: Any = tree
    try:
        for step in steps[:-1]:
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
        new = yaml.safe_load(value)
        if isinstance(node, list):
            node[int(steps[-1])] = new
        else:
            node[steps[-1]] = new
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"--set {change}: the file has no such place") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: not YAML: {value}") from error
