"""One method per operation of the contract: from the wire's values to a use case and back.

No decisions but whose key may do what; errors pass through untouched.
"""

from collections.abc import Callable
from typing import Literal

from llorch.api import inventory, mapping
from llorch.api import nodes as wire
from llorch.api.auth import check_node, check_priority
from llorch.api.context import Context
from llorch.api.ports import Changes, Configurations, Nodes, Pools, Sessions, Tasks
from llorch.api.sse import Following
from llorch.errors import PoolUnavailable, PoolUnready
from llorch.service.limits import Limits
from llorch_contract import models
from llorch_contract.operations import Operations
from llorch_contract.replies import EventStream, NoContent, PlainText, Reply


class Handlers(Operations[Context]):
    """Serves the whole contract from the use cases."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        sessions: Sessions,
        pools: Pools,
        changes: Changes,
        configurations: Configurations,
        nodes: Nodes,
        limits: Limits,
        metrics_text: Callable[[], bytes],
        is_shutting_down: Callable[[], bool],
    ) -> None:
        self._tasks = tasks
        self._sessions = sessions
        self._pools = pools
        self._changes = changes
        self._configurations = configurations
        self._nodes = nodes
        self._limits = limits
        self._metrics_text = metrics_text
        self._is_shutting_down = is_shutting_down

    async def create_task(self, *, ctx: Context, body: models.TaskRequest) -> Reply[Literal[202], models.TaskAccepted]:
        submission = mapping.to_submission(body, ctx.tenant)
        check_priority(ctx.identity, submission.priority)
        acceptance = await self._tasks.submit(submission, ctx.correlation_id)
        return Reply(202, mapping.to_accepted(acceptance), mapping.budget_headers(acceptance.budgets))

    async def list_tasks(
        self,
        *,
        ctx: Context,
        state: Literal["queued", "running", "succeeded", "failed", "canceled"] | None,
        session_id: str | None,
        limit: int,
        cursor: str | None,
    ) -> Reply[Literal[200], models.TaskList]:
        views, next_cursor = self._tasks.list(
            ctx.tenant, state=mapping.to_state(state), session_id=session_id, limit=limit, cursor=cursor
        )
        tasks = [mapping.to_summary(view) for view in views]
        return Reply(200, models.TaskList(tasks=tasks, next_cursor=next_cursor))

    async def get_task(self, *, ctx: Context, task_id: str) -> Reply[Literal[200], models.Task]:
        return Reply(200, mapping.to_task(self._tasks.get(ctx.tenant, task_id)))

    async def stream_task(self, *, ctx: Context, task_id: str, last_event_id: str | None) -> EventStream | NoContent:
        reader = self._tasks.follow(ctx.tenant, task_id, int(last_event_id or 0))
        return NoContent() if reader is None else EventStream(Following(reader))

    async def cancel_task(self, *, ctx: Context, task_id: str) -> NoContent:
        await self._tasks.cancel(ctx.tenant, task_id)
        return NoContent()

    async def get_session(self, *, ctx: Context, session_id: str) -> Reply[Literal[200], models.Session]:
        return Reply(200, mapping.to_session(self._sessions.get(ctx.tenant, session_id)))

    async def delete_session(self, *, ctx: Context, session_id: str) -> NoContent:
        await self._sessions.delete(ctx.tenant, session_id)
        return NoContent()

    async def list_pools(self, *, ctx: Context) -> Reply[Literal[200], models.PoolList]:  # noqa: ARG002
        return Reply(200, models.PoolList(pools=[inventory.to_pool(view) for view in self._pools.list()]))

    async def get_pool_health(self, *, ctx: Context, pool_id: str) -> Reply[Literal[200], models.PoolHealth]:  # noqa: ARG002
        return Reply(200, inventory.to_pool_health(self._pools.get(pool_id)))

    async def list_replica_sets(self, *, ctx: Context) -> Reply[Literal[200], models.ReplicaSetList]:  # noqa: ARG002
        sets = [inventory.to_replica_set(view) for view in self._pools.replica_sets()]
        return Reply(200, models.ReplicaSetList(replica_sets=sets))

    async def drain_pool(
        self,
        *,
        ctx: Context,  # noqa: ARG002
        pool_id: str,
        body: models.DrainRequest | None,
    ) -> Reply[Literal[202], models.PoolChange]:
        change = self._changes.drain(pool_id, inventory.deadline_s(body))
        return Reply(202, inventory.to_pool_change(change))

    async def reload_pool(
        self,
        *,
        ctx: Context,  # noqa: ARG002
        pool_id: str,
        body: models.ReloadRequest | None,
    ) -> Reply[Literal[202], models.PoolChange]:
        change = self._changes.reload(pool_id, inventory.deadline_s(body))
        return Reply(202, inventory.to_pool_change(change))

    async def get_config(self, *, ctx: Context) -> Reply[Literal[200], models.ConfigStatus]:  # noqa: ARG002
        return Reply(200, inventory.to_config_status(self._configurations.status()))

    async def reload_config(self, *, ctx: Context) -> Reply[Literal[202], models.ConfigStatus]:  # noqa: ARG002
        return Reply(202, inventory.to_config_status(await self._configurations.reload()))

    async def revert_config(self, *, ctx: Context) -> Reply[Literal[202], models.ConfigStatus]:  # noqa: ARG002
        return Reply(202, inventory.to_config_status(await self._configurations.revert()))

    async def list_nodes(self, *, ctx: Context) -> Reply[Literal[200], models.NodeList]:  # noqa: ARG002
        return Reply(200, models.NodeList(nodes=[wire.to_node(view) for view in self._nodes.list()]))

    async def register_node(
        self, *, ctx: Context, node_id: str, body: models.NodeRegistration
    ) -> Reply[Literal[200], models.NodeOrders]:
        check_node(ctx.identity, node_id)
        return Reply(200, wire.to_orders(self._nodes.register(wire.to_registration(node_id, body), ctx.peer)))

    async def renew_node(
        self, *, ctx: Context, node_id: str, body: models.NodeHeartbeat
    ) -> Reply[Literal[200], models.NodeOrders]:
        check_node(ctx.identity, node_id)
        orders = self._nodes.renew(
            node_id, body.lease_id, host=wire.to_host(body.host), reports=wire.to_reports(body.replicas), peer=ctx.peer
        )
        return Reply(200, wire.to_orders(orders))

    async def leave_node(self, *, ctx: Context, node_id: str, lease_id: str) -> NoContent:
        check_node(ctx.identity, node_id)
        self._nodes.leave(node_id, lease_id)
        return NoContent()

    async def get_capabilities(self, *, ctx: Context) -> Reply[Literal[200], models.Capabilities]:  # noqa: ARG002
        return Reply(200, inventory.to_capabilities(self._pools.routes, self._pools.list(), self._limits))

    async def get_liveness(self, *, ctx: Context) -> Reply[Literal[200], models.Liveness]:  # noqa: ARG002
        return Reply(200, models.Liveness(status="ok"))

    async def get_readiness(self, *, ctx: Context) -> Reply[Literal[200], models.Readiness]:  # noqa: ARG002
        if self._is_shutting_down():
            raise PoolUnavailable("the server is shutting down", policy_label="shutdown")
        ready = self._pools.count_ready()
        if not ready:
            raise PoolUnready("no replica is ready")
        return Reply(200, models.Readiness(status="ready", replicas_ready=ready))

    async def get_metrics(self, *, ctx: Context) -> PlainText:  # noqa: ARG002
        return PlainText(self._metrics_text())
