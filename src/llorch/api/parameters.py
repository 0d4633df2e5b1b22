"""Path, query and header parameters, compiled from their schemas at start-up into plain functions.

A schema word that is not understood here fails the start: no constraint of the contract is ever dropped in silence.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from llorch.api.faults import fault_at
from llorch.errors import SchemaFault
from llorch_contract.routes import Parameter

Validator = Callable[[str], Any]
"""Turns the text of a parameter into its value; raises SchemaFault."""

_STRING_WORDS = frozenset({"type", "enum", "pattern", "minLength", "maxLength", "format", "description", "example"})
_INTEGER_WORDS = frozenset({"type", "format", "minimum", "maximum", "default", "description", "example"})
_FORMATS = frozenset({"uuid", "int32", "int64"})

_is_integer = re.compile(r"-?[0-9]{1,19}").fullmatch


class Parameters:
    """The parameters of one operation."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._path = _compile_all(parameters, "path")
        self._query = {name: (argument, validate) for name, argument, validate in _compile_all(parameters, "query")}
        self._headers = [
            (name.lower().encode(), argument, validate)
            for name, argument, validate in _compile_all(parameters, "header")
        ]
        self._absent = {p.argument: p.schema.get("default") for p in parameters if p.argument and not p.required}
        self._needed = [(p.name, p.argument) for p in parameters if p.argument and p.required and p.location != "path"]

    def read(self, path: Mapping[str, str], query_string: bytes, headers: Mapping[bytes, bytes]) -> dict[str, Any]:
        """The handler's keyword arguments. Raises SchemaFault."""
        arguments = self._absent.copy()
        for name, argument, validate in self._path:
            arguments[argument] = validate(path[name])
        if query_string:
            self._read_query(query_string, arguments)
        for header, argument, validate in self._headers:
            text = headers.get(header)
            if text is not None:
                value = validate(text.decode("latin-1"))
                if argument is not None:
                    arguments[argument] = value
        for name, argument in self._needed:
            if argument not in arguments:
                raise fault_at(name, "is required")
        return arguments

    def _read_query(self, query_string: bytes, arguments: dict[str, Any]) -> None:
        seen: set[str] = set()
        for name, text in _pairs(query_string):
            if name not in self._query:
                raise fault_at(name[:128], "is not known here")
            if name in seen:
                raise fault_at(name, "is given twice")
            seen.add(name)
            argument, validate = self._query[name]
            arguments[argument] = validate(text)


def compile_schema(name: str, schema: Mapping[str, Any]) -> Validator:
    """The validator of a parameter. Raises ValueError for a schema that it does not understand."""
    kind = schema.get("type")
    words = {"string": _STRING_WORDS, "integer": _INTEGER_WORDS}.get(str(kind), frozenset())
    unknown = {word for word in schema if not word.startswith("x-")} - words
    if not words or unknown or schema.get("format", "int32") not in _FORMATS:
        raise ValueError(f"parameter {name}: schema not understood: {dict(schema)}")
    return _integer(name, schema) if kind == "integer" else _string(name, schema)


def _integer(name: str, schema: Mapping[str, Any]) -> Validator:
    least, most = schema["minimum"], schema["maximum"]

    def validate(text: str) -> int:
        if _is_integer(text) is None:
            raise fault_at(name, "must be an integer")
        if not least <= (value := int(text)) <= most:
            raise fault_at(name, f"must be from {least} to {most}")
        return value

    return validate


def _string(name: str, schema: Mapping[str, Any]) -> Validator:
    choices = schema.get("enum")
    least, most = schema.get("minLength", 0), schema.get("maxLength", 2**16)
    # fullmatch: `$` alone would let a trailing newline pass.
    pattern = re.compile(schema.get("pattern", ".*"), re.DOTALL)
    matches = pattern.fullmatch
    is_uuid = schema.get("format") == "uuid"

    def validate(text: str) -> str:
        if choices is not None and text not in choices:
            raise fault_at(name, f"must be one of {', '.join(choices)}")
        if not least <= len(text) <= most or matches(text) is None:
            raise fault_at(name, "must be a UUID" if is_uuid else f"must match {pattern.pattern}")
        return text.lower() if is_uuid else text

    return validate


def _compile_all(parameters: Sequence[Parameter], location: str) -> list[tuple[str, Any, Validator]]:
    return [(p.name, p.argument, compile_schema(p.name, p.schema)) for p in parameters if p.location == location]


def _pairs(query_string: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=64)
    except ValueError:
        raise SchemaFault("the query is malformed", details={"path": "", "reason": "malformed query"}) from None
