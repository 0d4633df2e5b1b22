"""What of a running service changes in one instant when its configuration does; what is told of engines and changes.

It knows every part of the service by the one method that takes the new values; the order of things is not its business.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from structlog.typing import FilteringBoundLogger

from llorch import config
from llorch.api.auth import Keys
from llorch.domain.events import ConfigChanged, LimitLifted
from llorch.domain.ledger import Ledger
from llorch.domain.policy import RoutePolicy
from llorch.domain.scheduler import Scheduler
from llorch.gauges import LOCAL_NODE
from llorch.service.configurations import Deployment
from llorch.service.dispatcher import Dispatcher
from llorch.service.inventory import ConfigChange, PoolChange
from llorch.service.launching import HostFacts, LaunchReport, Phase
from llorch.service.nodes import NodeConfig, Nodes, NodeState
from llorch.service.pools import Pools
from llorch.service.probes import Watched
from llorch.service.routes import Routes
from llorch.settings import default_quota, key_records, node_configs, quotas, route_scopes, session_limits
from llorch.telemetry import Telemetry


class Live:
    """Implements `llorch.service.configurations.Live`."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        ledger: Ledger,
        pools: Pools,
        nodes: Nodes,
        keys: Keys,
        telemetry: Telemetry,
        log: FilteringBoundLogger,
    ) -> None:
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._pools = pools
        self._nodes = nodes
        self._keys = keys
        self._telemetry = telemetry
        self._log = log

    def prepare(self, current: Deployment, new: Deployment) -> None:
        """See Live.prepare."""
        self._telemetry.set_routes(route_scopes(_settings(new)))
        ours = node_configs(_settings(new))
        names = {node.node_id for node in ours}
        leaving = [node for node in node_configs(_settings(current)) if node.node_id not in names]
        self._set_nodes(_settings(current), [*ours, *leaving])

    def finish(self, deployment: Deployment) -> None:
        """See Live.finish."""
        self._set_nodes(_settings(deployment), node_configs(_settings(deployment)))

    def _set_nodes(self, settings: config.Settings, nodes: Sequence[NodeConfig]) -> None:
        self._nodes.reconfigure(nodes)
        self._keys.replace(key_records(settings), nodes)

    def open_route(self, route_id: str, policy: RoutePolicy) -> None:
        """See Live.open_route."""
        self._dispatcher.open_route(route_id, Scheduler(policy, self._ledger))

    def close_route(self, route_id: str) -> None:
        """See Live.close_route; what still lives there ends with its replicas, and its scheduler is kept until then."""
        self._dispatcher.close_route(route_id)

    def commit(self, deployment: Deployment) -> None:
        """See Live.commit."""
        settings = _settings(deployment)
        self._keys.replace(key_records(settings), node_configs(settings))
        self._pools.routes = Routes(deployment.routes.values())
        self._ledger.reconfigure(quotas(settings), default_quota(settings), session_limits(settings))
        for tenant in self._ledger.take_lifted():
            self._dispatcher.post_to_all(LimitLifted(tenant))
        for route_id, policy in deployment.policies.items():
            if self._dispatcher.schedulers[route_id].policy != policy:
                self._dispatcher.post(route_id, ConfigChanged(policy))

    def observe(self, outcome: str, change: ConfigChange) -> None:
        """See Live.observe."""
        self._telemetry.engines.note_reload(outcome)
        write = self._log.info if outcome == "done" else self._log.warning
        write("config_reload", outcome=outcome, changed=list(change.changed), reason=change.message)


def _settings(deployment: Deployment) -> config.Settings:
    return cast("config.Settings", deployment.source)


class EngineReporter:
    """Counts and logs what becomes of engine processes, self-tests, hosts and changes of pools."""

    def __init__(self, telemetry: Telemetry, log: FilteringBoundLogger) -> None:
        self._engines = telemetry.engines
        self._log = log
        self._resets: dict[str, int] = {}

    def on_launch(self, watched: Watched, before: LaunchReport | None, now: LaunchReport) -> None:
        """A manager told what became of a process."""
        labels = _labels(watched)
        for cause, count in now.restarts.items():
            known = before.restarts.get(cause, 0) if before is not None else 0
            if count != known:
                self._engines.count_failures(*labels, cause.value, count - known if count > known else count)
        was_up = before is not None and before.phase is Phase.UP and before.incarnation == now.incarnation
        if now.phase is Phase.UP and not was_up and now.load_s is not None:
            self._engines.note_preload(*labels, now.load_s)
        elif now.phase is Phase.WAITING and before is not None and before.phase in (Phase.STARTING, Phase.LOADING):
            self._engines.note_preload(*labels, None)
        if watched.config.node is not None and now.error is not None and (before is None or before.error != now.error):
            self._tell_failure(watched, now)

    def on_test(self, watched: Watched, is_passed: bool) -> None:
        """A self-test is over."""
        self._engines.note_test(*_labels(watched), is_passed=is_passed)

    def on_change(self, pool_id: str, change: PoolChange) -> None:
        """A drain or reload of a pool went a step on."""
        write = self._log.warning if change.state in ("failed", "rolled_back") else self._log.info
        write(
            "pool_change",
            pool_id=pool_id,
            kind=change.kind,
            state=change.state,
            replicas=f"{change.replicas_done}/{change.replicas_total}",
            running=change.running,
            queued=change.queued,
            moved=change.moved,
            ready_s=change.ready_s,
            reason=change.message,
        )

    def on_node(self, node_id: str, state: NodeState) -> None:
        """A node joined, fell silent, or left."""
        write = self._log.warning if state is NodeState.SILENT else self._log.info
        write("node_changed", node=node_id, state=state.value)

    def count_resets(self, hosts: Mapping[str, HostFacts]) -> None:
        """Count driver resets that hosts told of since they were last asked about."""
        for node, host in hosts.items():
            known = self._resets.get(node, 0)
            if host.driver_resets != known:
                new = host.driver_resets - known if host.driver_resets > known else host.driver_resets
                self._engines.count_resets(node, new)
                self._resets[node] = host.driver_resets

    def _tell_failure(self, watched: Watched, report: LaunchReport) -> None:
        assert report.error is not None
        self._log.warning(
            "engine_failed",
            node=watched.config.node or LOCAL_NODE,
            pool_id=watched.config.pool.pool_id,
            replica_id=watched.replica_id,
            cause=report.cause.value if report.cause is not None else None,
            code=report.error.code,
            error=report.error.message,
            next_start_s=report.next_start_s,
        )


def _labels(watched: Watched) -> tuple[str, str | None, str]:
    return watched.config.pool.route.engine, watched.engine_version.value, watched.config.pool.pool_id
