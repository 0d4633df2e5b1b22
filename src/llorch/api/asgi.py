"""Puts the HTTP edge together: use cases in, an ASGI application out.

The layers from the outside in: Correlation, Problems, Guard, the lifespan, operations. None of them wraps
`send`, so a token that leaves passes through nothing.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

from connexion import ConnexionMiddleware
from connexion.middleware.lifespan import LifespanMiddleware
from connexion.resolver import Resolver
from starlette.types import ASGIApp

from llorch.api.auth import Keys
from llorch.api.compiled import CompiledOperations, Handler
from llorch.api.context import Context
from llorch.api.correlation import Correlation
from llorch.api.exchange import Observe
from llorch.api.guard import Guard
from llorch.api.handlers import Handlers
from llorch.api.ports import Changes, Configurations, Nodes, Pools, Sessions, Tasks
from llorch.api.problems import Problems
from llorch.service.limits import Limits
from llorch_contract.operations import Operations
from llorch_contract.routes import ROUTES, table
from llorch_contract.specs import load_spec

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]


def build_api(
    *,
    tasks: Tasks,
    sessions: Sessions,
    pools: Pools,
    changes: Changes,
    configurations: Configurations,
    nodes: Nodes,
    limits: Limits,
    metrics_text: Callable[[], bytes],
    keys: Keys,
    lifespan: Lifespan | None = None,
    is_shutting_down: Callable[[], bool] = lambda: False,
    observe: Observe | None = None,
) -> ASGIApp:
    """The application that serves the contract. While there are no keys it is for loopback only.

    `lifespan` is entered when the server starts and left when it has stopped; it gets the application. `observe` is
    told of every answer.
    """
    handlers = Handlers(
        tasks=tasks,
        sessions=sessions,
        pools=pools,
        changes=changes,
        configurations=configurations,
        nodes=nodes,
        limits=limits,
        metrics_text=metrics_text,
        is_shutting_down=is_shutting_down,
    )
    return serve_operations(handlers, limits=limits, keys=keys, lifespan=lifespan, observe=observe)


def serve_operations(
    operations: Operations[Context],
    *,
    limits: Limits,
    keys: Keys,
    lifespan: Lifespan | None = None,
    observe: Observe | None = None,
) -> ASGIApp:
    """Binds handlers to the contract's routes. Raises AttributeError when an operation has no handler."""
    app = ConnexionMiddleware(
        CompiledOperations(keys=keys, body_bytes=limits.body_bytes),
        import_name=__package__,
        lifespan=lifespan or _nothing,
        resolver=_resolver(table(operations)),
        middlewares=[
            partial(Correlation, observe=observe),
            Problems,
            partial(Guard, header_bytes=limits.header_bytes, is_keyless=keys.is_keyless),
            LifespanMiddleware,
        ],
    )
    for name in dict.fromkeys(route.spec for route in ROUTES):
        app.add_api(load_spec(name), name=name)
    served: ASGIApp = app
    return served


def _resolver(handlers: dict[str, Handler]) -> Resolver:
    return Resolver(handlers.__getitem__)


@asynccontextmanager
async def _nothing(_app: object) -> AsyncIterator[None]:
    yield
