"""Every reservation as a lease with one owner and one settle; shared by all schedulers.

Slots belong to attempts, turns and budgets to sessions, quotas to tenants. What is asked for is checked and taken
between two events, so that nothing can overrun; what is taken is in a lease, so that nothing can leak or be settled
twice. It knows nothing of queues, engines or time but the `now` (monotonic seconds) it is given.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf

from llorch.domain.limits import Account, Claim, Lease, SessionBudgets, TenantAccounts, Use
from llorch.domain.policy import NO_QUOTA, Quota
from llorch.domain.sessions import SessionLimits, Sessions
from llorch.domain.task import Budgets, Fault, SessionKey, TaskKey, TaskSpec
from llorch.errors import Conflict

__all__ = ["Claim", "Ledger", "SessionLimits", "SlotLease", "Use"]

_IDLE_S = 60.0
"""How long a tenant's accounts are kept at the least when it has nothing open: to make them anew costs more."""


@dataclass(slots=True)
class SlotLease:
    """A slot of a replica, held by an attempt. `releasing` once the attempt was told to stop.

    `lease` holds what the attempt takes of its tenant's limits while it runs.
    """

    attempt_id: int
    replica_id: str
    slot: int
    releasing: bool = False
    lease: Lease | None = None


@dataclass(slots=True)
class _Slots:
    """The slots of one replica: how many are leased, those that were given back, lowest first, and the first unused."""

    busy: int = 0
    returned: list[int] = field(default_factory=list)
    unused: int = 0

    def take(self, prefer: int | None) -> int:
        self.busy += 1
        if prefer is not None and self._take(prefer):
            return prefer
        if self.returned:
            return heappop(self.returned)
        self.unused += 1
        return self.unused - 1

    def _take(self, slot: int) -> bool:
        while self.unused <= slot:
            heappush(self.returned, self.unused)
            self.unused += 1
        if slot not in self.returned:
            return False
        self.returned.remove(slot)
        heapify(self.returned)
        return True

    def give_back(self, slot: int) -> None:
        self.busy -= 1
        heappush(self.returned, slot)


class Ledger:
    """All leases of the service.

    `quotas` are those of the tenants that have their own, `default` is for all others.
    """

    def __init__(
        self,
        session_limits: SessionLimits | None = None,
        quotas: Mapping[str, Quota] | None = None,
        default: Quota = NO_QUOTA,
    ) -> None:
        self.sessions = Sessions(session_limits or SessionLimits())
        self._quotas = dict(quotas or {})
        self._default = default
        self._idle = {tenant: _limited(quota) for tenant, quota in self._quotas.items()}  # never lent from: to be asked
        self._default_idle = _limited(default)
        self._tenants: dict[str, TenantAccounts] = {}
        self._resting: list[tuple[float, str]] = []
        self._lifted: dict[str, None] = {}
        self._tasks: dict[TaskKey, Lease] = {}
        self._leases: dict[int, SlotLease] = {}
        self._slots: dict[str, _Slots] = {}
        self._last_attempt = 0

    def reconfigure(self, quotas: Mapping[str, Quota], default: Quota, session_limits: SessionLimits) -> None:
        """Have these quotas and limits from now on.

        What is reserved stays reserved and counts against a changed limit; it is settled with the account that it was
        taken from. Whose tasks were kept from starting is told by take_lifted(). Sessions in use live by the new
        limits, too.
        """
        self._quotas, self._default = dict(quotas), default
        self._idle = {tenant: _limited(quota) for tenant, quota in self._quotas.items()}
        self._default_idle = _limited(default)
        self.sessions.limit(session_limits)
        for tenant, accounts in self._tenants.items():
            accounts.limit(self._quotas.get(tenant, default))
            self._lift(tenant, accounts)

    # Admission

    def refusal(self, spec: TaskSpec, claim: Claim, now: float) -> Fault | None:
        """Why the task may not be admitted, or None: its session's turns and budgets, then its tenant's quota.

        Changes nothing. The fault tells when the limit that tripped has room again, if that is known.
        """
        fault = self.sessions.refusal(spec.session, now, claim, spec.budgets)
        if fault is not None:
            return fault
        if spec.key in self._tasks:
            return Fault(Conflict, "an earlier task of this id is still being stopped")
        tenant = spec.key[0]
        accounts = self._tenants.get(tenant) or self._idle.get(tenant, self._default_idle)
        return None if accounts is None else accounts.refusal(spec.priority, claim, now)

    def reserve(self, spec: TaskSpec, claim: Claim, now: float) -> None:
        """Take everything that the task claims, all at once. The caller has just seen that nothing is refused."""
        if self._resting and self._resting[0][0] <= now:
            self._forget_idle(now)
        session = self.sessions.take_turn(spec.session, now, spec.budgets)
        accounts = self._accounts_of(spec.key[0])
        budgets = session.budgets
        if accounts is None and budgets is None:
            return
        assert spec.key not in self._tasks, f"{spec.key} has reserved before"
        lease = self._tasks[spec.key] = Lease(spec.key, accounts, budgets)
        if accounts is not None:
            accounts.reserve(lease, spec.priority, claim, now)
        if budgets is not None:
            budgets.reserve(lease, claim)

    def settle_task(self, key: TaskKey, use: Use, now: float) -> None:
        """The task is over and none of its attempts runs: charge what it used, give back the rest. Idempotent."""
        lease = self._tasks.pop(key, None)
        if lease is not None:
            lease.settle(use, now)
            budgets = lease.budgets
            if budgets is not None and not budgets.leases:
                self.sessions.release(budgets)
            accounts = lease.tenant
            if accounts is not None and not accounts.leases and not accounts.is_resting:
                self._rest(key[0], accounts, now + _IDLE_S)

    # Runs

    def can_start(self, tenant: str, kv_tokens: int) -> bool:
        """The tenant may run one more attempt with so much context. When not, take_lifted() tells when to ask again."""
        accounts = self._tenants.get(tenant)
        if accounts is None:
            idle = self._idle.get(tenant, self._default_idle)
            return idle is None or idle.can_start(kv_tokens)
        if accounts.can_start(kv_tokens):
            return True
        accounts.is_wanted = True
        return False

    def hold_slot(
        self, replica_id: str, *, task: TaskKey | None = None, kv_tokens: int = 0, prefer: int | None = None
    ) -> SlotLease:
        """Lease a slot of the replica that nobody holds, the preferred or else the lowest, under a new attempt id.

        The caller has checked that the replica has one to spare. The task that the attempt is for no longer waits; it
        holds some of its tenant's max_concurrent and `kv_tokens` until the slot is settled.
        """
        slots = self._slots.get(replica_id)
        if slots is None:
            slots = self._slots[replica_id] = _Slots()
        self._last_attempt += 1
        slot_lease = SlotLease(self._last_attempt, replica_id, slots.take(prefer))
        self._leases[self._last_attempt] = slot_lease
        if task is not None and (accounts := self._accounts_of_runs(task[0])) is not None:
            slot_lease.lease = self._begin_run(accounts, task, kv_tokens)
        return slot_lease

    def release_slot(self, attempt_id: int) -> None:
        """The attempt was told to stop; the slot stays taken until it is settled. Idempotent."""
        lease = self._leases.get(attempt_id)
        if lease is not None:
            lease.releasing = True

    def settle_slot(self, attempt_id: int) -> None:
        """The engine let go: the slot is free, and what the attempt held of its tenant's limits. Idempotent."""
        slot_lease = self._leases.pop(attempt_id, None)
        if slot_lease is None:
            return
        slots = self._slots[slot_lease.replica_id]
        slots.give_back(slot_lease.slot)
        if not slots.busy:
            del self._slots[slot_lease.replica_id]
        if slot_lease.lease is not None:
            self._end_run(slot_lease.lease)

    def requeue(self, key: TaskKey) -> None:
        """The task waits again. It was admitted, so it takes its place even if the limit is exceeded. Idempotent."""
        lease = self._tasks.get(key)
        if lease is None or lease.tenant is None or lease.tenant.queued is None:
            return
        if lease.tenant.queued not in lease.holds:
            lease.tenant.queued.lend(lease, 1)

    def time_left_s(self, key: TaskKey) -> float | None:
        """Seconds that the task reserved of its session's time, for all its attempts; None without such a budget."""
        lease = self._tasks.get(key)
        if lease is None or lease.budgets is None or lease.budgets.time is None:
            return None
        return lease.holds[lease.budgets.time]

    def take_lifted(self) -> list[str]:
        """Tenants that can_start() refused and that have given something back since; each is told once."""
        if not self._lifted:
            return []
        lifted, self._lifted = list(self._lifted), {}
        return lifted

    # What is known

    def budgets_left(self, session: SessionKey, now: float) -> Budgets | None:
        """What the session's next task may reserve; None for a session without budgets, or when there is none."""
        known = self.sessions.get(session, now)
        return None if known is None or known.budgets is None else known.budgets.left()

    def busy_slots(self, replica_id: str) -> int:
        """Slots of the replica that are held or releasing."""
        slots = self._slots.get(replica_id)
        return 0 if slots is None else slots.busy

    def leases(self) -> list[SlotLease]:
        """Every slot lease that is not settled."""
        return list(self._leases.values())

    def outstanding(self) -> list[tuple[TaskKey, str, float]]:
        """Owner, account and amount of all that is reserved of quotas and budgets and not settled."""
        return [hold for lease in self._open_leases() for hold in lease.outstanding()]

    # Memory

    def expire(self, now: float) -> None:
        """Forget the sessions whose time is up, and the accounts of tenants that have been idle for a minute."""
        self.sessions.expire(now)
        self._forget_idle(now)

    def _forget_idle(self, now: float) -> None:
        while self._resting and self._resting[0][0] <= now:
            _, tenant = heappop(self._resting)
            accounts = self._tenants[tenant]
            accounts.is_resting = False
            if accounts.leases:
                continue
            if (full_at := accounts.full_at()) > now:
                self._rest(tenant, accounts, full_at)
            else:
                del self._tenants[tenant]

    def _rest(self, tenant: str, accounts: TenantAccounts, until: float) -> None:
        """Each tenant is in the heap at most once."""
        accounts.is_resting = True
        heappush(self._resting, (until, tenant))

    # Parts

    def _accounts_of(self, tenant: str) -> TenantAccounts | None:
        """Where the tenant's reservations are booked; None when it has no limits."""
        accounts = self._tenants.get(tenant)
        if accounts is None and self._idle.get(tenant, self._default_idle) is not None:
            accounts = self._tenants[tenant] = TenantAccounts(self._quotas.get(tenant, self._default))
        return accounts

    def _accounts_of_runs(self, tenant: str) -> TenantAccounts | None:
        """Where a run is booked; what waits since a time without limits has no accounts yet."""
        accounts = self._tenants.get(tenant)
        if accounts is None and (idle := self._idle.get(tenant, self._default_idle)) is not None and idle.limits_runs:
            return self._accounts_of(tenant)
        return accounts

    def _begin_run(self, accounts: TenantAccounts, task: TaskKey, kv_tokens: int) -> Lease | None:
        waiting = self._tasks.get(task)
        if waiting is not None and accounts.queued is not None:
            waiting.give_back(accounts.queued)
        if not accounts.limits_runs:
            return None
        lease = Lease(task, accounts)
        accounts.run(lease, kv_tokens)
        return lease

    def _end_run(self, lease: Lease) -> None:
        lease.abandon()
        accounts, tenant = lease.tenant, lease.owner[0]
        if accounts is None:
            return
        self._lift(tenant, accounts)
        if not accounts.leases and not accounts.is_resting:
            self._rest(tenant, accounts, -inf)

    def _lift(self, tenant: str, accounts: TenantAccounts) -> None:
        if accounts.is_wanted:
            accounts.is_wanted = False
            self._lifted[tenant] = None

    def _open_leases(self) -> Iterator[Lease]:
        yield from self._tasks.values()
        yield from (slot.lease for slot in self._leases.values() if slot.lease is not None)

    # For tests

    def check(self) -> Iterator[str]:
        """Say what does not add up between the leases and the accounts. Costs O(leases)."""
        held: dict[Account, float] = {}
        lent: Counter[TenantAccounts | SessionBudgets | None] = Counter()
        for lease in self._open_leases():
            lent.update([lease.tenant, lease.budgets])
            for account, amount in lease.holds.items():
                held[account] = held.get(account, 0.0) + amount
        for tenant, accounts in self._tenants.items():
            yield from (f"{tenant}: {broken}" for broken in accounts.check(lent[accounts], held))
        for session in self.sessions:
            if (budgets := session.budgets) is not None:
                yield from (f"{session.key}: {broken}" for broken in budgets.check(lent[budgets], held))


def _limited(quota: Quota) -> TenantAccounts | None:
    accounts = TenantAccounts(quota)
    return accounts if accounts.is_limited else None
