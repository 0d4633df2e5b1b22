"""Look at sessions and end them."""

from llorch.domain import events as ev
from llorch.domain.task import SessionKey
from llorch.errors import NotFound
from llorch.service.dispatcher import Dispatcher
from llorch.service.submission import SessionView


class Sessions:
    """What a client can do with sessions. Another tenant's session is NotFound."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._sessions = dispatcher.ledger.sessions

    def get(self, tenant: str, session_id: str) -> SessionView:
        """The session as it is now; raises NotFound."""
        now = self._dispatcher.now()
        session = self._sessions.get((tenant, session_id), now)
        if session is None:
            raise NotFound(f"there is no session {session_id}")
        return SessionView(
            session_id=session_id,
            ttl_ms_remaining=round((session.expires_at - now) * 1000),
            turns=session.turns,
            turns_max=self._sessions.limits.turns,
            kv_warmth=self._is_warm((tenant, session_id), now),
            budgets=self._dispatcher.budgets_left((tenant, session_id)),
        )

    def _is_warm(self, session: SessionKey, now: float) -> bool | None:
        """Whether some replica has the session's KV cache; None when it was served nowhere yet."""
        known = [scheduler.is_warm(session, now) for scheduler in self._dispatcher.schedulers.values()]
        return True if True in known else False if False in known else None

    async def delete(self, tenant: str, session_id: str) -> None:
        """Cancel what the session still has to do and forget it; raises NotFound."""
        self.get(tenant, session_id)
        self._dispatcher.post_to_all(ev.SessionDeleted((tenant, session_id)))
        await self._dispatcher.commit()
