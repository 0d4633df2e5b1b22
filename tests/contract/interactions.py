"""What an interaction of the pact between `llorch.client` and the service is made of: requests, replies, rules, keys.

Rules say what of an example counts; what has none must have the type of the example.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from llorch.client import ApiError, AsyncClient, NodeClient

if TYPE_CHECKING:
    from pact import Pact


def key(name: str) -> str:
    """A key of the service that the pact is verified against; its tenant is named there."""
    return "llk_" + name.ljust(43, "0")


KEY = key("pact-data-and-control-")
ADMIN_KEY = key("pact-admin-")
DATA_KEY = key("pact-data-only-")
UNKNOWN_KEY = key("pact-unknown-")
RIVAL_KEY = key("pact-rival-")
QUOTA_KEYS = {
    "max-queued": key("pact-max-queued-"), "rate": key("pact-rate-"), "tokens-per-minute": key("pact-metered-"),
    "max-concurrent": key("pact-concurrent-"),
}  # fmt: skip
"""By the limit that the key's tenant has."""

MODEL = "pact-model"
POOL = "pact"
PACED_MODEL = "pact-paced"
"""One slot, 5 ms for a token; its rates are known."""
WIDE_MODEL = "pact-wide"
"""Two slots."""
SPARE_MODEL, SPARE_POOL = "pact-spare", "pact-spare"
"""One slot; the pool is drained and comes back."""
REMOTE_MODEL, REMOTE_POOL = "pact-remote", "pact-remote"
"""Its replica is to run on NODE."""
NODE, OTHER_NODE = "pact-node", "pact-other-node"
NODE_TOKEN = "lln_" + "pact-node-".ljust(43, "0")

Rule = dict[str, Any]
State = tuple[str, dict[str, object]]


def any_of(*matchers: Rule) -> Rule:
    return {"combine": "OR", "matchers": list(matchers)}


def regex(pattern: str) -> Rule:
    return {"combine": "AND", "matchers": [{"match": "regex", "regex": pattern}]}


EXACT = any_of({"match": "equality"})
SAME_TYPE = any_of({"match": "type"})
INTEGER = any_of({"match": "integer"})
NUMBER = any_of({"match": "number"})
INTEGER_OR_NULL = any_of({"match": "null"}, {"match": "integer"})
TEXT_OR_NULL = any_of({"match": "null"}, {"match": "regex", "regex": ".*"})
ANYTHING = any_of({"match": "include", "value": ""})
UUID = regex("^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")
TIME = regex(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$")
TIME_OR_NULL = any_of({"match": "null"}, {"match": "regex", "regex": r"^\d{4}-\d{2}-\d{2}T.*Z$"})
CORRELATION_ID = regex("^[A-Za-z0-9._:-]{1,128}$")
DIGITS = regex(r"^\d+$")


@dataclass(frozen=True)
class Reply:
    status: int
    body: Any = None
    rules: dict[str, Rule] = field(default_factory=dict)
    """By JSON path; what has none must have the type of the example."""
    headers: dict[str, tuple[str, Rule]] = field(default_factory=dict)


@asynccontextmanager
async def as_client(url: str, key: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(url, key, patience_s=0, resumes=0) as client:
        yield client


@asynccontextmanager
async def as_node(url: str, token: str) -> AsyncIterator[NodeClient]:
    client = NodeClient(url, token)
    try:
        yield client
    finally:
        await client.aclose()


@dataclass(frozen=True)
class Interaction:
    name: str
    method: str
    path: str
    reply: Reply
    act: Callable[[Any], Awaitable[None]]
    """With the client that `connect` makes."""
    states: tuple[State, ...] = ()
    key: str = KEY
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    connect: Callable[[str, str], AbstractAsyncContextManager[Any]] = as_client

    def arrange(self, pact: "Pact") -> None:
        asked = pact.upon_receiving(self.name)
        for state, parameters in self.states:
            asked.given(state, parameters)
        asked.with_request(self.method, self.path)
        for name, value in {"Authorization": f"Bearer {self.key}", **self.headers}.items():
            asked.with_header(name, value)
        for name, value in self.query.items():
            asked.with_query_parameter(name, value)
        if self.body is not None:
            asked.with_body(self.body, content_type="application/json")
        self._reply(asked.will_respond_with(self.reply.status))

    def _reply(self, answer: Any) -> None:
        headers = {"X-Correlation-Id": ("req-1", CORRELATION_ID), **self.reply.headers}
        for name, (value, _) in headers.items():
            answer.with_header(name, value)
        rules: dict[str, dict[str, Rule]] = {"header": {name: rule for name, (_, rule) in headers.items()}}
        if isinstance(self.reply.body, str):
            # A matcher given as the body would be stored as literal text; the raw rule is what counts.
            answer.with_body(self.reply.body, content_type="text/event-stream")
            rules["body"] = self.reply.rules
        elif self.reply.body is not None:
            answer.with_body(self.reply.body, content_type="application/json")
            rules["body"] = {"$": SAME_TYPE, **self.reply.rules}
        answer.with_matching_rules(rules, "Response")


def refused(
    code: str,
    status: int,
    act: Callable[[Any], Awaitable[object]],
    *,
    advised_wait_s: float | None = None,
    policy: str | None = None,
) -> Callable[[Any], Any]:
    async def check(client: Any) -> None:
        with pytest.raises(ApiError) as told:
            await act(client)
        assert (told.value.status, told.value.code) == (status, code)
        assert told.value.advised_wait_s == advised_wait_s
        assert told.value.problem is not None
        assert told.value.problem.policy_label == policy

    return check


def returned(act: Callable[[Any], Awaitable[object]], **expected: object) -> Callable[[Any], Any]:
    async def check(client: Any) -> None:
        found = await act(client)
        assert {name: getattr(found, name) for name in expected} == expected

    return check


WAIT_MS = 1730
WAIT_HEADERS = {"Retry-After": ("2", DIGITS), "X-Backoff-Ms": (str(WAIT_MS), DIGITS)}


def problem(
    status: int,
    code: str,
    *,
    retriable: bool = False,
    policy: str | None = None,
    knows_wait: bool | None = None,
    details: Mapping[str, int | list[str]] | None = None,
    headers: dict[str, tuple[str, Rule]] | None = None,
) -> Reply:
    """A refusal. `knows_wait` None leaves open whether it tells when to come back; `details` are examples by name."""
    body: dict[str, Any] = {
        "code": code, "message": "for people", "engine": None, "pool_id": None, "retriable": retriable,
        "retry_after_ms": WAIT_MS if knows_wait else None, "policy_label": policy, "details": details,
        "correlation_id": "req-1",
    }  # fmt: skip
    waits = {None: INTEGER_OR_NULL, True: INTEGER, False: EXACT}
    rules = {
        "$.code": EXACT, "$.retriable": EXACT, "$.engine": TEXT_OR_NULL, "$.pool_id": TEXT_OR_NULL,
        "$.retry_after_ms": waits[knows_wait], "$.policy_label": TEXT_OR_NULL if policy is None else EXACT,
        "$.correlation_id": CORRELATION_ID, "$.details": ANYTHING if details is None else SAME_TYPE,
    }  # fmt: skip
    return Reply(status, body, rules, headers={**(WAIT_HEADERS if knows_wait else {}), **(headers or {})})
