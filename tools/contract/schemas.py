"""Turns OpenAPI 3.0 schema objects into plain JSON Schema (draft 4), which is what validators understand."""

from typing import Any

from tools.contract.source import Document, lookup

_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "example",
        "examples",
        "externalDocs",
        "deprecated",
        "xml",
        "readOnly",
        "writeOnly",
        "discriminator",
    ]
)


def as_draft4(document: Document, schema: Any) -> Document:
    """`schema` as a draft 4 schema that stands alone: `nullable` spelled out, annotations of OpenAPI dropped.

    Components it reaches are carried along under `definitions`, so that recursive schemas work too.
    """
    definitions: dict[str, Any] = {}
    converted = _convert(document, schema, definitions)
    return {**converted, "definitions": definitions} if definitions else converted


def _convert(document: Document, node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_convert(document, item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {"$ref": f"#/definitions/{_define(document, node['$ref'], definitions)}"}
    plain = {key: value for key, value in node.items() if key not in _ANNOTATIONS and not key.startswith("x-")}
    nullable = plain.pop("nullable", False)
    result = {key: _converted_value(document, key, value, definitions) for key, value in plain.items()}
    return {"anyOf": [result, {"type": "null"}]} if nullable else result


def _converted_value(document: Document, key: str, value: Any, definitions: dict[str, Any]) -> Any:
    if key in ("enum", "default", "required"):
        return value
    if key == "properties":
        return {name: _convert(document, schema, definitions) for name, schema in value.items()}
    return _convert(document, value, definitions)


def _define(document: Document, reference: str, definitions: dict[str, Any]) -> str:
    name = reference.rsplit("/", 1)[1]
    if name not in definitions:
        definitions[name] = {}
        definitions[name] = _convert(document, lookup(document, reference), definitions)
    return name
