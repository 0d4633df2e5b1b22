"""What a ledger must say, worked out the naive way: recounted from all that ever happened, with no state kept.

Numbers in histories are multiples of binary fractions, so that both ways of reckoning agree to the last bit.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

from llorch.domain.limits import Claim, Use
from llorch.domain.policy import Quota, Rate
from llorch.domain.sessions import SessionLimits
from llorch.domain.task import Budgets, Priority, SessionKey, TaskKey, TaskSpec
from llorch.errors import BudgetExhausted, BudgetTooSmall, InvalidParams, LlorchError, QuotaExceeded

Told = tuple[type[LlorchError], str | None, int | None]
"""Kind, label and retry_after_ms of a refusal."""


@dataclass(eq=False)
class Account:
    """One life of a session."""

    key: SessionKey
    budgets: Budgets
    expires_at: float = 0.0
    turns: int = 0
    reserved: dict[TaskKey, Budgets] = field(default_factory=dict)
    spent: list[Use] = field(default_factory=list)

    def is_over(self, now: float) -> bool:
        return self.expires_at <= now and not self.reserved

    def sums(self) -> dict[str, tuple[float | None, float, float]]:
        """Limit, spent, reserved."""
        held, spent = self.reserved.values(), self.spent
        tokens = sum(use.prompt_tokens + use.tokens_out for use in spent)
        return {
            "tokens": (self.budgets.tokens, tokens, sum(hold.tokens or 0 for hold in held)),
            "time": (self.budgets.time_s, sum(use.time_s for use in spent), sum(hold.time_s or 0 for hold in held)),
            "cost": (self.budgets.cost, sum(use.cost for use in spent), sum(hold.cost or 0 for hold in held)),
        }

    def left(self) -> Budgets | None:
        if self.budgets == Budgets():
            return None
        free = {
            name: None if limit is None else max(0, limit - spent - reserved)
            for name, (limit, spent, reserved) in self.sums().items()
        }
        tokens = free["tokens"]
        return Budgets(None if tokens is None else int(tokens), free["time"], free["cost"])


@dataclass(eq=False)
class Work:
    """A task that has reserved and is not settled."""

    spec: TaskSpec
    claim: Claim
    session: Account
    epoch: int
    is_waiting: bool = True
    is_over: bool = False
    attempts: set[int] = field(default_factory=set)


@dataclass
class Model:
    """The world as told so far."""

    limits: SessionLimits
    quotas: Mapping[str, Quota]
    default: Quota
    sessions: dict[SessionKey, Account] = field(default_factory=dict)
    work: dict[TaskKey, Work] = field(default_factory=dict)
    runs: dict[int, tuple[TaskKey, int]] = field(default_factory=dict)
    drawn: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    lifted: list[str] = field(default_factory=list)
    epoch: int = 0
    full_since: dict[tuple[str, str], int] = field(default_factory=dict)

    def reconfigure(self, quotas: Mapping[str, Quota], default: Quota, limits: SessionLimits, now: float) -> set[str]:
        """The same limits in other sizes. Tells whose tasks were kept from starting."""
        self.epoch += 1
        for bucket in self.drawn:
            before = self._rate(*bucket, self.quota(bucket[0]))
            if before != self._rate(*bucket, quotas.get(bucket[0], default)):
                self.drawn[bucket] = []
                self.full_since[bucket] = self.epoch
        for session in self.sessions.values():
            if session.expires_at > now:
                session.expires_at += limits.ttl_s - self.limits.ttl_s
        self.quotas, self.default, self.limits = quotas, default, limits
        lifted, self.wanted = self.wanted, set()
        return lifted

    def _rate(self, tenant: str, bucket: str, quota: Quota) -> object:
        return quota.tokens_per_minute if bucket == "tokens" else quota.rate.get(Priority(bucket))

    def quota(self, tenant: str) -> Quota:
        return self.quotas.get(tenant, self.default)

    def session(self, key: SessionKey, now: float) -> Account | None:
        known = self.sessions.get(key)
        if known is not None and known.is_over(now):
            del self.sessions[key]
            return None
        return known

    # Refusals

    def refusal(self, spec: TaskSpec, claim: Claim, now: float) -> Told | None:
        return next((told for told in self._refusals(spec, claim, now) if told is not None), None)

    def _refusals(self, spec: TaskSpec, claim: Claim, now: float) -> Iterator[Told | None]:
        known = self.session(spec.session, now)
        named = spec.budgets or Budgets()
        if known is not None:
            if named not in (Budgets(), known.budgets):
                yield InvalidParams, None, None
            if known.turns >= self.limits.turns:
                yield BudgetExhausted, "session-turns", _ms(known.expires_at - now)
        yield from self._budget_refusals(known or Account(spec.session, named), claim, now)
        yield from self._quota_refusals(spec, claim, now)

    def _budget_refusals(self, session: Account, claim: Claim, now: float) -> Iterator[Told | None]:
        needs = {"tokens": claim.prompt_tokens + claim.max_tokens, "time": 0.001, "cost": claim.cost}
        for name, (limit, spent, reserved) in session.sums().items():
            if limit is None or needs[name] <= limit - spent - reserved:
                continue
            is_spent = limit - spent < needs[name] <= limit
            kind = BudgetExhausted if needs[name] <= limit else BudgetTooSmall
            yield kind, f"session-{name}", _ms(session.expires_at - now) if is_spent else None

    def _quota_refusals(self, spec: TaskSpec, claim: Claim, now: float) -> Iterator[Told | None]:
        tenant, quota = spec.key[0], self.quota(spec.key[0])
        waiting = sum(work.is_waiting for key, work in self.work.items() if key[0] == tenant)
        if quota.max_queued is not None and waiting >= quota.max_queued:
            yield QuotaExceeded, "max-queued", None
        if (rate := quota.rate.get(spec.priority)) is not None:
            yield self._too_fast("rate", (tenant, spec.priority), rate, 1, now)
        if quota.tokens_per_minute is not None:
            rate = Rate(quota.tokens_per_minute / 60, quota.tokens_per_minute)
            need = claim.prompt_tokens + claim.expected_tokens
            yield self._too_fast("tokens-per-minute", (tenant, "tokens"), rate, need, now)

    def _too_fast(self, label: str, bucket: tuple[str, str], rate: Rate, need: float, now: float) -> Told | None:
        level, at = rate.burst, 0.0
        for then, amount in [*self.drawn.get(bucket, []), (now, 0.0)]:
            level = min(rate.burst, level + (then - at) * rate.per_s)
            level = min(rate.burst, level - amount)
            at = then
        lack = min(need, rate.burst) - level
        return None if lack <= 0 else (QuotaExceeded, label, _ms(lack / rate.per_s))

    # What happens

    def reserve(self, spec: TaskSpec, claim: Claim, now: float) -> None:
        known = self.session(spec.session, now)
        if known is None:
            known = self.sessions[spec.session] = Account(spec.session, spec.budgets or Budgets())
        known.turns += 1
        known.expires_at = now + self.limits.ttl_s
        if known.budgets != Budgets():
            left = known.left() or Budgets()
            known.reserved[spec.key] = Budgets(
                None if left.tokens is None else claim.prompt_tokens + claim.max_tokens,
                None if left.time_s is None else min(claim.time_s, left.time_s),
                None if left.cost is None else claim.cost,
            )
        self._draw(spec.key[0], spec.priority, 1, now)
        self._draw(spec.key[0], "tokens", claim.prompt_tokens + claim.expected_tokens, now)
        self.work[spec.key] = Work(spec, claim, known, self.epoch)

    def _draw(self, tenant: str, bucket: str, amount: float, now: float) -> None:
        self.drawn.setdefault((tenant, bucket), []).append((now, amount))

    def can_start(self, tenant: str, kv_tokens: int) -> bool:
        quota, running = self.quota(tenant), [kv for key, kv in self.runs.values() if key[0] == tenant]
        if quota.max_concurrent is not None and len(running) >= quota.max_concurrent:
            self.wanted.add(tenant)
            return False
        if quota.kv_tokens is not None and any(running) and sum(running) + kv_tokens > quota.kv_tokens:
            self.wanted.add(tenant)
            return False
        return True

    def start(self, key: TaskKey, attempt_id: int, kv_tokens: int) -> None:
        work = self.work[key]
        work.is_waiting = False
        work.attempts.add(attempt_id)
        self.runs[attempt_id] = key, kv_tokens

    def end(self, attempt_id: int) -> None:
        key, _ = self.runs.pop(attempt_id)
        if key in self.work:
            self.work[key].attempts.discard(attempt_id)
        if key[0] in self.wanted:
            self.wanted.discard(key[0])
            self.lifted.append(key[0])

    def settle(self, key: TaskKey, use: Use, now: float) -> None:
        work = self.work.pop(key)
        reserved = work.claim.prompt_tokens + work.claim.expected_tokens
        if work.epoch >= self.full_since.get((key[0], "tokens"), 0):
            self._draw(key[0], "tokens", use.prompt_tokens + use.tokens_out - reserved, now)
        if work.session.reserved.pop(key, None) is not None:
            work.session.spent.append(use)

    def forget(self, key: SessionKey) -> None:
        self.sessions.pop(key, None)

    # What is held

    def outstanding(self) -> Counter[tuple[TaskKey, str, float]]:
        return Counter((*self._held_by_tasks(), *self._held_by_attempts()))

    def _held_by_tasks(self) -> Iterator[tuple[TaskKey, str, float]]:
        for key, work in self.work.items():
            quota = self.quota(key[0])
            if quota.max_queued is not None and work.is_waiting:
                yield key, "max-queued", 1
            if quota.tokens_per_minute is not None:
                yield key, "tokens-per-minute", work.claim.prompt_tokens + work.claim.expected_tokens
            hold = work.session.reserved.get(key, Budgets())
            for name, amount in (("tokens", hold.tokens), ("time", hold.time_s), ("cost", hold.cost)):
                if amount is not None:
                    yield key, f"session-{name}", amount

    def _held_by_attempts(self) -> Iterator[tuple[TaskKey, str, float]]:
        for key, kv_tokens in self.runs.values():
            quota = self.quota(key[0])
            if quota.max_concurrent is not None:
                yield key, "max-concurrent", 1
            if quota.kv_tokens is not None:
                yield key, "kv-tokens", kv_tokens


def _ms(seconds: float) -> int | None:
    return ceil(seconds * 1000) if seconds > 0 else None
