"""API keys of tests: four tenants, one key that may do less, one that may do everything."""

import hashlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Identity:
    """A key and its entry in the configuration."""

    id: str
    tenant: str
    scopes: tuple[str, ...] = ("data",)
    priorities: tuple[str, ...] = ("interactive", "batch")

    @property
    def key(self) -> str:
        return f"llk_{hashlib.sha256(f'test key {self.id}'.encode()).hexdigest()}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def entry(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "sha256": hashlib.sha256(self.key.encode()).hexdigest(),
            "tenant": self.tenant,
            "scopes": list(self.scopes),
            "priorities": list(self.priorities),
        }


ALICE = Identity("alice", "acme", ("data", "control"))
BOB = Identity("bob", "bluebell", ("data",))
CAROL = Identity("carol", "crocus", ("data",))
DAVE = Identity("dave", "daffodil", ("data",))
BATCHER = Identity("batcher", "acme", ("data",), ("batch",))
WATCHER = Identity("watcher", "operations", ("control",))
ADMIN = Identity("admin", "operations", ("admin",))

EVERYBODY = (ALICE, BOB, CAROL, DAVE, BATCHER, WATCHER, ADMIN)
