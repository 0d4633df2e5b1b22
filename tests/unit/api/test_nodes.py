"""What managers tell and are told keeps its meaning over the wire (ORCH-2105, ORCH-2107, ORCH-3053)."""

import json
from enum import Enum
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from llorch.api.nodes import to_host, to_node, to_orders, to_registration, to_reports
from llorch.client.nodes import _host, _replica, _to_orders
from llorch.domain.backoff import Breaker, RestartPolicy
from llorch.errors import InvalidParams
from llorch.service.launching import (
    Cause,
    Gpu,
    Headroom,
    HostFacts,
    LastError,
    LaunchOrder,
    LaunchReport,
    Phase,
    Supervision,
)
from llorch.service.nodes import NodeProcess, NodeState, NodeView, Orders, RestartOrder
from llorch_contract import models

M = TypeVar("M", bound=BaseModel)

MOST = 2**53 - 1


def count(most: int = MOST) -> st.SearchStrategy[int]:
    return st.integers(0, most)


def seconds() -> st.SearchStrategy[float]:
    """Whole milliseconds, which is what the wire carries."""
    return st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


NAMES = st.from_regex(r"[a-z][a-z0-9]{0,9}/[0-9]\+?", fullmatch=True)
POOLS = st.from_regex(r"[a-z][a-z0-9]{0,9}", fullmatch=True)
WORDS = st.text(max_size=20)
CODES = st.sampled_from([code.value for code in models.ErrorCode])
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
ERRORS = st.builds(LastError, CODES, WORDS, seconds())
REPORTS = st.builds(
    LaunchReport,
    replica_id=NAMES,
    generation=count(),
    phase=st.sampled_from(Phase),
    incarnation=count(),
    pid=maybe(count()),
    url=maybe(st.just("http://10.0.0.7:40001")),
    api_key=maybe(WORDS),
    engine_version=maybe(st.just("b6500")),
    model_digest=maybe(DIGESTS),
    cause=maybe(st.sampled_from(Cause)),
    error=maybe(ERRORS),
    restarts=st.dictionaries(st.sampled_from(Cause), count()),
    breaker=st.sampled_from(Breaker),
    next_start_s=maybe(seconds()),
    load_s=maybe(seconds()),
)
RATIOS = st.floats(0, 1)
GPUS = st.builds(Gpu, count(), st.text(max_size=256), count(), count(), maybe(RATIOS), st.booleans())
HOSTS = st.builds(HostFacts, st.lists(GPUS, max_size=4).map(tuple), count(), count(), count())
TIMES = st.floats(0.1, 86400)
RESTARTS = st.builds(
    RestartPolicy,
    first_s=TIMES,
    factor=st.floats(1, 100),
    max_s=TIMES,
    storm_failures=st.integers(1, 100),
    cool_down_s=TIMES,
    stable_s=TIMES,
)
ORDERS = st.builds(
    LaunchOrder,
    replica_id=NAMES,
    pool_id=POOLS,
    engine=st.sampled_from([engine.value for engine in models.Engine]),
    launcher=st.sampled_from(["llamacpp", "llama-server", "command"]),
    model=st.just("smol"),
    model_path=maybe(WORDS),
    model_digest=maybe(DIGESTS),
    ctx=st.integers(1, 1_000_000),
    slots=st.integers(1, 256),
    allow_cpu=st.booleans(),
    devices=st.lists(count(63), max_size=4).map(tuple),
    tensor_split=st.lists(RATIOS, max_size=4).map(tuple),
    port=count(65535),
    threads=maybe(count()),
    binary=maybe(WORDS),
    arguments=st.lists(WORDS, max_size=4).map(tuple),
    command=st.lists(WORDS, max_size=4).map(tuple),
    environment=st.dictionaries(WORDS, WORDS, max_size=4).map(lambda values: tuple(sorted(values.items()))),
    health_path=WORDS,
    memory_limit_bytes=maybe(count()),
    headroom=st.builds(Headroom, count(), count(), maybe(count())),
    supervision=st.builds(Supervision, TIMES, TIMES, TIMES, RESTARTS),
    generation=count(),
)
RESTART_ORDERS = st.builds(RestartOrder, NAMES, count(), st.sampled_from(Cause))
ALL_ORDERS = st.builds(
    Orders,
    lease_id=st.uuids().map(str),
    lease_s=seconds(),
    heartbeat_s=seconds(),
    wanted=st.lists(ORDERS, max_size=3).map(tuple),
    restarts=st.lists(RESTART_ORDERS, max_size=3).map(tuple),
)


def over_the_wire(model: M) -> M:
    """As the other side reads it."""
    return type(model).model_validate_json(model.model_dump_json())


def whole(report: dict[str, Any]) -> models.NodeReplica:
    """A report with every field that the contract asks for, `report` over what they usually are."""
    usual = dict.fromkeys(models.NodeReplica.model_fields) | {
        "replica_id": "small/0", "generation": 0, "phase": "up", "incarnation": 1, "restarts": {}, "breaker": "closed",
    }  # fmt: skip
    return models.NodeReplica.model_validate_json(json.dumps(usual | report))


@given(REPORTS)
def test_report_of_a_manager_arrives_as_it_was_told(report: LaunchReport) -> None:
    """ORCH-2107."""
    assert to_reports([over_the_wire(_replica(report))]) == (report,)


@given(HOSTS)
def test_host_of_a_manager_arrives_as_it_was_told(host: HostFacts) -> None:
    """ORCH-2107, ORCH-3053."""
    assert to_host(over_the_wire(_host(host))) == host


@given(ALL_ORDERS)
def test_orders_arrive_as_they_were_given(orders: Orders) -> None:
    """ORCH-2105, ORCH-2107."""
    assert _to_orders(over_the_wire(to_orders(orders))) == orders


def test_order_is_shown_in_full() -> None:
    """ORCH-2107: every field of the order and of its supervision, under the name of the contract."""
    policy = RestartPolicy(first_s=1, factor=4, max_s=60, storm_failures=4, cool_down_s=120, stable_s=60)
    order = LaunchOrder(
        "small/0", "small", "llamacpp", "command", "smol", "/models/a.gguf", None, 2048, 2,
        devices=(1, 0), tensor_split=(0.75, 0.25), command=("engine", "{port}"), environment=(("A", "b"),),
        headroom=Headroom(1, 2, 3), supervision=Supervision(300, 15, 10, policy), generation=7,
    )  # fmt: skip
    [shown] = to_orders(Orders("l", 10, 2, (order,), ())).wanted
    assert (shown.replica_id, shown.launcher, shown.model_path, shown.generation) == (
        "small/0",
        "command",
        "/models/a.gguf",
        7,
    )
    assert (shown.devices, shown.tensor_split) == ([1, 0], [0.75, 0.25])
    assert (shown.command, shown.environment) == (["engine", "{port}"], {"A": "b"})
    assert shown.headroom == models.OrderHeadroom(vram_bytes=1, ram_bytes=2, kv_bytes_per_token=3)
    assert shown.supervision == models.OrderSupervision(
        start_s=300, unresponsive_s=15, stop_s=10, backoff_first_s=1, backoff_factor=4, backoff_max_s=60,
        storm_failures=4, cool_down_s=120, stable_s=60,
    )  # fmt: skip


def test_registration_tells_who_joins() -> None:
    """ORCH-2105, ORCH-2109."""
    body = models.NodeRegistration(
        boot_id="boot-1",
        manager_version="1.2.3",
        address="10.0.0.7",
        host=_host(HostFacts(ram_total_bytes=9)),
        replicas=[_replica(LaunchReport("small/0", 4, Phase.UP))],
    )
    registration = to_registration("gpu-host", over_the_wire(body))
    assert (registration.node_id, registration.boot_id, registration.manager_version, registration.address) == (
        "gpu-host",
        "boot-1",
        "1.2.3",
        "10.0.0.7",
    )
    assert (registration.host.ram_total_bytes, registration.reports) == (9, (LaunchReport("small/0", 4, Phase.UP),))


def test_restarts_for_a_cause_that_is_none_are_refused_with_the_causes() -> None:
    """ORCH-2107: names of a map are not in the schema."""
    with pytest.raises(InvalidParams, match="'boredom'") as caught:
        to_reports([whole({"restarts": {"boredom": 1}})])
    assert caught.value.details == {"choices": [cause.value for cause in Cause]}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Phase, models.ProcessPhase),
        (Cause, models.FailureCause),
        (Breaker, models.Breaker),
        (NodeState, models.NodeState),
    ],
)
def test_words_are_those_of_the_contract(ours: type[Enum], theirs: type[Enum]) -> None:
    """ORCH-2103, ORCH-2105."""
    assert {each.value for each in ours} == {each.value for each in theirs}


@given(HOSTS, st.floats(-5, 1000))
def test_node_is_shown_as_it_is_and_its_lease_never_below_nothing(host: HostFacts, remaining_s: float) -> None:
    """ORCH-2105."""
    process = NodeProcess("small/0", Phase.LOADING, 2)
    view = NodeView("n", NodeState.SILENT, 5.0, "b", "1.0.0", "10.0.0.7", remaining_s, host, (process,))
    shown = over_the_wire(to_node(view))
    assert (shown.node_id, shown.state, shown.since) == ("n", "silent", "1970-01-01T00:00:05.000Z")
    assert (shown.manager_version, shown.address) == ("1.0.0", "10.0.0.7")
    assert shown.lease_remaining_ms == max(0, round(remaining_s * 1000))
    assert shown.host is not None
    assert to_host(shown.host) == host
    assert [(p.replica_id, p.phase, p.incarnation) for p in shown.replicas] == [("small/0", "loading", 2)]


def test_node_that_never_came_shows_nothing_but_its_name() -> None:
    """ORCH-2105."""
    shown = to_node(NodeView("n", NodeState.ABSENT, None, None, None, None, None, None, ()))
    told = json.loads(shown.model_dump_json())
    assert told == dict.fromkeys(models.Node.model_fields) | {"node_id": "n", "state": "absent", "replicas": []}
