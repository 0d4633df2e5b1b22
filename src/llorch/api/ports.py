"""What the handlers need of the use cases."""

from collections.abc import Sequence
from typing import Protocol

from llorch.domain.task import TaskState
from llorch.service.inventory import ConfigStatus, PoolChange, PoolView, ReplicaSetView
from llorch.service.launching import HostFacts, LaunchReport
from llorch.service.nodes import NodeView, Orders, Registration
from llorch.service.routes import Routes
from llorch.service.streams import Reader
from llorch.service.submission import Acceptance, SessionView, Submission, TaskView


class Tasks(Protocol):
    """Tasks of a tenant. Everything raises LlorchErrors only; another tenant's task is NotFound."""

    async def submit(self, submission: Submission, correlation_id: str) -> Acceptance:
        """Admit the task, or raise why not."""
        ...

    async def cancel(self, tenant: str, task_id: str) -> None:
        """End the task if it has not ended. Idempotent."""
        ...

    def get(self, tenant: str, task_id: str) -> TaskView:
        """The task as it is now."""
        ...

    def list(
        self, tenant: str, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> tuple[Sequence[TaskView], str | None]:
        """A page of the tenant's tasks, newest first, and the cursor of the next page."""
        ...

    def follow(self, tenant: str, task_id: str, after: int) -> Reader | None:
        """A reader behind frame `after`, to be left by the caller; None when that was the terminal frame."""
        ...


class Sessions(Protocol):
    """Sessions of a tenant; another tenant's is NotFound."""

    def get(self, tenant: str, session_id: str) -> SessionView:
        """The session as it is now."""
        ...

    async def delete(self, tenant: str, session_id: str) -> None:
        """Forget the session."""
        ...


class Pools(Protocol):
    """The pools of the service."""

    @property
    def routes(self) -> Routes:
        """What is served."""
        ...

    def list(self) -> Sequence[PoolView]:
        """Every pool."""
        ...

    def get(self, pool_id: str) -> PoolView:
        """One pool; raises NotFound."""
        ...

    def replica_sets(self) -> Sequence[ReplicaSetView]:
        """The cohorts of every route."""
        ...

    def count_ready(self) -> int:
        """Replicas that take tasks now."""
        ...


class Changes(Protocol):
    """Drains and reloads of pools."""

    def drain(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        """Begin to drain; raises NotFound, and Conflict while another change of the pool is under way."""
        ...

    def reload(self, pool_id: str, deadline_s: float | None) -> PoolChange:
        """Begin to replace the engines; raises as drain does."""
        ...


class Configurations(Protocol):
    """The configuration file and what is in force of it."""

    def status(self) -> ConfigStatus:
        """What is in force."""
        ...

    async def reload(self) -> ConfigStatus:
        """Begin to apply the file as it is now.

        Raises InvalidParams for a file that cannot be used, or that changes what needs a restart; Conflict while a
        change is under way.
        """
        ...

    async def revert(self) -> ConfigStatus:
        """Begin to go back to the previous configuration. Raises as reload does; InvalidParams when there is none."""
        ...


class Nodes(Protocol):
    """Hosts with pool managers; whoever calls has checked that the caller is the node that it says."""

    def register(self, registration: Registration, peer: str) -> Orders:
        """Let a manager join; raises NotFound, Forbidden, InvalidParams for another version, Conflict."""
        ...

    def renew(
        self, node_id: str, lease_id: str, *, host: HostFacts, reports: Sequence[LaunchReport], peer: str
    ) -> Orders:
        """Prolong a lease; raises Conflict when it is over, and as register does."""
        ...

    def leave(self, node_id: str, lease_id: str) -> None:
        """Give the node back; raises as renew does."""
        ...

    def list(self) -> Sequence[NodeView]:
        """Every node."""
        ...
