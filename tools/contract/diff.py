"""Compares a contract with the one that it is about to replace and says what would break whom.

Two directions, two measures. What clients send (requests, the configuration file) breaks when the server takes less
than before or understands it differently (a changed default). What clients receive breaks when they may get something
that the old contract ruled out: a field gone or null, another type, a new enum value (a client that enumerates has no
branch for it), a new success status. More fields, more errors and looser bounds in replies break nobody: clients must
ignore fields that they do not know. A new label of a metric breaks nobody either: queries that aggregate still do.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.contract.schema_diff import Direction, SchemaDiff
from tools.contract.source import OPENAPI_FILES, ContractError, Document, operations, resolve

_SPECS = "llorch_contract/specs"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two contracts."""

    breaking: bool
    where: str
    what: str

    def __str__(self) -> str:
        return f"{'BREAKING' if self.breaking else 'additive'}  {self.where}: {self.what}"


def compare_trees(old: dict[str, bytes], new: dict[str, bytes]) -> list[Change]:
    """Changes between the contracts bundled in two trees of `generated/`; none when the old one holds no contract."""
    changes: list[Change] = []
    for name, compare in _COMPARISONS.items():
        path = f"{_SPECS}/{name}.json"
        if path in old:
            changes += compare(name, _parsed(path, old[path]), _parsed(path, new[path]))
    return list(dict.fromkeys(changes))


def _parsed(path: str, content: bytes) -> Document:
    try:
        document: Document = json.loads(content)
    except ValueError as error:
        raise ContractError(f"generated/{path} cannot be compared with: {error}; restore it or remove it") from error
    return document


def compare_specs(name: str, old: Document, new: Document) -> list[Change]:
    """Changes of an OpenAPI document."""
    comparison = SchemaDiff(old, new)
    before = {(path, method): operation for path, method, operation in operations(old)}
    after = {(path, method): operation for path, method, operation in operations(new)}
    changes = [Change(True, _place(name, *key), "removed") for key in before.keys() - after.keys()]
    changes += [Change(False, _place(name, *key), "added") for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        changes += _operation(_place(name, *key), comparison, before[key], after[key])
    changes += _frames(name, comparison)
    return sorted(changes, key=lambda change: (not change.breaking, change.where, change.what))


def _place(name: str, path: str, method: str) -> str:
    return f"{name}: {method.upper()} {path}"


def _operation(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    if old["operationId"] != new["operationId"]:
        yield Change(True, where, f"operationId {old['operationId']} became {new['operationId']}")
    yield from _security(where, comparison, old, new)
    yield from _parameters(where, comparison, old, new)
    yield from _body(where, comparison, old, new)
    yield from _responses(where, comparison, old, new)


def _security(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    before = old.get("security", comparison.old.get("security", []))
    after = new.get("security", comparison.new.get("security", []))
    if before != after:
        yield Change(bool(after), where, f"security {json.dumps(before)} became {json.dumps(after)}")
    scopes = old.get("x-scope"), new.get("x-scope")
    if scopes[0] != scopes[1]:
        looser = scopes[1] == "none" or (scopes[1] == "any" and scopes[0] != "none")
        yield Change(not looser, where, f"scope {scopes[0]} became {scopes[1]}")


def _parameters(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    before = {(p["in"], p["name"]): p for p in (resolve(comparison.old, p) for p in old["parameters"])}
    after = {(p["in"], p["name"]): p for p in (resolve(comparison.new, p) for p in new["parameters"])}
    for key in before.keys() - after.keys():
        yield Change(True, where, f"{key[0]} parameter {key[1]} removed")
    for key in after.keys() - before.keys():
        required = bool(after[key].get("required"))
        yield Change(required, where, f"{'required' if required else 'optional'} {key[0]} parameter {key[1]} added")
    for key in before.keys() & after.keys():
        place = f"{where} parameter {key[1]}"
        required = bool(after[key].get("required"))
        if required != bool(before[key].get("required")):
            yield Change(required, place, "became required" if required else "became optional")
        yield from _schema(place, comparison, before[key]["schema"], after[key]["schema"], Direction.SENT)


def _body(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    before = resolve(comparison.old, old.get("requestBody", {}))
    after = resolve(comparison.new, new.get("requestBody", {}))
    required = bool(after.get("required"))
    if required != bool(before.get("required")):
        yield Change(required, where, f"request body became {'required' if required else 'optional'}")
    yield from _content(f"{where} request", comparison, before, after, Direction.SENT)


def _responses(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    before, after = old.get("responses", {}), new.get("responses", {})
    for status in before.keys() - after.keys():
        yield Change(True, where, f"response {status} removed")
    for status in after.keys() - before.keys():
        yield Change(status.startswith("2"), where, f"response {status} added")
    for status in before.keys() & after.keys():
        place = f"{where} response {status}"
        was, now = resolve(comparison.old, before[status]), resolve(comparison.new, after[status])
        yield from _headers(place, comparison, was.get("headers", {}), now.get("headers", {}))
        yield from _content(place, comparison, was, now, Direction.RECEIVED)


def _headers(where: str, comparison: SchemaDiff, old: Document, new: Document) -> Iterator[Change]:
    for name in old.keys() - new.keys():
        yield Change(True, where, f"header {name} removed")
    for name in new.keys() - old.keys():
        yield Change(False, where, f"header {name} added")
    for name in old.keys() & new.keys():
        was, now = resolve(comparison.old, old[name]), resolve(comparison.new, new[name])
        if was.get("required", False) and not now.get("required", False):
            yield Change(True, where, f"header {name} may be absent")
        yield from _schema(f"{where} header {name}", comparison, was["schema"], now["schema"], Direction.RECEIVED)


def _content(where: str, comparison: SchemaDiff, old: Document, new: Document, way: Direction) -> Iterator[Change]:
    before, after = old.get("content", {}), new.get("content", {})
    for media_type in before.keys() - after.keys():
        yield Change(True, where, f"media type {media_type} removed")
    for media_type in after.keys() - before.keys():
        yield Change(False, where, f"media type {media_type} added")
    for media_type in before.keys() & after.keys():
        yield from _schema(where, comparison, before[media_type]["schema"], after[media_type]["schema"], way)


def _schema(where: str, comparison: SchemaDiff, old: Any, new: Any, way: Direction) -> Iterator[Change]:
    for breaking, path, what in comparison.compare(old, new, way):
        yield Change(breaking, f"{where} {path}".rstrip(), what)


def _frames(name: str, comparison: SchemaDiff) -> Iterator[Change]:
    """Schemas that no operation reaches by reference are what streams carry inside their text: clients receive them."""
    before = comparison.old.get("components", {}).get("schemas", {})
    after = comparison.new.get("components", {}).get("schemas", {})
    for schema in comparison.unreached_before():
        where = f"{name}: schema {schema}"
        if schema not in after:
            yield Change(True, where, "removed")
        else:
            yield from _schema(where, comparison, before[schema], after[schema], Direction.RECEIVED)


def compare_config(name: str, old: Document, new: Document) -> list[Change]:
    """Changes of the configuration schema: what a file of the old form would meet."""
    return sorted(_schema(name, SchemaDiff(old, new), old, new, Direction.SENT), key=lambda change: change.where)


def compare_metrics(name: str, old: Document, new: Document) -> list[Change]:
    """Changes of metric families: what a dashboard or an alert rule of the old form would meet."""
    before = {family["name"]: family for family in old["families"]}
    after = {family["name"]: family for family in new["families"]}
    changes = [Change(True, f"{name}: {family}", "removed") for family in sorted(before.keys() - after.keys())]
    changes += [Change(False, f"{name}: {family}", "added") for family in sorted(after.keys() - before.keys())]
    for family in sorted(before.keys() & after.keys()):
        changes += _family(f"{name}: {family}", before[family], after[family])
    return changes


def _family(where: str, old: Document, new: Document) -> Iterator[Change]:
    for key in ("type", "unit"):
        if old.get(key) != new.get(key):
            yield Change(True, where, f"{key} {old.get(key)} became {new.get(key)}")
    for key, word in (("labels", "label"), ("buckets", "bucket")):
        before, after = old.get(key, []), new.get(key, [])
        yield from (Change(True, where, f"{word} {item} removed") for item in before if item not in after)
        yield from (Change(False, where, f"{word} {item} added") for item in after if item not in before)
    for key in ("max_series", "label_values"):
        if old.get(key) != new.get(key):
            yield Change(False, where, f"{key} {json.dumps(old.get(key))} became {json.dumps(new.get(key))}")


_COMPARISONS = {
    **dict.fromkeys(OPENAPI_FILES, compare_specs),
    "config.schema": compare_config,
    "metrics": compare_metrics,
}
