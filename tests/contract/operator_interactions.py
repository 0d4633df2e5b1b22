"""What operators and pool managers ask: drain, reload, the configuration, and nodes.

A lease has an id that the server draws, and a pact can only send what it has written down: that a lease is renewed and
given back stands in `test_node_client.py`.
"""

from typing import Any

from llorch import __version__
from llorch.service.launching import HostFacts
from llorch.service.nodes import Registration
from tests.contract.interactions import (
    ADMIN_KEY,
    ANYTHING,
    DATA_KEY,
    EXACT,
    INTEGER,
    INTEGER_OR_NULL,
    KEY,
    NODE,
    NODE_TOKEN,
    OTHER_NODE,
    REMOTE_MODEL,
    REMOTE_POOL,
    SPARE_MODEL,
    SPARE_POOL,
    TEXT_OR_NULL,
    TIME,
    TIME_OR_NULL,
    UNKNOWN_KEY,
    UUID,
    Interaction,
    Reply,
    State,
    any_of,
    as_node,
    problem,
    refused,
    regex,
    returned,
)

WHOLE: State = ("a pool that nobody changes", {"pool_id": SPARE_POOL})
CHANGING: State = ("a pool whose drain waits for a task", {"pool_id": SPARE_POOL, "model_ref": SPARE_MODEL})
UNCHANGED: State = ("the configuration of the start, and none before it", {})
CHANGED: State = ("a configuration that was changed", {"pool_id": SPARE_POOL})
BROKEN: State = ("a configuration file that cannot be used", {})
RESTARTED: State = ("a configuration file that changes what needs a restart", {})
FREE: State = ("a node that nobody holds", {"node_id": NODE})
HELD: State = ("a node that another pool manager holds", {"node_id": NODE})

CHANGE_STATE = regex("^(running|done)$")
CHANGE: dict[str, Any] = {
    "kind": "drain", "state": "running", "started_at": "2025-11-23T04:25:00.123Z", "deadline_at": None,
    "ended_at": None, "replicas_total": 1, "replicas_done": 0, "running": 0, "queued": 0, "moved": 0, "ready_ms": None,
    "message": None,
}  # fmt: skip
CHANGE_RULES = {
    "$.kind": EXACT, "$.state": CHANGE_STATE, "$.started_at": TIME, "$.deadline_at": TIME_OR_NULL,
    "$.ended_at": TIME_OR_NULL, "$.ready_ms": INTEGER_OR_NULL, "$.message": TEXT_OR_NULL,
}  # fmt: skip
CONFIG = {"revision": 1, "loaded_at": "2025-11-23T04:25:00.123Z", "can_revert": False, "change": None}
CONFIG_RULES = {"$.revision": INTEGER, "$.loaded_at": TIME, "$.change": ANYTHING}
CONFIG_CHANGE: dict[str, Any] = {
    "state": "running", "started_at": "2025-11-23T04:25:00.123Z", "ended_at": None, "changed": [], "message": None,
}  # fmt: skip
CONFIG_CHANGE_RULES = {
    "$.revision": INTEGER, "$.loaded_at": TIME, "$.change.state": CHANGE_STATE, "$.change.started_at": TIME,
    "$.change.ended_at": TIME_OR_NULL, "$.change.message": TEXT_OR_NULL, "$.change.changed": ANYTHING,
}  # fmt: skip

HOST = {"gpus": [], "ram_total_bytes": 2**34, "ram_available_bytes": 2**33, "driver_resets": 0}
FACTS = HostFacts(ram_total_bytes=2**34, ram_available_bytes=2**33)
OVER_LEASE = "00000000-0000-4000-8000-0000000000f1"


def registration(node_id: str = NODE, version: str = __version__) -> Registration:
    return Registration(node_id, "pact-boot", version, "127.0.0.1", FACTS)


def joins(version: str = __version__) -> dict[str, Any]:
    return {
        "boot_id": "pact-boot",
        "manager_version": version,
        "address": "127.0.0.1",
        "host": HOST,
        "replicas": [],
    }


ORDERS: dict[str, Any] = {
    "lease_id": OVER_LEASE, "lease_ms": 10000, "heartbeat_ms": 2000, "restarts": [],
    "wanted": [{
        "replica_id": f"{REMOTE_POOL}/0", "pool_id": REMOTE_POOL, "engine": "llamacpp", "launcher": "command",
        "model": REMOTE_MODEL, "model_path": None, "model_digest": None, "ctx": 2048, "slots": 1, "allow_cpu": True,
        "devices": [], "tensor_split": [], "port": 0, "threads": None, "binary": None, "arguments": [],
        "command": ["engine"], "environment": {}, "health_path": "/health", "memory_limit_bytes": None,
        "headroom": {"vram_bytes": 536870912, "ram_bytes": 536870912, "kv_bytes_per_token": None},
        "supervision": {
            "start_s": 300.5, "unresponsive_s": 15.5, "stop_s": 10.5, "backoff_first_s": 1.5, "backoff_factor": 4.5,
            "backoff_max_s": 60.5, "storm_failures": 4, "cool_down_s": 120.5, "stable_s": 60.5,
        },
        "generation": 0,
    }],
}  # fmt: skip
NUMBERS = any_of({"match": "number"})
ORDER_RULES = {
    "$.lease_id": UUID, "$.lease_ms": INTEGER, "$.heartbeat_ms": INTEGER,
    "$.wanted[0].replica_id": EXACT, "$.wanted[0].pool_id": EXACT, "$.wanted[0].model": EXACT,
    "$.wanted[0].command": EXACT, "$.wanted[0].generation": INTEGER,
    **{f"$.wanted[0].supervision.{name}": NUMBERS for name in ORDERS["wanted"][0]["supervision"]},
}  # fmt: skip
NODE_BODY: dict[str, Any] = {
    "node_id": NODE, "state": "absent", "since": None, "manager_version": None, "address": None,
    "lease_remaining_ms": None, "host": None, "replicas": [],
}  # fmt: skip
SPARE = f"/v1/pools/{SPARE_POOL}"


def _changes(kind: str) -> list[Interaction]:
    """The same of a drain and of a reload."""

    def ask(client: Any, pool_id: str = SPARE_POOL, deadline_ms: int | None = None) -> Any:
        return getattr(client, f"{kind}_pool")(pool_id, deadline_ms)

    reply = Reply(202, {**CHANGE, "kind": kind}, CHANGE_RULES)
    path = f"{SPARE}/{kind}"
    return [
        Interaction(
            f"the {kind} of a pool by its own deadline", "POST", path, reply, states=(WHOLE,), key=ADMIN_KEY, body={},
            act=returned(ask, kind=kind),
        ),
        Interaction(
            f"the {kind} of a pool by a deadline", "POST", path, reply, states=(WHOLE,), key=ADMIN_KEY,
            body={"deadline_ms": 30000}, act=returned(lambda client: ask(client, SPARE_POOL, 30000), kind=kind),
        ),
        Interaction(
            f"the {kind} of a pool by a deadline of more than a day", "POST", path, problem(400, "INVALID_PARAMS"),
            key=ADMIN_KEY, body={"deadline_ms": 86_400_001},
            act=refused("INVALID_PARAMS", 400, lambda client: ask(client, SPARE_POOL, 86_400_001)),
        ),
        Interaction(
            f"the {kind} of a pool that is not configured", "POST", f"/v1/pools/no-such-pool/{kind}",
            problem(404, "NOT_FOUND"), key=ADMIN_KEY, body={},
            act=refused("NOT_FOUND", 404, lambda client: ask(client, "no-such-pool")),
        ),
        Interaction(
            f"the {kind} of a pool while another change is under way", "POST", path, problem(409, "CONFLICT"),
            states=(CHANGING,), key=ADMIN_KEY, body={}, act=refused("CONFLICT", 409, ask),
        ),
        Interaction(
            f"the {kind} of a pool, with a key that may only look", "POST", path, problem(403, "FORBIDDEN"), key=KEY,
            body={}, act=refused("FORBIDDEN", 403, ask),
        ),
    ]  # fmt: skip


OPERATOR_INTERACTIONS = [
    Interaction(
        "the configuration in force", "GET", "/v1/config", Reply(200, CONFIG, CONFIG_RULES),
        act=returned(lambda client: client.get_config(), revision=1),
    ),
    Interaction(
        "the configuration in force, with a key for tasks only", "GET", "/v1/config", problem(403, "FORBIDDEN"),
        key=DATA_KEY, act=refused("FORBIDDEN", 403, lambda client: client.get_config()),
    ),
    Interaction(
        "a way back when there is no previous configuration", "POST", "/v1/config/revert",
        problem(422, "INVALID_PARAMS"), states=(UNCHANGED,), key=ADMIN_KEY,
        act=refused("INVALID_PARAMS", 422, lambda client: client.revert_config()),
    ),
    Interaction(
        "the configuration file as it is now", "POST", "/v1/config/reload",
        Reply(202, {**CONFIG, "change": CONFIG_CHANGE}, CONFIG_CHANGE_RULES), states=(UNCHANGED,), key=ADMIN_KEY,
        act=returned(lambda client: client.reload_config(), revision=1),
    ),
    Interaction(
        "a configuration file that cannot be used", "POST", "/v1/config/reload", problem(422, "INVALID_PARAMS"),
        states=(BROKEN,), key=ADMIN_KEY,
        act=refused("INVALID_PARAMS", 422, lambda client: client.reload_config()),
    ),
    Interaction(
        "a configuration file that changes what needs a restart", "POST", "/v1/config/reload",
        problem(422, "INVALID_PARAMS", details={"needs_restart": ["streams.heartbeat_s"]}),
        states=(RESTARTED,), key=ADMIN_KEY,
        act=refused("INVALID_PARAMS", 422, lambda client: client.reload_config()),
    ),
    Interaction(
        "the configuration file while a pool is changed", "POST", "/v1/config/reload", problem(409, "CONFLICT"),
        states=(CHANGING,), key=ADMIN_KEY, act=refused("CONFLICT", 409, lambda client: client.reload_config()),
    ),
    Interaction(
        "the configuration file, with a key that may only look", "POST", "/v1/config/reload",
        problem(403, "FORBIDDEN"), act=refused("FORBIDDEN", 403, lambda client: client.reload_config()),
    ),
    Interaction(
        "the way back to the previous configuration", "POST", "/v1/config/revert",
        Reply(202, {**CONFIG, "can_revert": True, "change": CONFIG_CHANGE}, CONFIG_CHANGE_RULES), states=(CHANGED,),
        key=ADMIN_KEY, act=returned(lambda client: client.revert_config(), can_revert=True),
    ),
    Interaction(
        "the way back while a pool is changed", "POST", "/v1/config/revert", problem(409, "CONFLICT"),
        states=(CHANGING,), key=ADMIN_KEY, act=refused("CONFLICT", 409, lambda client: client.revert_config()),
    ),
    Interaction(
        "the way back, with a key that may only look", "POST", "/v1/config/revert", problem(403, "FORBIDDEN"),
        act=refused("FORBIDDEN", 403, lambda client: client.revert_config()),
    ),
    *_changes("drain"),
    *_changes("reload"),
    Interaction(
        "the nodes", "GET", "/v1/nodes",
        Reply(200, {"nodes": [NODE_BODY]}, {
            "$.nodes[0].node_id": EXACT, "$.nodes[0].state": EXACT, "$.nodes[0].since": TIME_OR_NULL,
            "$.nodes[0].manager_version": TEXT_OR_NULL, "$.nodes[0].address": TEXT_OR_NULL,
            "$.nodes[0].lease_remaining_ms": INTEGER_OR_NULL, "$.nodes[0].host": ANYTHING,
            "$.nodes[0].replicas": ANYTHING,
        }),
        states=(FREE,), act=returned(lambda client: client.list_nodes()),
    ),
    Interaction(
        "the nodes, with a key for tasks only", "GET", "/v1/nodes", problem(403, "FORBIDDEN"), key=DATA_KEY,
        act=refused("FORBIDDEN", 403, lambda client: client.list_nodes()),
    ),
    Interaction(
        "a pool manager that joins", "PUT", f"/v1/nodes/{NODE}", Reply(200, ORDERS, ORDER_RULES), states=(FREE,),
        key=NODE_TOKEN, connect=as_node, body=joins(),
        act=returned(lambda client: client.register(registration()), lease_id=OVER_LEASE, lease_s=10.0),
    ),
    Interaction(
        "a pool manager that joins while another holds the node", "PUT", f"/v1/nodes/{NODE}",
        problem(409, "CONFLICT"), states=(HELD,), key=NODE_TOKEN, connect=as_node, body=joins(),
        act=refused("CONFLICT", 409, lambda client: client.register(registration())),
    ),
    Interaction(
        "a pool manager of another version", "PUT", f"/v1/nodes/{NODE}", problem(422, "INVALID_PARAMS"),
        states=(FREE,), key=NODE_TOKEN, connect=as_node, body=joins("999.0.0"),
        act=refused("INVALID_PARAMS", 422, lambda client: client.register(registration(version="999.0.0"))),
    ),
    Interaction(
        "a pool manager that joins as another node than its own", "PUT", f"/v1/nodes/{OTHER_NODE}",
        problem(403, "FORBIDDEN"), key=NODE_TOKEN, connect=as_node, body=joins(),
        act=refused("FORBIDDEN", 403, lambda client: client.register(registration(OTHER_NODE))),
    ),
    Interaction(
        "a pool manager that joins with a token that nobody knows", "PUT", f"/v1/nodes/{NODE}",
        problem(401, "UNAUTHENTICATED", headers={"WWW-Authenticate": ('Bearer realm="llorch"', regex("^Bearer.*$"))}),
        key=UNKNOWN_KEY, connect=as_node, body=joins(),
        act=refused("UNAUTHENTICATED", 401, lambda client: client.register(registration())),
    ),
    Interaction(
        "a pool manager that joins with the key of an operator", "PUT", f"/v1/nodes/{NODE}",
        problem(403, "FORBIDDEN"), key=ADMIN_KEY, connect=as_node, body=joins(),
        act=refused("FORBIDDEN", 403, lambda client: client.register(registration())),
    ),
    Interaction(
        "a heartbeat of a lease that is over", "POST", f"/v1/nodes/{NODE}/heartbeat", problem(409, "CONFLICT"),
        states=(FREE,), key=NODE_TOKEN, connect=as_node, body={"lease_id": OVER_LEASE, "host": HOST, "replicas": []},
        act=refused("CONFLICT", 409, lambda client: client.renew(NODE, OVER_LEASE, host=FACTS, reports=())),
    ),
    Interaction(
        "a heartbeat of another node than its own", "POST", f"/v1/nodes/{OTHER_NODE}/heartbeat",
        problem(403, "FORBIDDEN"), key=NODE_TOKEN, connect=as_node,
        body={"lease_id": OVER_LEASE, "host": HOST, "replicas": []},
        act=refused("FORBIDDEN", 403, lambda client: client.renew(OTHER_NODE, OVER_LEASE, host=FACTS, reports=())),
    ),
    Interaction(
        "a pool manager that leaves as another node than its own", "DELETE", f"/v1/nodes/{OTHER_NODE}",
        problem(403, "FORBIDDEN"), key=NODE_TOKEN, connect=as_node, query={"lease_id": OVER_LEASE},
        act=refused("FORBIDDEN", 403, lambda client: client.leave(OTHER_NODE, OVER_LEASE)),
    ),
    Interaction(
        "a pool manager that leaves with a lease that is over", "DELETE", f"/v1/nodes/{NODE}",
        problem(409, "CONFLICT"), states=(FREE,), key=NODE_TOKEN, connect=as_node, query={"lease_id": OVER_LEASE},
        act=refused("CONFLICT", 409, lambda client: client.leave(NODE, OVER_LEASE)),
    ),
]  # fmt: skip
