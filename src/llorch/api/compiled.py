"""The contract's operations as Connexion middleware whose work per operation is compiled once, at start-up.

Connexion reads and resolves the specifications; `CompiledOperations` finds the operation of a request, which lets the
caller in, validates, calls the handler and sends its reply. At request time nothing of the specification is looked at
and no JSON Schema is run.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pydantic_core
from connexion.middleware.abstract import RoutedAPI, RoutedMiddleware
from connexion.operations import AbstractOperation
from connexion.spec import Specification
from starlette.types import Receive, Scope, Send

from llorch.api.auth import NOBODY, Identity, Keys, check_scope
from llorch.api.bodies import JsonBody
from llorch.api.context import Context
from llorch.api.exchange import Exchange, exchange_of
from llorch.api.parameters import Parameters
from llorch.api.sse import Following, send_events
from llorch.errors import MethodNotAllowed, NotFound
from llorch_contract.replies import EventStream, NoContent, PlainText, Reply
from llorch_contract.routes import ROUTES, Route

Handler = Callable[..., Awaitable[object]]

_METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})

_BY_ID = {route.operation_id: route for route in ROUTES}


class CompiledOperation:
    """One operation: who may call it, what it takes, who handles it."""

    def __init__(self, route: Route, handler: Handler, *, keys: Keys, body_bytes: int) -> None:
        self._operation_id = route.operation_id
        self._handler = handler
        self._keys = keys
        self._scope = route.scope
        self._parameters = Parameters(route.parameters)
        self._body = None
        if route.body is not None:
            self._body = JsonBody(route.body, body_bytes, is_required=route.body_required)
        self._success = route.success[0]
        self._no_content = route.success[-1]
        self._media_type = _media_type(route)

    async def run(self, exchange: Exchange, path: Mapping[str, str]) -> None:
        """Answer the request; `path` are the parameters of its path. Raises what the envelope is to say."""
        exchange.operation = self._operation_id
        identity = self._admit(exchange)
        arguments = self._parameters.read(path, exchange.scope["query_string"], exchange.headers)
        if self._body is not None:
            arguments["body"] = await self._body.read(exchange.headers, exchange.receive)
        client = exchange.scope.get("client")
        context = Context(identity, exchange.correlation_id, client[0] if client else "")
        reply = await self._handler(ctx=context, **arguments)
        await self._send(exchange, reply)

    def _admit(self, exchange: Exchange) -> Identity:
        if self._scope is None:
            return NOBODY
        identity = self._keys.identify(exchange.headers.get(b"authorization"))
        check_scope(identity, self._scope)
        return identity

    async def _send(self, exchange: Exchange, reply: object) -> None:
        match reply:
            case Reply():
                body = pydantic_core.to_json(reply.body)
                await exchange.respond(reply.status, self._media_type, body, _encoded(reply.headers))
            case NoContent():
                await exchange.start(self._no_content, _encoded(reply.headers))
                await exchange.write(b"")
            case EventStream(frames=Following(reader=reader)):
                await send_events(exchange, self._success, reader)
            case PlainText():
                await exchange.respond(self._success, self._media_type, reply.body, _encoded(reply.headers))
            case _:
                raise TypeError(f"a handler returned {type(reply).__name__}")


Methods = Mapping[str, CompiledOperation]

_NO_PARAMETERS: Mapping[str, str] = {}


class _OperationsApi(RoutedAPI[CompiledOperation]):  # type: ignore[misc]  # Connexion has no types
    def __init__(self, specification: Specification, *, keys: Keys, body_bytes: int, **kwargs: Any) -> None:
        super().__init__(specification, **kwargs)
        self._keys = keys
        self._body_bytes = body_bytes
        self.add_paths()

    def make_operation(self, operation: AbstractOperation) -> CompiledOperation:
        route = _BY_ID[operation.operation_id]
        handler = self.resolver.resolve_function_from_operation_id(operation.operation_id)
        return CompiledOperation(route, handler, keys=self._keys, body_bytes=self._body_bytes)


class CompiledOperations(RoutedMiddleware[_OperationsApi]):  # type: ignore[misc]  # Connexion has no types
    """The innermost application: every operation of the specifications, ready to run, by path and method.

    A path without parameters costs one look-up. Connexion's own way, a routing context in the scope that is looked up
    in every specification, would cost as much again as the rest of the routing.
    """

    api_cls = _OperationsApi

    def __init__(self, *, keys: Keys, body_bytes: int) -> None:
        super().__init__(_nowhere)
        self._keys = keys
        self._body_bytes = body_bytes
        self._exact: dict[str, Methods] = {}
        self._templates: list[tuple[re.Pattern[str], Methods]] = []

    def add_api(self, specification: Specification, **kwargs: Any) -> _OperationsApi:
        """Compile the operations of a specification and take over its paths."""
        api: _OperationsApi = super().add_api(specification, keys=self._keys, body_bytes=self._body_bytes, **kwargs)
        for path, item in specification["paths"].items():
            methods = {
                method.upper(): api.operations[item[method]["operationId"]] for method in item if method in _METHODS
            }
            if "{" in path:
                pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path))
                self._templates.append((re.compile(pattern), methods))
            else:
                self._exact[path] = methods
        return api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, parameters = scope["path"], _NO_PARAMETERS
        methods = self._exact.get(path)
        if methods is None:
            methods, parameters = self._match(path)
        operation = methods.get(scope["method"])
        if operation is None:
            raise _not_allowed(scope["method"], methods)
        await operation.run(exchange_of(scope), parameters)

    def _match(self, path: str) -> tuple[Methods, Mapping[str, str]]:
        for pattern, methods in self._templates:
            if match := pattern.fullmatch(path):
                return methods, match.groupdict()
        raise NotFound("there is no such path")


async def _nowhere(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotFound("there is no such path")


def _not_allowed(method: str, methods: Mapping[str, object]) -> MethodNotAllowed:
    return MethodNotAllowed(f"the method {method[:16]} is not allowed here", details={"choices": sorted(methods)})


def _media_type(route: Route) -> bytes:
    """What the first success carries; plain text here is always that of Prometheus."""
    media_types = dict(route.responses)[route.success[0]]
    media_type = media_types[0] if media_types else ""
    return (f"{media_type}; version=0.0.4; charset=utf-8" if media_type == "text/plain" else media_type).encode()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
