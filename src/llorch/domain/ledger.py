"""Every reservation as a lease with one owner and one settle; shared by all schedulers.

Slot leases belong to attempts, turns to sessions. Counts are derived from the leases that exist, so that nothing can
leak or be settled twice.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from heapq import heappop, heappush

from llorch.domain.task import Fault, SessionKey
from llorch.errors import BudgetExhausted


@dataclass(slots=True)
class SlotLease:
    """A slot of a replica, held by an attempt. `releasing` once the attempt was told to stop."""

    attempt_id: int
    replica_id: str
    slot: int
    releasing: bool = False


@dataclass(slots=True)
class _Slots:
    """The slots of one replica: how many are leased, those that were given back, lowest first, and the first unused."""

    busy: int = 0
    returned: list[int] = field(default_factory=list)
    unused: int = 0

    def take(self) -> int:
        self.busy += 1
        if self.returned:
            return heappop(self.returned)
        self.unused += 1
        return self.unused - 1

    def give_back(self, slot: int) -> None:
        self.busy -= 1
        heappush(self.returned, slot)


@dataclass(slots=True)
class Session:
    """What is known of a session. It lives until `expires_at`, which every accepted task pushes out."""

    key: SessionKey
    turns: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """`ttl_s`: seconds without a new task until a session is forgotten; `turns`: tasks it may have in its life."""

    ttl_s: float = 600.0
    turns: int = 8


class Sessions:
    """The sessions in use, oldest use first. Its size is bounded by the tasks accepted within one TTL."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: SessionKey, now: float) -> Session | None:
        """The session, unless its time is up."""
        self._expire(now)
        return self._sessions.get(key)

    def refusal(self, key: SessionKey, now: float) -> Fault | None:
        """Why the session may not have one more turn, or None."""
        session = self.get(key, now)
        if session is None or session.turns < self.limits.turns:
            return None
        return Fault(
            BudgetExhausted,
            f"the session has had its {self.limits.turns} turns; it can be used anew when it has expired",
            policy_label="session-turns",
            retry_after_ms=max(1, round((session.expires_at - now) * 1000)),
        )

    def take_turn(self, key: SessionKey, now: float) -> None:
        """Count a turn and push the session's end out; makes the session when there is none."""
        session = self.get(key, now)
        if session is None:
            session = self._sessions[key] = Session(key, 0, 0.0)
        session.turns += 1
        session.expires_at = now + self.limits.ttl_s
        self._sessions.move_to_end(key)

    def forget(self, key: SessionKey) -> None:
        """End the session. Idempotent."""
        self._sessions.pop(key, None)

    def _expire(self, now: float) -> None:
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if session.expires_at > now:
                return
            del self._sessions[key]


class Ledger:
    """All leases of the service."""

    def __init__(self, limits: SessionLimits | None = None) -> None:
        self.sessions = Sessions(limits or SessionLimits())
        self._leases: dict[int, SlotLease] = {}
        self._slots: dict[str, _Slots] = {}
        self._last_attempt = 0

    def hold_slot(self, replica_id: str) -> SlotLease:
        """Lease the lowest slot of the replica that nobody holds, under a new attempt id.

        The caller has checked that the replica has one to spare.
        """
        slots = self._slots.get(replica_id)
        if slots is None:
            slots = self._slots[replica_id] = _Slots()
        self._last_attempt += 1
        lease = self._leases[self._last_attempt] = SlotLease(self._last_attempt, replica_id, slots.take())
        return lease

    def release_slot(self, attempt_id: int) -> None:
        """The attempt was told to stop; the slot stays taken until it is settled. Idempotent."""
        lease = self._leases.get(attempt_id)
        if lease is not None:
            lease.releasing = True

    def settle_slot(self, attempt_id: int) -> None:
        """The engine let go: the slot is free. Idempotent."""
        lease = self._leases.pop(attempt_id, None)
        if lease is not None:
            slots = self._slots[lease.replica_id]
            slots.give_back(lease.slot)
            if not slots.busy:
                del self._slots[lease.replica_id]

    def busy_slots(self, replica_id: str) -> int:
        """Slots of the replica that are held or releasing."""
        slots = self._slots.get(replica_id)
        return 0 if slots is None else slots.busy

    def leases(self) -> list[SlotLease]:
        """Every slot lease that is not settled."""
        return list(self._leases.values())
