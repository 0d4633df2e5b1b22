"""Compares two schemas by what a client sends or receives under them.

Works on OpenAPI 3.0 schema objects and on JSON Schema alike, as far as this contract uses them. Anything that it does
not understand and that changed counts as breaking.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from tools.contract.source import Document, lookup

Finding = tuple[bool, str, str]

_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_ANNOTATIONS = (
    "description", "title", "example", "examples", "externalDocs", "deprecated", "x-req-id", "$id", "$schema", "$defs",
    "x-durable", "x-terminal", "x-frames",
)  # fmt: skip
_UNDERSTOOD = (
    *_UPPER, *_LOWER, *_ANNOTATIONS, "$ref", "allOf", "type", "nullable", "enum", "properties", "required", "items",
    "additionalProperties", "default", "x-exactly-one", "oneOf",
)  # fmt: skip


class Direction(Enum):
    """Which way values of a schema travel, seen from the client."""

    SENT = "sent"
    RECEIVED = "received"


class SchemaDiff:
    """Comparison of schemas of an old and a new document; remembers which old components it met."""

    def __init__(self, old: Document, new: Document) -> None:
        self.old = old
        self.new = new
        self._open: set[tuple[str, str, Direction]] = set()

    def unreached_before(self) -> list[str]:
        """Names of the old document's schemas that neither an operation nor another such schema refers to."""
        schemas = self.old.get("components", {}).get("schemas", {})
        left = sorted(set(schemas) - _reached(self.old, self.old.get("paths", {}), set()))
        inner = [_reached(self.old, schemas[name], set()) - {name} for name in left]
        return [name for name in left if not any(name in names for names in inner)]

    def compare(self, old: Any, new: Any, way: Direction, path: str = "") -> Iterator[Finding]:
        """(breaking, path inside the schema, what changed) of every difference that matters to a client."""
        pair = (_reference(old), _reference(new), way)
        if pair[0] and pair[1]:
            if pair in self._open:
                return
            self._open.add(pair)
        before, after = _merged(self.old, old), _merged(self.new, new)
        yield from _type(before, after, way, path)
        yield from _enum(before, after, way, path)
        yield from _bounds(before, after, way, path)
        yield from _exactly_one(before, after, way, path)
        yield from _rest(before, after, way, path)
        yield from self._properties(before, after, way, path)
        yield from self._inner(before, after, way, path)
        self._open.discard(pair)

    def _properties(self, old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
        before, after = old.get("properties", {}), new.get("properties", {})
        sent = way is Direction.SENT
        was_required, is_required = set(old.get("required", [])), set(new.get("required", []))
        for name in sorted(before.keys() - after.keys()):
            yield True, f"{path}.{name}", "removed"
        for name in sorted(after.keys() - before.keys()):
            needed = sent and name in is_required
            yield needed, f"{path}.{name}", "added and required" if needed else "added"
        for name in sorted(before.keys() & after.keys()):
            place = f"{path}.{name}"
            demanded, absent = ("became required", "became optional") if sent else ("always there", "may be absent")
            if name in is_required and name not in was_required:
                yield sent, place, demanded
            if name in was_required and name not in is_required:
                yield not sent, place, absent
            yield from self.compare(before[name], after[name], way, place)

    def _inner(self, old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
        if "items" in old and "items" in new:
            yield from self.compare(old["items"], new["items"], way, f"{path}[]")
        before, after = old.get("additionalProperties", True), new.get("additionalProperties", True)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from self.compare(before, after, way, f"{path}.*")
        elif before != after:
            # Refusing unknown fields takes less from who sends; promising none any more matters to nobody who receives.
            tighter = after is False or before is True
            yield tighter and way is Direction.SENT, path, f"additional properties: {before} became {after}"


def _reference(schema: Any) -> str:
    return str(schema.get("$ref", "")) if isinstance(schema, dict) else ""


def _merged(document: Document, schema: Any) -> Document:
    """`schema` with its reference followed and its allOf laid into it."""
    if not isinstance(schema, dict):
        return {}
    parts = [*schema.get("allOf", [])]
    if "$ref" in schema:
        parts.insert(0, lookup(document, schema["$ref"]))
    merged: Document = {}
    for part in [*(_merged(document, part) for part in parts), schema]:
        merged = {
            **merged,
            **{key: value for key, value in part.items() if key not in ("allOf", "$ref")},
            "properties": {**merged.get("properties", {}), **part.get("properties", {})},
            "required": [*merged.get("required", []), *part.get("required", [])],
        }
    return merged


def _types(schema: Document) -> set[str]:
    stated = schema.get("type", [])
    types = {stated} if isinstance(stated, str) else set(stated)
    return types | {"null"} if schema.get("nullable") else types


def _type(old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
    before, after = _types(old), _types(new)
    if before == after:
        return
    what = f"type {_listed(before)} became {_listed(after)}"
    if before and after:
        lost, gained = before - after, after - before
        if "number" in after:
            lost -= {"integer"}
        if "number" in before:
            gained -= {"integer"}
        yield bool(lost if way is Direction.SENT else gained), path, what
    else:
        yield bool(after) == (way is Direction.SENT), path, what


def _listed(types: set[str]) -> str:
    return "|".join(sorted(types)) or "any"


def _enum(old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
    before, after = old.get("enum"), new.get("enum")
    if before == after:
        return
    if before is None or after is None:
        narrower = before is None
        yield narrower == (way is Direction.SENT), path, "enum added" if narrower else "enum removed"
        return
    for value in before:
        if value not in after:
            yield way is Direction.SENT, path, f"enum value {value} removed"
    for value in after:
        if value not in before:
            note = "; clients that enumerate may break" if way is Direction.RECEIVED else ""
            yield way is Direction.RECEIVED, path, f"enum value {value} added{note}"


def _bounds(old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
    for keyword in (*_UPPER, *_LOWER):
        before, after = old.get(keyword), new.get(keyword)
        if before != after:
            tighter = _tighter(before, after, keyword in _UPPER)
            yield tighter and way is Direction.SENT, path, f"{keyword} {before} became {after}"


def _tighter(before: Any, after: Any, upper: bool) -> bool:
    if isinstance(before, bool) or isinstance(after, bool):  # OpenAPI 3.0 says exclusiveMinimum: true
        return bool(after)
    if before is None or after is None:
        return after is not None
    return bool(after < before if upper else after > before)


def _exactly_one(old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
    before, after = old.get("x-exactly-one", []), new.get("x-exactly-one", [])
    if set(before) == set(after) and old.get("oneOf", []) == new.get("oneOf", []):
        return
    # Another name in the group is one more way to send; anything else changes what the old ways mean.
    wider = bool(before) and set(before) <= set(after)
    loosened = not after and not new.get("oneOf")
    breaks = not (wider or loosened) if way is Direction.SENT else not set(after) <= set(before) or not after
    yield breaks, path, f"exactly one of {_names(before)} became exactly one of {_names(after)}"


def _names(group: list[str]) -> str:
    return ", ".join(group) or "(no group)"


def _rest(old: Document, new: Document, way: Direction, path: str) -> Iterator[Finding]:
    """A changed default is another meaning of the same request; patterns and unknown keywords cannot be ordered."""
    if way is Direction.SENT and old.get("default") != new.get("default"):
        yield True, path, f"default {old.get('default')!r} became {new.get('default')!r}"
    for keyword in sorted({*old, *new} - set(_UNDERSTOOD)):
        before, after = old.get(keyword), new.get(keyword)
        if before != after:
            harmless = after is None if way is Direction.SENT else before is None
            yield not harmless, path, f"{keyword} {before!r} became {after!r}"


def _reached(document: Document, node: Any, found: set[str]) -> set[str]:
    if isinstance(node, dict):
        reference = node.get("$ref", "")
        if isinstance(reference, str) and reference.startswith("#/"):
            name = reference.rsplit("/", 1)[1]
            if not reference.startswith("#/components/schemas/"):
                _reached(document, lookup(document, reference), found)
            elif name not in found:
                found.add(name)
                _reached(document, lookup(document, reference), found)
        for value in node.values():
            _reached(document, value, found)
    elif isinstance(node, list):
        for value in node:
            _reached(document, value, found)
    return found
