"""Which replica and slot served a session last, and whether the slot still holds what it left there.

Bounded in number and in time. Knows neither load nor states of replicas: whether a session goes back to where it was
is for the placement to say.
"""

from collections import OrderedDict

from llorch.domain.task import SessionKey


class Bindings:
    """At most `limit` sessions with their last replica and slot; the one bound longest ago is forgotten first.

    The owner of a slot is the session that was bound to it last. Only a session that is bound there owns a slot, so
    that owners are as bounded as bindings are. Times are seconds of the caller's monotonic clock.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bound: OrderedDict[SessionKey, tuple[str, int, float]] = OrderedDict()
        self._owners: dict[str, dict[int, SessionKey]] = {}

    def resize(self, limit: int) -> None:
        """Remember at most so many from now on."""
        self._limit = limit
        while len(self._bound) > limit:
            self.forget(next(iter(self._bound)))

    def __len__(self) -> int:
        return len(self._bound)

    @property
    def owned_slots(self) -> int:
        """How many slots have an owner; never more than there are bindings."""
        return sum(map(len, self._owners.values()))

    def bound(self, session: SessionKey, now: float) -> tuple[str, int] | None:
        """(replica_id, slot) that served the session last, unless that is too long ago."""
        self._expire(now)
        binding = self._bound.get(session)
        if binding is None:
            return None
        replica_id, slot, expires_at = binding
        if expires_at <= now:
            self.forget(session)
            return None
        return replica_id, slot

    def bind(self, session: SessionKey, replica_id: str, slot: int, expires_at: float) -> None:
        """The session is served there now, and what another one had left in the slot is lost."""
        self.forget(session)
        self._owners.setdefault(replica_id, {})[slot] = session
        self._bound[session] = (replica_id, slot, expires_at)
        while len(self._bound) > self._limit:
            self.forget(next(iter(self._bound)))

    def forget(self, session: SessionKey) -> tuple[str, int] | None:
        """Unbind the session. Idempotent; tells the replica and slot that may still hold what it left there."""
        binding = self._bound.pop(session, None)
        if binding is None or not self.is_warm(session, binding[0], binding[1]):
            return None
        replica_id, slot, _ = binding
        owners = self._owners[replica_id]
        del owners[slot]
        if not owners:
            del self._owners[replica_id]
        return replica_id, slot

    def is_warm(self, session: SessionKey, replica_id: str, slot: int) -> bool:
        """The slot was last used by this session, and its replica was not lost since."""
        owners = self._owners.get(replica_id)
        return owners is not None and owners.get(slot) == session

    def lose(self, replica_id: str) -> None:
        """The replica restarted or is not Ready: nothing is warm there. Sessions stay bound. Idempotent."""
        self._owners.pop(replica_id, None)

    def _expire(self, now: float) -> None:
        """Forget what is due among the oldest; one bound for a shorter time than its elders goes when they go."""
        while self._bound:
            session, (_, _, expires_at) = next(iter(self._bound.items()))
            if expires_at > now:
                return
            self.forget(session)
