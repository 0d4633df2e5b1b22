"""The sessions in use: how long they live, how many turns they had, and the budgets they carry.

Whether one may have another task is asked here; what that task reserves of the budgets is in its lease.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from llorch.domain.limits import NO_CLAIM, Claim, SessionBudgets, ms_until
from llorch.domain.task import Budgets, Fault, SessionKey
from llorch.errors import BudgetExhausted, InvalidParams

_UNLIMITED = Budgets()


@dataclass(slots=True)
class Session:
    """What is known of a session. It lives until `expires_at`, which every accepted task pushes out.

    One whose tasks have reserved some of its budgets lives until they are over.
    """

    key: SessionKey
    turns: int
    expires_at: float
    budgets: SessionBudgets | None = None


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """`ttl_s`: seconds without a new task until a session is forgotten; `turns`: tasks it may have in its life."""

    ttl_s: float = 600.0
    turns: int = 8


class Sessions:
    """The sessions in use, oldest use first.

    Its size is bounded by the tasks accepted within one TTL and those that are not over.
    """

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._overdue: dict[SessionKey, Session] = {}
        self._first_end = inf  # no session ends earlier

    def limit(self, limits: SessionLimits) -> None:
        """Have these limits from now on. What is in use lives as long after its last task as they say."""
        later_s = limits.ttl_s - self.limits.ttl_s
        self.limits = limits
        self._first_end += later_s
        for session in self._sessions.values():
            session.expires_at += later_s

    def __len__(self) -> int:
        return len(self._sessions) + len(self._overdue)

    def __iter__(self) -> Iterator[Session]:
        yield from self._sessions.values()
        yield from self._overdue.values()

    def get(self, key: SessionKey, now: float) -> Session | None:
        """The session, unless its time is up."""
        if now >= self._first_end:
            self.expire(now)
        session = self._sessions.get(key)
        if session is None and self._overdue:
            return self._overdue.get(key)
        return session

    def refusal(
        self, key: SessionKey, now: float, claim: Claim = NO_CLAIM, budgets: Budgets | None = None
    ) -> Fault | None:
        """Why the session may not have one more turn that claims so much, or None.

        `budgets` are those that the task names. The first task sets them; a later one may repeat them or name none.
        """
        session = self.get(key, now)
        if session is None:
            return None if budgets is None else SessionBudgets(key, budgets).refusal(claim, now, now)
        known = session.budgets
        if budgets is not None and not _agree(known, budgets):
            return Fault(
                InvalidParams,
                "the budgets of a session are set by its first task, and these are others",
                details={"path": "/session_budgets"},
            )
        if session.turns >= self.limits.turns:
            return Fault(
                BudgetExhausted,
                f"the session has had its {self.limits.turns} turns; it can be used anew when it has expired",
                policy_label="session-turns",
                retry_after_ms=ms_until(session.expires_at, now),
            )
        return None if known is None else known.refusal(claim, session.expires_at, now)

    def take_turn(self, key: SessionKey, now: float, budgets: Budgets | None = None) -> Session:
        """Count a turn and push the session's end out; makes the session, with these budgets, when there is none."""
        session = self.get(key, now)
        if session is None:
            session = self._sessions[key] = Session(key, 0, 0.0)
            if budgets is not None and budgets != _UNLIMITED:
                session.budgets = SessionBudgets(key, budgets)
        elif self._overdue and self._overdue.pop(key, None) is not None:
            self._sessions[key] = session
        session.turns += 1
        session.expires_at = ends_at = now + self.limits.ttl_s
        self._sessions.move_to_end(key)
        if ends_at < self._first_end:  # noqa: PLR1730 - cheaper than min()
            self._first_end = ends_at
        return session

    def forget(self, key: SessionKey) -> None:
        """End the session. What its tasks have reserved settles into nothing. Idempotent."""
        self._sessions.pop(key, None)
        self._overdue.pop(key, None)

    def release(self, budgets: SessionBudgets) -> None:
        """No task has reserved any of these budgets any more: a session that outlived its time for them ends."""
        session = self._overdue.get(budgets.session)
        if session is not None and session.budgets is budgets:
            del self._overdue[budgets.session]

    def expire(self, now: float) -> None:
        """Forget the sessions whose time is up. Those with open reservations are set aside, to be asked only once."""
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if session.expires_at > now:
                self._first_end = session.expires_at
                return
            del self._sessions[key]
            if session.budgets is not None and session.budgets.leases:
                self._overdue[key] = session
        self._first_end = inf


def _agree(known: SessionBudgets | None, named: Budgets) -> bool:
    return (known is not None and known.agree(named)) or named == _UNLIMITED
