"""Reads the hand-written contract from `openapi/` and resolves it into documents that stand alone.

Owns YAML loading and reference bundling. Knows nothing of Python code or of what makes a contract good.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

OPENAPI_FILES = ("data", "control")
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


class ContractError(Exception):
    """The contract cannot be used as it is; the message names the place."""


class _Loader(yaml.CSafeLoader):
    """Safe YAML without dates (examples hold timestamps as text) and without silently doubled keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    result: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        # Response statuses may be written as numbers; the specification means them as text.
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        if not isinstance(key, str):
            raise ContractError(f"{_line(key_node)}: key {key!r} is not text")
        if key in result:
            raise ContractError(f"{_line(key_node)}: key {key!r} is given twice")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _line(node: yaml.Node) -> str:
    return f"{Path(node.start_mark.name).name}:{node.start_mark.line + 1}"


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(path: Path) -> Document:
    """The mapping in `path`. Raises ContractError for a missing file, faulty YAML, a doubled key, or no mapping."""
    try:
        with path.open(encoding="utf-8") as stream:
            loaded = yaml.load(stream, Loader=_Loader)
    except OSError as error:
        raise ContractError(f"{path.name}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ContractError(f"{path.name}: {error}") from error
    if not isinstance(loaded, dict):
        raise ContractError(f"{path.name}: expected a mapping")
    return loaded


@dataclass(frozen=True, slots=True)
class Contract:
    """The whole contract, every reference internal to its document."""

    specs: dict[str, Document]
    config: Document
    metrics: Document


def load_contract(folder: Path) -> Contract:
    """Reads `data.yaml`, `control.yaml`, what they refer to, `config.schema.yaml` and `metrics.yaml` in `folder`."""
    return Contract(
        specs={name: bundle(folder, f"{name}.yaml") for name in OPENAPI_FILES},
        config=load_yaml(folder / "config.schema.yaml"),
        metrics=load_yaml(folder / "metrics.yaml"),
    )


def bundle(folder: Path, name: str) -> Document:
    """The OpenAPI document `name` with every component of other files that it reaches copied into it."""
    return _Bundler(folder, name).run()


class _Bundler:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._root = name
        self._files: dict[str, Document] = {}
        self._origin: dict[tuple[str, str], str] = {}
        self._components: dict[str, dict[str, Any]] = {}

    def run(self) -> Document:
        document = self._file(self._root)
        own = document.get("components", {})
        for section, entries in own.items():
            for name in entries:
                self._take(self._root, section, name)
        rest = {key: self._rewrite(value, self._root) for key, value in document.items() if key != "components"}
        sections = {section: self._components[section] for section in sorted(self._components)}
        return {**rest, "components": {k: {n: v[n] for n in sorted(v)} for k, v in sections.items()}}

    def _file(self, name: str) -> Document:
        if name not in self._files:
            self._files[name] = load_yaml(self._folder / name)
        return self._files[name]

    def _rewrite(self, node: Any, file: str) -> Any:
        if isinstance(node, list):
            return [self._rewrite(item, file) for item in node]
        if not isinstance(node, dict):
            return node
        if isinstance(node.get("$ref"), str):
            return {**node, "$ref": self._internal(node["$ref"], file)}
        return {key: self._rewrite(value, file) for key, value in node.items()}

    def _internal(self, reference: str, file: str) -> str:
        target, _, pointer = reference.partition("#")
        parts = pointer.split("/")
        if len(parts) != 4 or parts[1] != "components":
            raise ContractError(f"{file}: reference {reference!r} is not of the form FILE#/components/SECTION/NAME")
        self._take(target.removeprefix("./") or file, parts[2], parts[3])
        return f"#/components/{parts[2]}/{parts[3]}"

    def _take(self, file: str, section: str, name: str) -> None:
        known = self._origin.setdefault((section, name), file)
        if known != file:
            self._same_reference(known, file, section, name)
            return
        entries = self._components.setdefault(section, {})
        if name in entries:
            return
        try:
            source = self._file(file)["components"][section][name]
        except KeyError:
            raise ContractError(f"{file}: there is no #/components/{section}/{name}") from None
        entries[name] = {}  # a placeholder ends the recursion of components that refer to each other
        entries[name] = self._rewrite(source, file)

    def _same_reference(self, first: str, second: str, section: str, name: str) -> None:
        """An entry that only points at the other file's entry of the same name is the same component."""
        alias = self._file(second)["components"][section].get(name)
        if alias != {"$ref": f"{first}#/components/{section}/{name}"}:
            raise ContractError(f"{second}: #/components/{section}/{name} exists in {first} too")


def operations(spec: Document) -> Iterator[tuple[str, str, Document]]:
    """(path, method, operation) of every operation, in document order; parameters of the path item joined in."""
    for path, item in spec.get("paths", {}).items():
        for method, operation in item.items():
            if method in METHODS:
                parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
                yield path, method, {**operation, "parameters": parameters}


def resolve(document: Document, node: Any) -> Any:
    """`node`, or what it refers to inside `document`."""
    while isinstance(node, dict) and "$ref" in node:
        node = lookup(document, node["$ref"])
    return node


def lookup(document: Document, reference: str) -> Any:
    """What the internal `reference` (`#/a/b`) names. Raises ContractError when it names nothing."""
    target: Any = document
    for part in reference.removeprefix("#/").split("/"):
        if not isinstance(target, dict) or part not in target:
            raise ContractError(f"reference {reference!r} names nothing")
        target = target[part]
    return target
