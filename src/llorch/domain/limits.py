"""Accounts of what tenants and sessions may use, and the one lease by which something is reserved from them.

A gauge is held while a lease is open, a bucket refills with time, a budget is spent for good. Questions change
nothing. It knows nothing of slots, of the lives of sessions, or of who must be told that a limit has room again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import ceil, inf, isclose

from llorch.domain.policy import Quota, Rate
from llorch.domain.task import Budgets, Fault, Priority, SessionKey, TaskKey
from llorch.errors import BudgetExhausted, BudgetTooSmall, QuotaExceeded

_TOLERANCE_S = 1e-6
"""Sums of floats miss by less; a bucket that lets a request in so much too early charges it all the same."""
_SLACK = 1e-9
"""The same for budgets, as a part of their limit."""
_MOMENT_S = 0.001
"""A session that has less time left than this has none."""


@dataclass(slots=True)
class Claim:
    """The most that a task may use, known at its admission.

    `time_s`: seconds of running. `cost`: of the prompt and `max_tokens`, in the unit of the prices.
    """

    prompt_tokens: int
    expected_tokens: int
    max_tokens: int
    time_s: float
    cost: float


NO_CLAIM = Claim(0, 0, 0, 0.0, 0.0)


@dataclass(slots=True)
class Use:
    """What a task has used when it is over, all its attempts together."""

    prompt_tokens: int
    tokens_out: int
    time_s: float
    cost: float


def ms_until(end: float, now: float) -> int | None:
    """Rounded up, so that it has come when they have passed; None, unknown, when it should have come already."""
    return ceil((end - now) * 1000) if end > now else None


class Measure(IntEnum):
    """What an account counts."""

    PLACES = 0
    TOKENS = 1
    SECONDS = 2
    COST = 3


class Gauge:
    """At most `limit` at a time, given back in full."""

    __slots__ = ("held", "label", "limit")
    measure = Measure.PLACES

    def __init__(self, label: str, limit: int) -> None:
        self.label = label
        self.limit = limit
        self.held: float = 0

    def fits(self, amount: float) -> bool:
        """There is room. What is bigger than the whole limit may have it alone; a limit of 0 lets nothing in."""
        return self.held + amount <= self.limit or (not self.held and self.limit > 0)

    def lend(self, lease: "Lease", amount: float) -> None:
        """Take it whether there is room or not."""
        self.held += amount
        lease.holds[self] = amount

    def settle(self, amount: float, used: float, now: float) -> None:  # noqa: ARG002 - as for every account
        self.held -= amount

    def abandon(self, amount: float) -> None:
        self.held -= amount


class Bucket:
    """A token bucket that may go into debt: `burst` at once, `per_s` a second in the long run, both above 0.

    All its state is the time at which it will be full, so that nothing need be refilled: the virtual scheduling
    algorithm of ITU-T I.371 (GCRA).
    """

    __slots__ = ("burst", "full_at", "label", "measure", "per_s")

    def __init__(self, label: str, measure: Measure, per_s: float, burst: float) -> None:
        self.label = label
        self.measure = measure
        self.per_s = per_s
        self.burst = burst
        self.full_at = -inf

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until there is enough, 0 for now. For what is bigger than the whole bucket a full one is enough.

        Infinite for a bucket that holds or gets nothing.
        """
        if self.burst <= 0 or self.per_s <= 0:
            return inf
        spare = self.burst - amount if amount < self.burst else 0.0
        wait = self.full_at - now - spare / self.per_s
        return wait if wait > _TOLERANCE_S else 0.0

    def lend(self, lease: "Lease", amount: float, now: float) -> None:
        self.spend(amount, now)
        lease.holds[self] = amount

    def spend(self, amount: float, now: float) -> None:
        """Take it for good, whether there is enough or not."""
        if self.full_at < now:  # noqa: PLR1730 - cheaper than max()
            self.full_at = now
        self.full_at += amount / self.per_s

    def settle(self, amount: float, used: float, now: float) -> None:
        """Give back what was not used, or take what was used beyond the reservation."""
        if used > amount:
            self.spend(used - amount, now)
        else:
            self.full_at -= (amount - used) / self.per_s

    def abandon(self, amount: float) -> None:
        self.full_at -= amount / self.per_s


class Budget:
    """`limit` once; reserved by the tasks that run or wait, spent by those that are over, and the rest is `free`."""

    __slots__ = ("_ceiling", "free", "label", "limit", "measure", "open", "reserved", "spent")

    def __init__(self, label: str, measure: Measure, limit: float) -> None:
        self.label = label
        self.measure = measure
        self.limit = limit
        self.free = self._ceiling = limit * (1 + _SLACK)
        self.spent = 0.0
        self.reserved = 0.0
        self.open = 0

    @property
    def left(self) -> float:
        """What a task may still reserve; never negative, though a task may have used more than it reserved."""
        return max(0.0, self.limit - self.spent - self.reserved)

    def lend(self, lease: "Lease", amount: float) -> None:
        self.open += 1
        self.reserved += amount
        self.free = self._ceiling - self.spent - self.reserved
        lease.holds[self] = amount

    def settle(self, amount: float, used: float, now: float) -> None:  # noqa: ARG002
        self.open -= 1
        self.reserved = self.reserved - amount if self.open else 0.0  # sums of floats leave no crumbs
        self.spent += used
        self.free = self._ceiling - self.spent - self.reserved

    def abandon(self, amount: float) -> None:
        self.settle(amount, 0.0, 0.0)

    def refusal(self, amount: float, ends_in_ms: int | None) -> Fault:
        """Why it may not have so much: it never could, too much is spent (until the session ends), or reserved."""
        kind: type[BudgetExhausted] = BudgetExhausted
        if amount > self._ceiling:
            kind, what, again = BudgetTooSmall, "the whole budget is less than the task may need", None
        elif amount > self._ceiling - self.spent:
            what, again = "the budget is spent", ends_in_ms
        else:
            what, again = "tasks that are not over have reserved it", None
        message = f"{what}: {_told(self.limit)} in all, {_told(self.spent)} spent, {_told(self.reserved)} reserved"
        return Fault(kind, message, policy_label=self.label, retry_after_ms=again)


Account = Gauge | Bucket | Budget


class TenantAccounts:
    """The accounts of one tenant. It is idle when no lease is open on them and its buckets are full.

    `is_resting`: it waits to be forgotten. `is_wanted`: a task was kept from starting since something was given back.
    """

    __slots__ = ("is_resting", "is_wanted", "kv", "leases", "queued", "rates", "running", "tokens")

    def __init__(self, quota: Quota) -> None:
        self.leases = 0
        self.is_resting = False
        self.is_wanted = False
        self.queued: Gauge | None = None
        self.running: Gauge | None = None
        self.kv: Gauge | None = None
        self.rates: dict[Priority, Bucket] = {}
        self.tokens: Bucket | None = None
        self.limit(quota)

    def limit(self, quota: Quota) -> None:
        """Have this quota from now on; the same one changes nothing.

        What is held counts against a limit that is other than it was; against one that is new, only what comes. A
        bucket of another rate begins full. Leases settle with the accounts that they took from.
        """
        self.queued = _gauge(self.queued, "max-queued", quota.max_queued)
        self.running = _gauge(self.running, "max-concurrent", quota.max_concurrent)
        self.kv = _gauge(self.kv, "kv-tokens", quota.kv_tokens)
        self.rates = {
            priority: _bucket(self.rates.get(priority), "rate", Measure.PLACES, rate)
            for priority, rate in quota.rate.items()
        }
        per_minute = quota.tokens_per_minute
        self.tokens = (
            None
            if per_minute is None
            else _bucket(self.tokens, "tokens-per-minute", Measure.TOKENS, Rate(per_minute / 60, per_minute))
        )

    @property
    def is_limited(self) -> bool:
        """There is an account at all."""
        accounts = (self.queued, self.running, self.kv, self.tokens)
        return bool(self.rates) or any(account is not None for account in accounts)

    @property
    def limits_runs(self) -> bool:
        """There is an account that attempts take from."""
        return self.running is not None or self.kv is not None

    def full_at(self) -> float:
        """When all buckets will be full, in the caller's seconds."""
        ends = [bucket.full_at for bucket in self.rates.values()]
        if self.tokens is not None:
            ends.append(self.tokens.full_at)
        return max(ends, default=-inf)

    def refusal(self, priority: Priority, claim: Claim, now: float) -> Fault | None:
        """Why the tenant may not have one more task, or None."""
        queued = self.queued
        if queued is not None and queued.held >= queued.limit:
            return Fault(QuotaExceeded, f"{queued.held:g} tasks wait already", policy_label=queued.label)
        rate = self.rates.get(priority)
        if rate is not None and (wait_s := rate.wait_s(1, now)):
            return _too_fast(rate, f"{rate.per_s:g} {priority} tasks a second", wait_s)
        tokens = self.tokens
        if tokens is not None and (wait_s := tokens.wait_s(claim.prompt_tokens + claim.expected_tokens, now)):
            return _too_fast(tokens, f"{tokens.burst:g} tokens a minute", wait_s)
        return None

    def reserve(self, lease: "Lease", priority: Priority, claim: Claim, now: float) -> None:
        """Take what an admitted task takes. Its part of the rate is spent whatever becomes of the task."""
        rate = self.rates.get(priority)
        if rate is not None:
            rate.spend(1, now)
        if self.queued is not None:
            self.queued.lend(lease, 1)
        if self.tokens is not None:
            self.tokens.lend(lease, claim.prompt_tokens + claim.expected_tokens, now)

    def run(self, lease: "Lease", kv_tokens: int) -> None:
        """Take what an attempt takes while it runs."""
        if self.running is not None:
            self.running.lend(lease, 1)
        if self.kv is not None:
            self.kv.lend(lease, kv_tokens)

    def can_start(self, kv_tokens: int) -> bool:
        """An attempt with so much context may run beside those that run."""
        running = self.running
        return (running is None or running.held < running.limit) and (self.kv is None or self.kv.fits(kv_tokens))

    def check(self, leases: int, held: Mapping["Account", float]) -> Iterator[str]:
        """Say what does not agree with the leases that are open and what they hold."""
        if self.leases != leases:
            yield f"{leases} leases are open and {self.leases} counted"
        if not self.leases and not self.is_resting:
            yield "idle, and never to be forgotten"
        for gauge in (self.queued, self.running, self.kv):
            if gauge is not None and gauge.held != held.get(gauge, 0.0):
                yield f"{gauge.label}: {gauge.held} held, {held.get(gauge, 0.0)} in leases"


class SessionBudgets:
    """The budgets of one session, as its first task set them."""

    __slots__ = ("cost", "leases", "limits", "session", "time", "tokens")

    def __init__(self, session: SessionKey, limits: Budgets) -> None:
        self.session = session
        self.limits = limits
        self.leases = 0
        self.tokens = None if limits.tokens is None else Budget("session-tokens", Measure.TOKENS, limits.tokens)
        self.time = None if limits.time_s is None else Budget("session-time", Measure.SECONDS, limits.time_s)
        self.cost = None if limits.cost is None else Budget("session-cost", Measure.COST, limits.cost)

    def refusal(self, claim: Claim, end: float, now: float) -> Fault | None:
        """Why the task does not fit into what is left, or None. `end`: when the session may begin anew."""
        tokens = claim.prompt_tokens + claim.max_tokens
        if self.tokens is not None and tokens > self.tokens.free:
            return self.tokens.refusal(tokens, ms_until(end, now))
        if self.time is not None and self.time.free < _MOMENT_S:
            return self.time.refusal(_MOMENT_S, ms_until(end, now))
        if self.cost is not None and claim.cost > self.cost.free:
            return self.cost.refusal(claim.cost, ms_until(end, now))
        return None

    def agree(self, named: Budgets) -> bool:
        """The budgets that a later task names are these."""
        own = self.limits
        return named.tokens == own.tokens and named.time_s == own.time_s and named.cost == own.cost

    def reserve(self, lease: "Lease", claim: Claim) -> None:
        """Take the most that the task may use; of time no more than is left."""
        if self.tokens is not None:
            self.tokens.lend(lease, claim.prompt_tokens + claim.max_tokens)
        if self.time is not None:
            self.time.lend(lease, claim.time_s if claim.time_s < self.time.free else self.time.left)
        if self.cost is not None:
            self.cost.lend(lease, claim.cost)

    def left(self) -> Budgets:
        """What is neither spent nor reserved."""
        return Budgets(
            tokens=None if self.tokens is None else int(self.tokens.left),
            time_s=None if self.time is None else self.time.left,
            cost=None if self.cost is None else self.cost.left,
        )

    def check(self, leases: int, held: Mapping["Account", float]) -> Iterator[str]:
        """Say what does not agree with the leases that are open and what they hold."""
        if self.leases != leases:
            yield f"{leases} leases are open and {self.leases} counted"
        for budget in (self.tokens, self.time, self.cost):
            if budget is not None and not isclose(budget.reserved, held.get(budget, 0.0), abs_tol=_SLACK):
                yield f"{budget.label}: {budget.reserved} reserved, {held.get(budget, 0.0)} in leases"


class Lease:
    """What a task, or a run of it, has reserved. It ends once, settled to the true use or abandoned.

    It keeps the accounts themselves, not their names: what belongs to a deleted session settles into nothing.
    """

    __slots__ = ("budgets", "holds", "is_open", "owner", "tenant")

    def __init__(self, owner: TaskKey, tenant: TenantAccounts | None, budgets: SessionBudgets | None = None) -> None:
        self.owner = owner
        self.tenant = tenant
        self.budgets = budgets
        self.holds: dict[Account, float] = {}
        self.is_open = True
        if tenant is not None:
            tenant.leases += 1
        if budgets is not None:
            budgets.leases += 1

    def give_back(self, account: Account) -> None:
        """Abandon what is held of this account alone. Idempotent."""
        amount = self.holds.pop(account, None)
        if amount is not None:
            account.abandon(amount)

    def settle(self, use: Use, now: float) -> None:
        """Charge every account with what was used, and give back the rest. Idempotent."""
        if self.is_open:
            used = (0.0, use.prompt_tokens + use.tokens_out, use.time_s, use.cost)
            for account, amount in self.holds.items():
                account.settle(amount, used[account.measure], now)
            self._end()

    def abandon(self) -> None:
        """Give everything back, as if it had never been reserved. Idempotent."""
        if self.is_open:
            for account, amount in self.holds.items():
                account.abandon(amount)
            self._end()

    def _end(self) -> None:
        self.is_open = False
        self.holds.clear()
        if self.tenant is not None:
            self.tenant.leases -= 1
        if self.budgets is not None:
            self.budgets.leases -= 1

    def outstanding(self) -> Iterator[tuple[TaskKey, str, float]]:
        """Owner, label of the account, and amount of everything held."""
        for account, amount in self.holds.items():
            yield self.owner, account.label, amount


def _gauge(known: Gauge | None, label: str, limit: int | None) -> Gauge | None:
    if known is None or limit is None:
        return None if limit is None else Gauge(label, limit)
    known.limit = limit
    return known


def _bucket(known: Bucket | None, label: str, measure: Measure, rate: Rate) -> Bucket:
    if known is not None and (known.per_s, known.burst) == (rate.per_s, rate.burst):
        return known
    return Bucket(label, measure, rate.per_s, rate.burst)


def _too_fast(bucket: Bucket, limit: str, wait_s: float) -> Fault:
    """Who comes back at the time told is let in, if nobody else was faster."""
    again = None if wait_s == inf else ms_until(wait_s, 0.0)
    return Fault(QuotaExceeded, f"the tenant may have {limit}", policy_label=bucket.label, retry_after_ms=again)


def _told(amount: float) -> str:
    return f"{round(amount, 6):.15g}"
