"""The client of a pool manager: joins a server as a node, renews its lease, and gives it back.

Orders and reports are values of the service on this side; the wire's models end here.
"""

import asyncio
import random
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

import httpx

from llorch.client.errors import Unreachable
from llorch.client.events import read
from llorch.client.transport import Timeouts, Transport
from llorch.domain.backoff import RestartPolicy
from llorch.service.launching import (
    Cause,
    Headroom,
    HostFacts,
    LaunchOrder,
    LaunchReport,
    Supervision,
)
from llorch.service.nodes import Orders, Registration, RestartOrder
from llorch_contract import models

TIMEOUTS: Final = Timeouts(connect_s=2.0, answer_s=3.0)
"""A heartbeat that is not answered soon is better sent again: the lease goes on running."""


class NodeClient:
    """Speaks for one node. Everything raises ClientErrors, is bounded in time, and is sent once."""

    def __init__(self, base_url: str, token: str, *, ca_file: str | None = None) -> None:
        self._transport = Transport(
            base_url, token, timeouts=TIMEOUTS, patience_s=0.0, draw=random.random, notify=None, ca_file=ca_file
        )

    async def register(self, registration: Registration) -> Orders:
        """Join, or come back."""
        body = models.NodeRegistration(
            boot_id=registration.boot_id,
            manager_version=registration.manager_version,
            address=registration.address,
            host=_host(registration.host),
            replicas=[_replica(report) for report in registration.reports],
        )
        return await self._orders("PUT", _path(registration.node_id), body.model_dump_json())

    async def renew(self, node_id: str, lease_id: str, *, host: HostFacts, reports: tuple[LaunchReport, ...]) -> Orders:
        """Renew the lease; an ApiError of 409 when it is over."""
        body = models.NodeHeartbeat(
            lease_id=lease_id, host=_host(host), replicas=[_replica(report) for report in reports]
        )
        return await self._orders("POST", f"{_path(node_id)}/heartbeat", body.model_dump_json())

    async def leave(self, node_id: str, lease_id: str) -> None:
        """Give the node back."""
        await self._call("DELETE", _path(node_id), params={"lease_id": lease_id})

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _orders(self, method: str, path: str, body: str) -> Orders:
        return _to_orders(read(models.NodeOrders, (await self._call(method, path, body=body)).content))

    async def _call(
        self, method: str, path: str, *, body: str | None = None, params: Mapping[str, str | int] | None = None
    ) -> httpx.Response:
        """One answer. The transport bounds each read of it, which is no bound for an answer that trickles."""
        try:
            async with asyncio.timeout(TIMEOUTS.connect_s + TIMEOUTS.answer_s):
                return await self._transport.call(method, path, body=body, params=params, is_repeatable=False)
        except TimeoutError as exc:
            raise Unreachable("the server did not end its answer in time", dropped=True) from exc


def _path(node_id: str) -> str:
    return f"/v1/nodes/{quote(node_id, safe='')}"


def _host(host: HostFacts) -> models.HostFacts:
    return models.HostFacts(
        gpus=[
            models.Gpu(
                index=gpu.index,
                name=gpu.name[:256],
                total_bytes=gpu.total_bytes,
                used_bytes=gpu.used_bytes,
                utilization=gpu.utilization,
                is_lost=gpu.is_lost,
            )
            for gpu in host.gpus
        ],
        ram_total_bytes=host.ram_total_bytes,
        ram_available_bytes=host.ram_available_bytes,
        driver_resets=host.driver_resets,
    )


def _replica(report: LaunchReport) -> models.NodeReplica:
    error = report.error
    return models.NodeReplica(
        replica_id=report.replica_id,
        generation=report.generation,
        phase=models.ProcessPhase(report.phase.value),
        incarnation=report.incarnation,
        pid=report.pid,
        url=report.url,
        api_key=report.api_key,
        engine_version=report.engine_version,
        model_digest=report.model_digest,
        cause=None if report.cause is None else models.FailureCause(report.cause.value),
        error=None
        if error is None
        else models.ReportedError(
            code=models.ErrorCode(error.code), message=error.message[:4096], at_ms=round(error.at * 1000)
        ),
        restarts={cause.value: count for cause, count in report.restarts.items()},
        breaker=models.Breaker(report.breaker.value),
        next_start_ms=None if report.next_start_s is None else round(report.next_start_s * 1000),
        load_ms=None if report.load_s is None else round(report.load_s * 1000),
    )


def _to_orders(orders: models.NodeOrders) -> Orders:
    return Orders(
        lease_id=orders.lease_id,
        lease_s=orders.lease_ms / 1000,
        heartbeat_s=orders.heartbeat_ms / 1000,
        wanted=tuple(_to_order(order) for order in orders.wanted),
        restarts=tuple(RestartOrder(r.replica_id, r.incarnation, Cause(r.cause.value)) for r in orders.restarts),
    )


def _to_order(order: models.NodeOrder) -> LaunchOrder:
    headroom, supervision = order.headroom, order.supervision
    return LaunchOrder(
        replica_id=order.replica_id,
        pool_id=order.pool_id,
        engine=order.engine.value,
        launcher=order.launcher,
        model=order.model,
        model_path=order.model_path,
        model_digest=order.model_digest,
        ctx=order.ctx,
        slots=order.slots,
        allow_cpu=order.allow_cpu,
        devices=tuple(order.devices),
        tensor_split=tuple(order.tensor_split),
        port=order.port,
        threads=order.threads,
        binary=order.binary,
        arguments=tuple(order.arguments),
        command=tuple(order.command),
        environment=tuple(sorted(order.environment.items())),
        health_path=order.health_path,
        memory_limit_bytes=order.memory_limit_bytes,
        headroom=Headroom(headroom.vram_bytes, headroom.ram_bytes, headroom.kv_bytes_per_token),
        supervision=Supervision(
            supervision.start_s,
            supervision.unresponsive_s,
            supervision.stop_s,
            RestartPolicy(
                first_s=supervision.backoff_first_s,
                factor=supervision.backoff_factor,
                max_s=supervision.backoff_max_s,
                storm_failures=supervision.storm_failures,
                cool_down_s=supervision.cool_down_s,
                stable_s=supervision.stable_s,
            ),
        ),
        generation=order.generation,
    )
