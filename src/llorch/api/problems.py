"""Errors as HTTP: the only place that knows which status an error has and which headers go with it.

Every error of every layer leaves in the one envelope. What was not foreseen is INTERNAL, logged, and shows nothing.
"""

from http import HTTPStatus

import msgspec
import structlog
from connexion.exceptions import ProblemException
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llorch import errors
from llorch.api.correlation import new_correlation_id
from llorch.api.exchange import Exchange, Header, exchange_of
from llorch.errors import LlorchError
from llorch.service.frames import problem

STATUS: dict[type[LlorchError], HTTPStatus] = {
    errors.LlorchError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.Internal: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ConfigError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.LaunchError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.SchemaFault: HTTPStatus.BAD_REQUEST,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.Canceled: HTTPStatus.CONFLICT,
    errors.StreamGone: HTTPStatus.GONE,
    errors.PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.InvalidParams: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.DeadlineUnmet: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UntrustedArtifact: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.AdmissionReject: HTTPStatus.TOO_MANY_REQUESTS,
    errors.QueueFullDropLru: HTTPStatus.TOO_MANY_REQUESTS,
    errors.QuotaExceeded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.BudgetExhausted: HTTPStatus.TOO_MANY_REQUESTS,
    errors.BudgetTooSmall: HTTPStatus.TOO_MANY_REQUESTS,
    errors.PoolUnready: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.PoolUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ReplicaExhausted: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.WorkerReset: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DecodeTimeout: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DeterminismViolation: HTTPStatus.INTERNAL_SERVER_ERROR,
}

_FROM_FRAMEWORK: dict[int, type[LlorchError]] = {
    HTTPStatus.BAD_REQUEST: errors.SchemaFault,
    HTTPStatus.UNAUTHORIZED: errors.Unauthenticated,
    HTTPStatus.FORBIDDEN: errors.Forbidden,
    HTTPStatus.NOT_FOUND: errors.NotFound,
    HTTPStatus.METHOD_NOT_ALLOWED: errors.MethodNotAllowed,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: errors.PayloadTooLarge,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: errors.UnsupportedMediaType,
}

_MAX_MESSAGE = 4096

_log = structlog.get_logger("llorch.api")


def status_of(error: LlorchError) -> HTTPStatus:
    """The status of an error: that of its class, or of the nearest class above."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def to_error(exc: Exception) -> LlorchError:
    """What the envelope says of an exception. Nothing of an unforeseen one's text gets out."""
    if isinstance(exc, LlorchError):
        return errors.Internal() if status_of(exc) is HTTPStatus.INTERNAL_SERVER_ERROR else exc
    if isinstance(exc, ProblemException):
        return _FROM_FRAMEWORK.get(exc.status, errors.Internal)()
    if isinstance(exc, HTTPException):
        return _FROM_FRAMEWORK.get(exc.status_code, errors.Internal)(details=_allowed(exc))
    return errors.Internal()


def headers_of(error: LlorchError) -> list[Header]:
    """The headers that belong to an error; what is not known is absent."""
    headers: list[Header] = []
    if error.retry_after_ms is not None:
        headers.append((b"retry-after", b"%d" % -(-error.retry_after_ms // 1000)))
        headers.append((b"x-backoff-ms", b"%d" % error.retry_after_ms))
    if isinstance(error, errors.Unauthenticated):
        headers.append((b"www-authenticate", b'Bearer realm="llorch"'))
    if isinstance(error, errors.MethodNotAllowed):
        headers.append((b"allow", ", ".join((error.details or {}).get("choices", ())).encode()))
    if isinstance(error, errors.PayloadTooLarge):
        headers.append((b"connection", b"close"))
    return headers


class Problems:
    """Answers every exception of the layers inside with the envelope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as exc:  # noqa: BLE001 - this is where the last of them ends
            exchange = exchange_of(scope)
            error = to_error(exc)
            if isinstance(error, errors.Internal) or exchange.has_started:
                _log.error("request_failed", correlation_id=exchange.correlation_id, exc_info=exc)
            if not exchange.has_started:
                await _answer(exchange, error)


def raw_response(error: LlorchError) -> bytes:
    """The whole HTTP/1.1 response for what is refused before there is a request; the connection ends with it."""
    status = status_of(error)
    correlation_id = new_correlation_id()
    body = _encode(error, correlation_id)
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"x-correlation-id: {correlation_id}",
        "cache-control: no-store",
        "x-content-type-options: nosniff",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join((*lines, "", "")).encode() + body


async def _answer(exchange: Exchange, error: LlorchError) -> None:
    body = _encode(error, exchange.correlation_id)
    exchange.code = error.code
    is_unread = isinstance(error, errors.PayloadTooLarge)
    await exchange.respond(status_of(error), b"application/json", body, headers_of(error), more=is_unread)
    if is_unread:
        await exchange.linger()
        await exchange.write(b"")


def _encode(error: LlorchError, correlation_id: str) -> bytes:
    envelope = problem(error, correlation_id)
    envelope["message"] = error.message[:_MAX_MESSAGE]
    return msgspec.json.encode(envelope)


def _allowed(exc: HTTPException) -> dict[str, list[str]] | None:
    allow = (exc.headers or {}).get("Allow")
    return {"choices": allow.split(", ")} if allow else None
