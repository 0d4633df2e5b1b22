"""From a whole configuration to the replicas, pools and routes of the service, as one value that can be compared.

It builds nothing that runs. What each single setting means is told in `settings`.
"""

from llorch import config
from llorch.service.configurations import Deployment
from llorch.service.inventory import Fact
from llorch.service.probes import UNVERIFIED, EngineTimeouts, ReplicaConfig
from llorch.settings import launch_orders, replica_id_of, route_id_of, route_policy, service_pool


def deployment_of(settings: config.Settings) -> Deployment:
    """What the configuration makes of the service; `source` is the configuration itself."""
    pools = {pool.id: service_pool(settings, pool) for pool in settings.pools}
    authorities = {node.id: node.ca for node in settings.nodes}
    orders = {order.replica_id: (node, order) for node, order in launch_orders(settings)}
    replicas: list[ReplicaConfig] = []
    for configured in settings.pools:
        for index, replica in enumerate(configured.replicas):
            replica_id = replica_id_of(configured, index)
            node, order = orders.get(replica_id, (None, None))
            replicas.append(
                ReplicaConfig(
                    replica_id=replica_id,
                    pool=pools[configured.id],
                    engine=None,
                    slots=replica.slots,
                    engine_version=_stated(configured.engine_version),
                    model_digest=_stated(configured.model_digest),
                    order=order,
                    node=node,
                    must_test=order is not None if configured.self_test is None else configured.self_test,
                    self_test_s=configured.supervision.self_test_s,
                    url=replica.url,
                    api_key=replica.api_key.get_secret_value() if replica.api_key else None,
                    timeouts=_timeouts(configured.timeouts),
                    ca_file=None if node is None else authorities[node],
                    rank=len(replicas),
                )
            )
    return Deployment(
        pools=pools,
        replicas=tuple(replicas),
        policies={route_id_of(pool): route_policy(settings, pool) for pool in settings.pools},
        source=settings,
    )


def _timeouts(timeouts: config.Timeouts) -> EngineTimeouts:
    return EngineTimeouts(timeouts.connect_s, timeouts.first_byte_s, timeouts.idle_s)


def _stated(value: str | None) -> Fact:
    return UNVERIFIED if value is None else Fact(value, "stated")
