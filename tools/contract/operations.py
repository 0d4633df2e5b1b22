"""Writes `operations.py`, the Protocol that handlers implement, and `routes.py`, what the HTTP edge binds them with."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pprint import pformat
from typing import Any

from tools.contract.models import HEADER
from tools.contract.schemas import as_draft4
from tools.contract.source import ContractError, Document, operations, resolve

CORRELATION_HEADER = "X-Correlation-Id"
PROBLEM = "Problem"
_JSON = "application/json"
_SSE = "text/event-stream"
_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `argument` is the handler's keyword, None where the caller's context carries the value."""

    name: str
    argument: str | None
    location: str
    required: bool
    annotation: str
    schema: Document


@dataclass(frozen=True, slots=True)
class Operation:
    """What the generated code says about one operation."""

    name: str
    spec: str
    method: str
    path: str
    summary: str
    parameters: tuple[Parameter, ...]
    body: str | None
    body_required: bool
    body_media_types: tuple[str, ...]
    replies: tuple[str, ...]
    responses: tuple[tuple[int, tuple[str, ...]], ...]
    success: tuple[int, ...]
    scope: str | None
    req_ids: tuple[str, ...]


def read_operations(specs: dict[str, Document]) -> list[Operation]:
    """Every operation of every spec, in document order. Raises ContractError for what generated code cannot express."""
    found = [
        _operation(name, spec, path, method, operation)
        for name, spec in specs.items()
        for path, method, operation in operations(spec)
    ]
    names = [operation.name for operation in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ContractError(f"operationId given twice: {', '.join(doubled)}")
    return found


def _operation(spec_name: str, spec: Document, path: str, method: str, operation: Document) -> Operation:
    where = f"{spec_name}: {method} {path}"
    if "operationId" not in operation:
        raise ContractError(f"{where}: no operationId")
    body = resolve(spec, operation.get("requestBody", {}))
    media_types = tuple(body.get("content", {}))
    return Operation(
        name=operation["operationId"],
        spec=spec_name,
        method=method.upper(),
        path=path,
        summary=str(operation.get("summary", operation["operationId"])),
        parameters=tuple(_parameter(spec, resolve(spec, p), where) for p in operation["parameters"]),
        body=_component(body["content"][media_types[0]]["schema"], f"{where} request body") if media_types else None,
        body_required=bool(body.get("required", False)),
        body_media_types=media_types,
        replies=tuple(_replies(spec, operation, where)),
        responses=tuple((int(s), tuple(r.get("content", {}))) for s, r in _responses(spec, operation)),
        success=tuple(int(s) for s, _ in _responses(spec, operation) if s.startswith("2")),
        scope=None if operation.get("x-scope") == "none" else operation.get("x-scope"),
        req_ids=req_ids(operation),
    )


def req_ids(node: Document) -> tuple[str, ...]:
    """The requirement IDs that a contract node names."""
    stated = node.get("x-req-id", ())
    return (stated,) if isinstance(stated, str) else tuple(stated)


def _responses(spec: Document, operation: Document) -> Iterator[tuple[str, Document]]:
    for status, response in operation.get("responses", {}).items():
        if status.isdigit():
            yield status, resolve(spec, response)


def _replies(spec: Document, operation: Document, where: str) -> Iterator[str]:
    """Annotations of the declared replies: every 2xx, and other statuses whose body is not the error envelope."""
    for status, response in _responses(spec, operation):
        content = response.get("content", {})
        success = status.startswith("2")
        if not content and success:
            yield "NoContent"
        for media_type, media in content.items():
            if media_type == _JSON:
                name = _component(media["schema"], f"{where} response {status}")
                if success or name != PROBLEM:
                    yield f"Reply[Literal[{status}], models.{name}]"
            elif success:
                yield "EventStream" if media_type == _SSE else "PlainText"


def _component(schema: Document, where: str) -> str:
    reference = schema.get("$ref", "")
    if not reference.startswith("#/components/schemas/"):
        raise ContractError(f"{where}: the schema must be a named component")
    return str(reference.rsplit("/", 1)[1])


def _parameter(spec: Document, parameter: Document, where: str) -> Parameter:
    name, schema = parameter["name"], resolve(spec, parameter["schema"])
    required = bool(parameter.get("required", False))
    annotation = _annotation(spec, schema, f"{where} parameter {name}")
    optional = not required and "default" not in schema
    return Parameter(
        name=name,
        argument=None if name == CORRELATION_HEADER else re.sub(r"[^a-z0-9]+", "_", name.lower()),
        location=parameter["in"],
        required=required,
        annotation=f"{annotation} | None" if optional else annotation,
        schema=as_draft4(spec, schema),
    )


def _annotation(spec: Document, schema: Document, where: str) -> str:
    if "enum" in schema:
        return f"Literal[{', '.join(_quoted(value) for value in schema['enum'])}]"
    if schema.get("type") == "array":
        return f"list[{_annotation(spec, resolve(spec, schema['items']), where)}]"
    if schema.get("type") not in _TYPES:
        raise ContractError(f"{where}: type {schema.get('type')!r} cannot be a parameter")
    return _TYPES[schema["type"]]


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def operations_source(found: Iterable[Operation]) -> str:
    """Source of `operations.py`."""
    methods = "\n".join(_method(operation) for operation in found)
    used = [name for name in ("EventStream", "NoContent", "PlainText", "Reply") if re.search(rf"\b{name}\b", methods)]
    return f'''{HEADER}

"""One method per operation of the contract. Whoever implements `Operations` serves the whole contract.

Arguments are keyword-only, so that a renamed one is a type error. `ctx` is whatever the HTTP edge knows of the caller.
"""

from typing import {"Literal, " if "Literal[" in methods else ""}Protocol, TypeVar

from llorch_contract import models
from llorch_contract.replies import {", ".join(used)}

Context_contra = TypeVar("Context_contra", contravariant=True)


class Operations(Protocol[Context_contra]):
    """Handlers of every operation. A failure is raised; what is returned is a declared success."""

{methods}'''


def _method(operation: Operation) -> str:
    arguments = ["ctx: Context_contra"]
    arguments += [f"{p.argument}: {p.annotation}" for p in operation.parameters if p.argument]
    if operation.body:
        arguments.append(f"body: models.{operation.body}" + ("" if operation.body_required else " | None"))
    lines = "".join(f"        {argument},\n" for argument in arguments)
    reply = " | ".join(dict.fromkeys(operation.replies))
    return f'''    async def {operation.name}(
        self,
        *,
{lines}    ) -> {reply}:
        """{operation.summary.strip().rstrip(".")} ({operation.method} {operation.path})."""
        ...
'''


def routes_source(found: Iterable[Operation]) -> str:
    """Source of `routes.py`."""
    found = list(found)
    entries = "".join(_route(operation) for operation in found)
    bindings = "".join(f'        "{operation.name}": operations.{operation.name},\n' for operation in found)
    return f'''{HEADER}

"""The routes of the contract as data, and the table that binds an `Operations` object to them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from llorch_contract import models
from llorch_contract.operations import Operations

ContextT = TypeVar("ContextT")
Handler = Callable[..., Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `argument` is the handler's keyword, None where `ctx` carries the value.

    `schema` is JSON Schema draft 4 and stands alone.
    """

    name: str
    argument: str | None
    location: Literal["path", "query", "header"]
    required: bool
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `responses` are (status, media types) pairs.

    `scope` is None where no key is needed and `any` where every key will do.
    """

    operation_id: str
    spec: str
    method: str
    path: str
    parameters: tuple[Parameter, ...]
    body: type[BaseModel] | None
    body_required: bool
    body_media_types: tuple[str, ...]
    responses: tuple[tuple[int, tuple[str, ...]], ...]
    success: tuple[int, ...]
    scope: str | None
    req_ids: tuple[str, ...]


ROUTES: tuple[Route, ...] = (
{entries})


def table(operations: Operations[ContextT]) -> dict[str, Handler]:
    """Handler by operationId; every handler takes `ctx` and its declared arguments by keyword."""
    return {{
{bindings}    }}
'''


def _route(operation: Operation) -> str:
    fields = {
        "operation_id": repr(operation.name),
        "spec": repr(operation.spec),
        "method": repr(operation.method),
        "path": repr(operation.path),
        "parameters": _parameters(operation.parameters),
        "body": f"models.{operation.body}" if operation.body else "None",
        "body_required": repr(operation.body_required),
        "body_media_types": repr(operation.body_media_types),
        "responses": repr(operation.responses),
        "success": repr(operation.success),
        "scope": repr(operation.scope),
        "req_ids": repr(operation.req_ids),
    }
    return "    Route(\n" + "".join(f"        {key}={value},\n" for key, value in fields.items()) + "    ),\n"


def _parameters(parameters: tuple[Parameter, ...]) -> str:
    if not parameters:
        return "()"
    return "(\n" + "".join(_parameter_source(parameter) for parameter in parameters) + "        )"


def _parameter_source(parameter: Parameter) -> str:
    schema = pformat(parameter.schema, sort_dicts=False, width=100).replace("\n", "\n" + " " * 23)
    return f"""            Parameter(
                name={parameter.name!r},
                argument={parameter.argument!r},
                location={parameter.location!r},
                required={parameter.required!r},
                schema={schema},
            ),
"""
