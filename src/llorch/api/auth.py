"""API keys and who they stand for. Knows keys by their sha256 only; a key itself is seen once, when it is made."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llorch.domain.task import Priority
from llorch.errors import Forbidden, Unauthenticated

PREFIX = "llk_"
NODE_PREFIX = "lln_"
NODE_SCOPE = "node"
"""What a node's token opens, and no key does."""
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
    """Who sent a request, as far as the key tells. Nothing else in a request changes it. `node_id` is set for nodes."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    priorities: frozenset[Priority]
    node_id: str | None = None


class NodeRecord(Protocol):
    """A configured node. `sha256` is the lower-case hex digest of its whole token, prefix included."""

    @property
    def node_id(self) -> str: ...
    @property
    def sha256(self) -> str: ...


LOCAL = Identity(key_id="", tenant="local", scopes=SCOPES, priorities=frozenset(Priority))
"""Everybody, where no keys are configured."""

NOBODY = Identity(key_id="", tenant="", scopes=frozenset(), priorities=frozenset())
"""The caller of an operation that needs no key."""


def new_key(prefix: str = PREFIX) -> tuple[str, str]:
    """A fresh key of 256 random bits, to be shown once, and its sha256 in hex, to be configured."""
    key = prefix + secrets.token_urlsafe(_KEY_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The configured keys and node tokens; without keys, everybody else is the tenant `local`.

    Raises ValueError for keys that clash.
    """

    def __init__(self, records: Sequence[KeyRecord] = (), nodes: Sequence[NodeRecord] = ()) -> None:
        self.replace(records, nodes)

    def replace(self, records: Sequence[KeyRecord], nodes: Sequence[NodeRecord] = ()) -> None:
        """Have these from now on. Raises ValueError, and then nothing has changed."""
        known = [
            (record.sha256, Identity(record.id, record.tenant, _implied(record.scopes), record.priorities))
            for record in records
        ]
        known += [(node.sha256, _node_identity(node.node_id)) for node in nodes]
        by_digest = {digest: (digest, identity) for digest, identity in known}
        if len(by_digest) != len(known):
            raise ValueError("two keys have the same sha256")
        self._by_digest = by_digest
        self._is_keyless = not records

    @property
    def is_keyless(self) -> bool:
        """No keys are configured."""
        return self._is_keyless

    def identify(self, authorization: bytes | None) -> Identity:
        """Who this Authorization header stands for. Raises Unauthenticated."""
        if authorization is None or not self._by_digest:
            return self._anybody()
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return self._anybody()
        # The look-up sees only the digest, so the time it takes tells nothing of the key.
        digest = hashlib.sha256(key.strip()).hexdigest()
        known, identity = self._by_digest.get(digest, ("", NOBODY))
        if not hmac.compare_digest(known, digest):
            return self._anybody()
        return identity

    def _anybody(self) -> Identity:
        if not self._is_keyless:
            raise Unauthenticated
        return LOCAL


def check_scope(identity: Identity, scope: str) -> None:
    """Raise Forbidden unless the key has the scope that an operation asks for."""
    is_enough = scope in identity.scopes or (scope == ANY_SCOPE and identity.scopes and identity.node_id is None)
    if not is_enough:
        raise Forbidden(f"this key lacks the scope {scope}")


def check_node(identity: Identity, node_id: str) -> None:
    """Raise Forbidden unless the token is that of this node."""
    if identity.node_id != node_id:
        raise Forbidden(f"this token is not that of the node {node_id}")


def _node_identity(node_id: str) -> Identity:
    return Identity(f"node {node_id}", "", frozenset({NODE_SCOPE}), frozenset(), node_id)


def check_priority(identity: Identity, priority: Priority) -> None:
    """Raise Forbidden unless the key may use the priority."""
    if priority not in identity.priorities:
        choices = [level.value for level in Priority if level in identity.priorities]
        raise Forbidden(f"this key may not use the priority {priority.value}", details={"choices": choices})


def _implied(scopes: frozenset[str]) -> frozenset[str]:
    if unknown := scopes - SCOPES:
        raise ValueError(f"no such scope: {', '.join(sorted(unknown))}")
    return SCOPES if "admin" in scopes else scopes
