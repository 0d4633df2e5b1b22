"""Judges a contract: what every operation, schema, setting and metric must carry before code is made from it.

Every fault is one line that begins with the place. Knows nothing of earlier contracts and of Python code.
"""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs

from tools.contract.metrics import families
from tools.contract.operations import CORRELATION_HEADER, PROBLEM, req_ids
from tools.contract.schemas import as_draft4
from tools.contract.source import Contract, ContractError, Document, lookup, operations, resolve

_JSON = "application/json"
_REQ_ID = re.compile(r"^(ORCH-\d{4}|OC-[A-Z]+-\d{4})$")
_OPERATION_ID = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")
_SCOPES = ("none", "any", "data", "control", "admin", "node")

# What a generated model cannot enforce: a request schema that used one would be stricter than its model.
_NOT_IN_REQUESTS = ("not", "anyOf", "uniqueItems", "patternProperties", "maxProperties")


def faults(contract: Contract) -> list[str]:
    """Every fault of `contract`; empty when code may be made from it."""
    found = [fault for name, spec in contract.specs.items() for fault in _spec_faults(name, spec)]
    return found + list(_config_faults(contract.config)) + list(_metric_faults(contract.metrics))


def _spec_faults(name: str, spec: Document) -> Iterator[str]:
    for schema_name, schema in spec.get("components", {}).get("schemas", {}).items():
        where = f"{name}: schema {schema_name}"
        yield from _req_id_faults(where, schema)
        yield from _example_faults(spec, where, schema, [schema["example"]] if "example" in schema else [])
    for path, method, operation in operations(spec):
        yield from _operation_faults(spec, f"{name}: {method} {path}", operation)


def _req_id_faults(where: str, node: Document) -> Iterator[str]:
    stated = req_ids(node)
    if not stated:
        yield f"{where}: no x-req-id"
    yield from (f"{where}: {text!r} is no requirement ID" for text in stated if not _REQ_ID.match(str(text)))


def _operation_faults(spec: Document, where: str, operation: Document) -> Iterator[str]:
    yield from _req_id_faults(where, operation)
    if not _OPERATION_ID.match(operation.get("operationId", "")):
        yield f"{where}: operationId {operation.get('operationId')!r} is not in snake_case"
    yield from _security_faults(spec, where, operation)
    parameters = [resolve(spec, parameter) for parameter in operation["parameters"]]
    if not any(p["in"] == "header" and p["name"] == CORRELATION_HEADER for p in parameters):
        yield f"{where}: the parameter {CORRELATION_HEADER} is missing"
    for parameter in parameters:
        place = f"{where} parameter {parameter['name']}"
        yield from _example_faults(spec, place, parameter["schema"], _examples(parameter))
    yield from _body_faults(spec, where, operation)
    yield from _response_faults(spec, where, operation)


def _security_faults(spec: Document, where: str, operation: Document) -> Iterator[str]:
    scope = operation.get("x-scope")
    if scope not in _SCOPES:
        yield f"{where}: x-scope {scope!r} is none of {', '.join(_SCOPES)}"
    if (scope == "none") != (operation.get("security", spec.get("security")) == []):
        yield f"{where}: x-scope none and an empty security go together"


def _body_faults(spec: Document, where: str, operation: Document) -> Iterator[str]:
    body = resolve(spec, operation.get("requestBody", {}))
    for media_type, media in body.get("content", {}).items():
        place = f"{where} request body {media_type}"
        yield from _media_faults(spec, place, media)
        yield from _request_schema_faults(spec, media["schema"], place, set())


def _response_faults(spec: Document, where: str, operation: Document) -> Iterator[str]:
    responses = {status: resolve(spec, response) for status, response in operation.get("responses", {}).items()}
    if not any(status.startswith("2") for status in responses):
        yield f"{where}: no success is declared"
    if not any(status[0] in "45" for status in responses):
        yield f"{where}: no error is declared"
    for status, response in responses.items():
        place = f"{where} response {status}"
        if not any(name.lower() == CORRELATION_HEADER.lower() for name in response.get("headers", {})):
            yield f"{place}: the header {CORRELATION_HEADER} is missing"
        for media_type, media in response.get("content", {}).items():
            yield from _media_faults(spec, f"{place} {media_type}", media)
        if status[0] in "45":
            yield from _error_faults(place, response)


def _error_faults(place: str, response: Document) -> Iterator[str]:
    schema = response.get("content", {}).get(_JSON, {}).get("schema", {})
    if schema.get("$ref") != f"#/components/schemas/{PROBLEM}":
        yield f"{place}: an error must be application/json of the schema {PROBLEM}"


def _media_faults(spec: Document, where: str, media: Document) -> Iterator[str]:
    schema = media.get("schema")
    if schema is None:
        yield f"{where}: no schema"
        return
    examples = _examples(media)
    if not examples:
        yield f"{where}: no example"
    yield from _example_faults(spec, where, schema, examples)


def _examples(node: Document) -> list[Any]:
    named = node.get("examples", {})
    values = [example["value"] for example in named.values() if "value" in example]
    return values + ([node["example"]] if "example" in node else [])


def _example_faults(spec: Document, where: str, schema: Document, examples: list[Any]) -> Iterator[str]:
    if not examples:
        return
    validator = jsonschema_rs.Draft4Validator(as_draft4(spec, schema))
    for example in examples:
        for error in validator.iter_errors(example):
            at = "/".join(str(part) for part in error.instance_path)
            yield f"{where}: an example does not fit its schema: {error.message}" + (f" (at {at})" if at else "")


def _request_schema_faults(spec: Document, node: Any, where: str, seen: set[str]) -> Iterator[str]:
    """Keywords that a generated model would not enforce, and objects that would let misspelt fields through."""
    if isinstance(node, list):
        for item in node:
            yield from _request_schema_faults(spec, item, where, seen)
        return
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        if node["$ref"] not in seen:
            seen.add(node["$ref"])
            yield from _request_schema_faults(spec, lookup(spec, node["$ref"]), node["$ref"].rsplit("/", 1)[1], seen)
        return
    yield from _keyword_faults(node, where)
    for name, schema in node.get("properties", {}).items():
        yield from _request_schema_faults(spec, schema, f"{where}.{name}", seen)
    for key in ("items", "allOf", "additionalProperties"):
        yield from _request_schema_faults(spec, node.get(key), where, seen)


def _keyword_faults(node: Document, where: str) -> Iterator[str]:
    for keyword in _NOT_IN_REQUESTS:
        if keyword in node and not (keyword == "maxProperties" and "properties" not in node):
            yield f"{where}: `{keyword}` in a request is more than its model can hold"
    if "properties" in node and node.get("additionalProperties") is not False:
        yield f"{where}: an object of a request must say additionalProperties: false"
    if node.get("type") == "string" and "format" in node and "pattern" not in node:
        yield f"{where}: a text format in a request needs a pattern, which is what both sides enforce"
    group = [{"required": [name]} for name in node.get("x-exactly-one", [])]
    if node.get("oneOf", []) != group:
        yield f"{where}: oneOf must be the `required` of each name in x-exactly-one, in its order"


def _config_faults(schema: Document) -> Iterator[str]:
    parts = {"config": schema} | {f"config: {name}": part for name, part in schema.get("$defs", {}).items()}
    for where, part in parts.items():
        yield from _req_id_faults(where, part)
        if "description" not in part:
            yield f"{where}: no description"
        if part.get("type") == "object" and part.get("additionalProperties") is not False:
            yield f"{where}: additionalProperties must be false"
        for name, setting in part.get("properties", {}).items():
            if "description" not in setting:
                yield f"{where}: {name}: no description"
    yield from _default_faults(schema)


def _default_faults(schema: Document) -> Iterator[str]:
    """Every default must be a value that the file could hold."""
    for name, part in {"config": schema, **schema.get("$defs", {})}.items():
        for key, setting in part.get("properties", {}).items():
            if "default" not in setting:
                continue
            alone = {"$schema": schema["$schema"], "$defs": schema.get("$defs", {}), "allOf": [setting]}
            if not jsonschema_rs.validator_for(alone).is_valid(setting["default"]):
                yield f"config: {name}.{key}: the default {setting['default']!r} does not fit"


def _metric_faults(metrics: Document) -> Iterator[str]:
    try:
        declared = families(metrics)
    except ContractError as error:
        yield str(error)
        return
    for family in declared:
        yield from _req_id_faults(f"metrics.yaml: {family['name']}", family)
