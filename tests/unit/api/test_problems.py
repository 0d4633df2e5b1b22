"""The status and headers of an error; nothing but the one envelope leaves (ORCH-2006, ORCH-2007, ORCH-2045)."""

import inspect

import httpx
import pytest
import structlog
from connexion.exceptions import ProblemException
from starlette.exceptions import HTTPException

from llorch import errors
from llorch.api.problems import STATUS, headers_of, status_of, to_error
from llorch.domain.task import InvalidTransition
from llorch_contract import models
from llorch_contract.routes import ROUTES
from tests.unit.api.conftest import Client
from tests.unit.api.fakes import NODE, TASK

PATHS = sorted({route.path for route in ROUTES})


def concrete(path: str) -> str:
    return path.format(task_id=TASK, session_id=TASK, pool_id="small", node_id=NODE)


def envelope(response: httpx.Response) -> models.Problem:
    """The body, checked strictly against the contract."""
    assert response.headers["content-type"] == "application/json"
    problem = models.Problem.model_validate_json(response.content)
    assert problem.correlation_id == response.headers["x-correlation-id"]
    return problem


def test_every_error_class_has_a_status_of_its_own() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LlorchError)]
    assert set(classes) == set(STATUS)


def test_every_error_code_is_in_the_contract() -> None:
    assert {kind.code for kind in STATUS} <= {code.value for code in models.ErrorCode}


def test_statuses_are_those_of_the_spec() -> None:
    statuses: dict[int, set[type[errors.LlorchError]]] = {
        400: {errors.SchemaFault},
        401: {errors.Unauthenticated},
        403: {errors.Forbidden},
        404: {errors.NotFound},
        405: {errors.MethodNotAllowed},
        409: {errors.Conflict, errors.Canceled},
        410: {errors.StreamGone},
        413: {errors.PayloadTooLarge},
        415: {errors.UnsupportedMediaType},
        422: {errors.InvalidParams, errors.DeadlineUnmet, errors.UntrustedArtifact},
        429: {
            errors.AdmissionReject,
            errors.QueueFullDropLru,
            errors.QuotaExceeded,
            errors.BudgetExhausted,
            errors.BudgetTooSmall,
        },
        500: {
            errors.LlorchError,
            errors.Internal,
            errors.ConfigError,
            errors.LaunchError,
            errors.DeterminismViolation,
        },
        503: {
            errors.PoolUnready,
            errors.PoolUnavailable,
            errors.ReplicaExhausted,
            errors.WorkerReset,
            errors.DecodeTimeout,
        },
    }
    assert {kind: status for status, kinds in statuses.items() for kind in kinds} == STATUS


def test_subclass_has_the_status_of_the_nearest_class_above() -> None:
    assert status_of(InvalidTransition()) == 500


@pytest.mark.parametrize(("retry_after_ms", "seconds"), [(0, b"0"), (1, b"1"), (1000, b"1"), (1001, b"2")])
def test_known_wait_is_told_in_whole_seconds_rounded_up(retry_after_ms: int, seconds: bytes) -> None:
    headers = dict(headers_of(errors.AdmissionReject(retry_after_ms=retry_after_ms)))
    assert headers == {b"retry-after": seconds, b"x-backoff-ms": str(retry_after_ms).encode()}


def test_unknown_wait_has_no_headers_peer_bug_26() -> None:
    assert headers_of(errors.AdmissionReject()) == []


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ProblemException(status=400, detail="x" * 999), errors.SchemaFault),
        (ProblemException(status=401), errors.Unauthenticated),
        (ProblemException(status=415), errors.UnsupportedMediaType),
        (ProblemException(status=500, detail="secret"), errors.Internal),
        (HTTPException(404), errors.NotFound),
        (HTTPException(405, headers={"Allow": "GET, POST"}), errors.MethodNotAllowed),
        (HTTPException(413), errors.PayloadTooLarge),
        (HTTPException(418, "secret"), errors.Internal),
        (KeyError("secret"), errors.Internal),
        (errors.ConfigError("secret"), errors.Internal),
        (InvalidTransition("secret"), errors.Internal),
        (errors.Conflict("taken"), errors.Conflict),
    ],
)
def test_foreign_exceptions_become_errors_that_tell_no_secret(
    raised: Exception, kind: type[errors.LlorchError]
) -> None:
    error = to_error(raised)
    assert type(error) is kind
    assert "secret" not in error.message


def test_allow_of_the_framework_is_kept() -> None:
    error = to_error(HTTPException(405, headers={"Allow": "GET, POST"}))
    assert dict(headers_of(error)) == {b"allow": b"GET, POST"}


async def test_wrong_method_lists_every_method_of_the_path(client: Client) -> None:
    for path in PATHS:
        methods = sorted(route.method for route in ROUTES if route.path == path)
        for method in {"HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"}.difference(methods):
            response = await client.request(method, concrete(path))
            assert (response.status_code, response.headers["allow"]) == (405, ", ".join(methods)), (method, path)
            if method != "HEAD":
                assert envelope(response).code == models.ErrorCode.INVALID_PARAMS


async def test_unknown_path_is_not_found_and_never_redirected(client: Client) -> None:
    for path in ("/", "/v1", "/v1/tasks/", "/v1/nope", f"/v1/tasks/{TASK}/", "/openapi.json", "/v1/ui/", "//v1/tasks"):
        response = await client.get(path)
        assert response.status_code == 404, path
        assert envelope(response).code == models.ErrorCode.NOT_FOUND


async def test_unforeseen_failure_shows_nothing_and_is_logged_with_the_correlation_id(client: Client) -> None:
    client.edge.tasks.failure = RuntimeError("/etc/passwd secret")
    with structlog.testing.capture_logs() as logs:
        response = await client.get(f"/v1/tasks/{TASK}", headers={"X-Correlation-Id": "req-7"})
    assert response.status_code == 500
    assert envelope(response).code == models.ErrorCode.INTERNAL
    assert "secret" not in response.text
    assert [(line["event"], line["correlation_id"]) for line in logs] == [("request_failed", "req-7")]


async def test_foreseen_failure_is_told_in_full(client: Client) -> None:
    client.edge.tasks.failure = errors.AdmissionReject(
        "full", engine="llamacpp", pool_id="small", retry_after_ms=1730, policy_label="reject"
    )
    response = await client.post("/v1/tasks", json={"model_ref": "smol", "prompt": "x"})
    problem = envelope(response)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-backoff-ms"] == "1730"
    assert (problem.code, problem.engine, problem.pool_id) == ("ADMISSION_REJECT", "llamacpp", "small")
    assert (problem.retriable, problem.retry_after_ms, problem.policy_label) == (True, 1730, "reject")


async def test_message_is_never_longer_than_the_contract_allows(client: Client) -> None:
    client.edge.tasks.failure = errors.InvalidParams("x" * 10_000)
    response = await client.post("/v1/tasks", json={"model_ref": "smol", "prompt": "x"})
    assert response.status_code == 422
    assert len(envelope(response).message) == 4096
