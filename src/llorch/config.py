"""Loads `llorch.yaml` and the environment into one frozen tree, or says everything that is wrong with them at once.

The form of a setting is judged by the contract's schema, what a schema cannot say in `config_rules`. Messages carry
line, setting and remedy, and never a value, which may be a secret.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from jsonschema_rs import Draft202012Validator, ValidationError
from pydantic import ValidationError as ModelError

from llorch.config_replicas import InspectModel
from llorch.config_rules import EMPTY_PROFILE, KEYLESS_TENANT, check_rules, tenant_names
from llorch.config_source import Document, Path, Schema, apply_environment, hint, nearest, read_yaml, resolve
from llorch.errors import ConfigError
from llorch_contract.config import Config as Settings
from llorch_contract.config import (
    Headroom,
    Key,
    Limits,
    Log,
    Managed,
    Node,
    Pool,
    Preemption,
    Price,
    Queue,
    Rate,
    Rates,
    Replica,
    SamplerProfile,
    Server,
    Sessions,
    Streams,
    Supervision,
    Tenant,
    TenantDefaults,
    Timeouts,
    Tls,
)
from llorch_contract.specs import load_config_schema

__all__ = [
    "EMPTY_PROFILE",
    "KEYLESS_TENANT",
    "Headroom",
    "InspectModel",
    "Key",
    "Limits",
    "Log",
    "Managed",
    "Node",
    "Pool",
    "Preemption",
    "Price",
    "Queue",
    "Rate",
    "Rates",
    "Replica",
    "SamplerProfile",
    "Server",
    "Sessions",
    "Settings",
    "Streams",
    "Supervision",
    "Tenant",
    "TenantDefaults",
    "Timeouts",
    "Tls",
    "load",
    "tenant_names",
]

_LOG = logging.getLogger(__name__)


def load(
    path: FilePath | None,
    environ: Mapping[str, str],
    *,
    warn: Callable[[str], None] = _LOG.warning,
    inspect_model: InspectModel | None = None,
) -> Settings:
    """Read the file (None: there is none), put the environment over it, and check the whole.

    With `compat: true` unknown keys are told to `warn` and left out. `inspect_model` tells the context that the model
    in a file was trained for, and is asked about models that this host is to load; it raises nothing. Raises
    ConfigError with a line for each problem.
    """
    schema = load_config_schema()
    document = _read(path)
    is_compat = document.values.get("compat") is True or environ.get("LLORCH_COMPAT") == "true"
    warnings = apply_environment(document, environ, schema, strict=not is_compat)
    unknown = [document.problem(*found) for found in _drop_unknown(document.values, schema, schema, ())]
    (warnings if is_compat else document.problems).extend(unknown)
    _check_form(document, schema)
    check_rules(document, inspect_model)
    settings = _build(document)
    for warning in warnings:
        warn(str(warning))
    return settings


def _read(path: FilePath | None) -> Document:
    if path is None:
        return Document("environment")
    try:
        return read_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _build(document: Document) -> Settings:
    """The typed tree; a document that has problems raises ConfigError."""
    if not document.problems:
        try:
            return Settings.model_validate(document.values)
        except ModelError as error:
            for detail in error.errors(include_input=False, include_context=False, include_url=False):
                document.complain(detail["loc"], detail["msg"])
    problems = document.sorted_problems()
    raise ConfigError("\n".join(problems), details={"problems": problems})


# Form


def _drop_unknown(value: Any, schema: Schema, root: Schema, path: Path) -> Iterator[tuple[Path, str]]:
    """Take keys that the schema does not have out of the value, and tell each with the name that was meant."""
    schema = resolve(schema, root)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _drop_unknown(item, schema.get("items", {}), root, (*path, index))
    elif isinstance(value, dict):
        properties: Schema = schema.get("properties", {})
        others = schema.get("additionalProperties", {})
        for key in list(value):
            if key in properties or others is not False:
                yield from _drop_unknown(value[key], properties.get(key, others), root, (*path, key))
            else:
                del value[key]
                yield (*path, key), _unknown_key(key, list(properties))


def _unknown_key(key: str, known: list[str]) -> str:
    return f"unknown key; {hint(key, known, 'expected one of ' + ', '.join(sorted(known)))}"


def _check_form(document: Document, schema: Schema) -> None:
    errors = list(Draft202012Validator(dict(schema)).iter_errors(document.values))
    chosen = [error.instance_path for error in errors if error.kind.name == "enum"]
    for error in errors:
        path: Path = tuple(error.instance_path)
        if error.kind.name == "required":
            path = (*path, error.kind.as_dict()["property"])
        if error.kind.name != "type" or error.instance_path not in chosen:
            document.complain(path, _expectation(error, schema))


_TYPES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "object": "settings, as `name: value` lines",
    "string": "text; put it in quotes when it looks like a number",
}


_LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


def _expectation(error: ValidationError, schema: Schema) -> str:
    """What the schema expected, without a word of what was there instead."""
    kind, name = error.kind.as_dict(), error.kind.name
    if name in _LIMITS:
        return f"expected {_LIMITS[name].format(kind['limit'])}"
    match name:
        case "type":
            return f"expected {_TYPES[kind['types'][0]]}"
        case "required":
            return "is missing; it has no default"
        case "enum":
            options = [str(option) for option in kind["options"]]
            meant = nearest(str(error.instance), options)
            return f"expected one of {', '.join(options)}" + (f'; did you mean "{meant}"?' if meant else "")
        case "pattern":
            return f"expected: {_described(error, schema) or kind['pattern']}"
        case _:
            return f"does not keep the rule {name}"


def _described(error: ValidationError, schema: Schema) -> str:
    """The contract's own words for what a pattern asks for."""
    rule: Any = schema
    for part in error.schema_path[:-1]:
        rule = rule[part]
    return str(rule.get("description", "")).rstrip(".")
