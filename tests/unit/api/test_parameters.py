"""Path, query and header parameters hold to their schemas (ORCH-2046)."""

import pytest

from llorch.api.parameters import Parameters, compile_schema
from llorch.errors import SchemaFault
from llorch_contract.routes import ROUTES, Parameter
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import SESSION, TASK

LIST = Parameters(next(route for route in ROUTES if route.operation_id == "list_tasks").parameters)
LEAVE = Parameters(next(route for route in ROUTES if route.operation_id == "leave_node").parameters)
STREAM = Parameters(next(route for route in ROUTES if route.operation_id == "stream_task").parameters)


def test_absent_parameters_have_their_defaults() -> None:
    assert LIST.read({}, b"", {}) == {"state": None, "session_id": None, "limit": 50, "cursor": None}


def test_parameter_that_is_needed_has_to_be_given() -> None:
    """ORCH-2046."""
    assert LEAVE.read({"node_id": "n"}, b"lease_id=a-1", {}) == {"node_id": "n", "lease_id": "a-1"}
    with pytest.raises(SchemaFault) as caught:
        LEAVE.read({"node_id": "n"}, b"", {})
    assert caught.value.details == {"path": "/lease_id", "reason": "is required"}


def test_given_parameters_have_their_types() -> None:
    query = f"state=running&limit=7&cursor=AA_-&session_id={SESSION.upper()}".encode()
    assert LIST.read({}, query, {}) == {"state": "running", "session_id": SESSION, "limit": 7, "cursor": "AA_-"}


@pytest.mark.parametrize(
    "query",
    [
        b"limit=0",
        b"limit=201",
        b"limit=",
        b"limit=1.0",
        b"limit=%2B1",
        b"limit=1_0",
        b"limit=+1",
        b"limit=\xd9\xa1",
        b"limit=%D9%A1",
        b"limit=" + b"9" * 30,
        b"limit=1&limit=2",
        b"state=done",
        b"state=running%0A",
        b"cursor=",
        b"cursor=a%0A",
        b"cursor=" + b"a" * 129,
        b"session_id=x",
        b"session_id=%7B" + SESSION.encode() + b"%7D",
        b"session_id=" + SESSION.replace("-", "").encode(),
        b"unknown=1",
        b"Limit=1",
        b"unknown",
        b"cursor=%FF",
        b"&".join([b"limit=1"] * 100),
    ],
)
def test_query_outside_the_contract_is_a_schema_fault(query: bytes) -> None:
    with pytest.raises(SchemaFault):
        LIST.read({}, query, {})


@pytest.mark.parametrize("spelling", [TASK, TASK.upper(), TASK.title()])
def test_every_spelling_of_a_uuid_is_the_same(spelling: str) -> None:
    assert STREAM.read({"task_id": spelling}, b"", {})["task_id"] == TASK


@pytest.mark.parametrize("value", ["0", "1", "17", "999999999999999"])
def test_last_event_id_is_a_count(value: str) -> None:
    arguments = STREAM.read({"task_id": TASK}, b"", {b"last-event-id": value.encode()})
    assert arguments["last_event_id"] == value


@pytest.mark.parametrize("value", ["", "-1", "01", "1 ", "1.0", "x", "1" * 16, "\u00b2"])
def test_malformed_last_event_id_is_a_schema_fault(value: str) -> None:
    with pytest.raises(SchemaFault) as caught:
        STREAM.read({"task_id": TASK}, b"", {b"last-event-id": value.encode("latin-1")})
    assert caught.value.details is not None
    assert caught.value.details["path"] == "/Last-Event-ID"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "const": "x"},
        {"type": "string", "format": "email"},
        {"type": "integer", "minimum": 0, "maximum": 9, "multipleOf": 3},
        {"type": "array", "items": {"type": "string"}},
        {},
    ],
)
def test_schema_word_that_is_not_understood_fails_the_start(schema: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not understood"):
        compile_schema("p", schema)


def test_every_parameter_of_the_contract_compiles() -> None:
    parameters: list[Parameter] = [p for route in ROUTES for p in route.parameters]
    assert len(parameters) > len(ROUTES)
    for parameter in parameters:
        compile_schema(parameter.name, parameter.schema)


async def test_faults_in_parameters_are_400_with_their_place(client: Client) -> None:
    for path, place in (
        ("/v1/tasks?limit=x", "/limit"),
        ("/v1/tasks?colour=red", "/colour"),
        ("/v1/tasks/not-a-uuid", "/task_id"),
        ("/v1/sessions/not-a-uuid", "/session_id"),
        ("/v1/pools/-bad/health", "/pool_id"),
        ("/healthz?x=1", "/x"),
    ):
        response = await client.get(path)
        assert (response.status_code, response.json()["details"]["path"]) == (400, place), path
