"""API keys and who they stand for. Knows keys by their sha256 only; a key itself is seen once, when it is made."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from llorch.domain.task import Priority
from llorch.errors import Forbidden, Unauthenticated

PREFIX = "llk_"
SCOPES = frozenset({"data", "control", "admin"})
ANY_SCOPE = "any"
"""What an operation asks for that every key may use."""

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A configured key. `sha256` is the lower-case hex digest of the whole key, prefix included."""

    id: str
    sha256: str
    tenant: str
    scopes: frozenset[str]
    priorities: frozenset[Priority]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a request, as far as the key tells. Nothing else in a request changes it."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    priorities: frozenset[Priority]


LOCAL = Identity(key_id="", tenant="local", scopes=SCOPES, priorities=frozenset(Priority))
"""Everybody, where no keys are configured."""

NOBODY = Identity(key_id="", tenant="", scopes=frozenset(), priorities=frozenset())
"""The caller of an operation that needs no key."""


def new_key() -> tuple[str, str]:
    """A fresh key of 256 random bits, to be shown once, and its sha256 in hex, to be configured."""
    key = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The configured keys; without any, everybody is the tenant `local`. Raises ValueError for keys that clash."""

    def __init__(self, records: Sequence[KeyRecord] = ()) -> None:
        self._by_digest = {
            record.sha256: (
                record.sha256,
                Identity(record.id, record.tenant, _implied(record.scopes), record.priorities),
            )
            for record in records
        }
        if len(self._by_digest) != len(records):
            raise ValueError("two keys have the same sha256")

    @property
    def is_keyless(self) -> bool:
        """No keys are configured."""
        return not self._by_digest

    def identify(self, authorization: bytes | None) -> Identity:
        """Who this Authorization header stands for. Raises Unauthenticated."""
        if not self._by_digest:
            return LOCAL
        if authorization is None:
            raise Unauthenticated
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthenticated
        # The look-up sees only the digest, so the time it takes tells nothing of the key.
        digest = hashlib.sha256(key.strip()).hexdigest()
        known, identity = self._by_digest.get(digest, ("", NOBODY))
        if not hmac.compare_digest(known, digest):
            raise Unauthenticated
        return identity


def check_scope(identity: Identity, scope: str) -> None:
    """Raise Forbidden unless the key has the scope that an operation asks for."""
    if scope not in identity.scopes and not (scope == ANY_SCOPE and identity.scopes):
        raise Forbidden(f"this key lacks the scope {scope}")


def check_priority(identity: Identity, priority: Priority) -> None:
    """Raise Forbidden unless the key may use the priority."""
    if priority not in identity.priorities:
        choices = [level.value for level in Priority if level in identity.priorities]
        raise Forbidden(f"this key may not use the priority {priority.value}", details={"choices": choices})


def _implied(scopes: frozenset[str]) -> frozenset[str]:
    if unknown := scopes - SCOPES:
        raise ValueError(f"no such scope: {', '.join(sorted(unknown))}")
    return SCOPES if "admin" in scopes else scopes
