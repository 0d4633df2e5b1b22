"""What a handler knows of its caller beside the arguments of the operation."""

from dataclasses import dataclass

from llorch.api.auth import Identity


@dataclass(frozen=True, slots=True)
class Context:
    """Who asks, under which correlation id it is logged, and from which address (empty where there is none)."""

    identity: Identity
    correlation_id: str
    peer: str = ""

    @property
    def tenant(self) -> str:
        """Whose tasks and sessions the caller can see."""
        return self.identity.tenant
