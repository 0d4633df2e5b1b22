"""Reads settings as people write them, YAML and environment variables, and remembers where each one stands.

It yields plain values and origins for messages; it knows nothing of what a setting means. No value is ever part of
a message: any of them may be a secret.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a setting is: keys and indexes from the top."""

Schema = Mapping[str, Any]

MAX_BYTES = 1024 * 1024
MAX_NODES = 100_000
"""Values that one document may have, every use of an alias counted: what a YAML bomb cannot pass."""
MAX_DEPTH = 32

ENV_PREFIX = "LLORCH_"
RESERVED_ENV = frozenset(
    {
        *("LLORCH_CONFIG", "LLORCH_DEMO_MODEL", "LLORCH_KEY", "LLORCH_URL"),
        *("LLORCH_ENGINE_KEY", "LLORCH_MANAGER"),
    }
)
"""Names of the environment that are no settings: the command line reads the first, engine processes get the others."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: where it was written, the setting, and what to do about it."""

    origin: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.path, self.message) if part)


@dataclass(slots=True)
class Document:
    """Settings as written. `problems` are those of the writing itself, such as a duplicate key."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: Path) -> str:
        """Where this setting, or the nearest one around it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.source)

    def place(self, path: Path) -> str:
        """The setting and where it was written, for a message about another one."""
        return f"{show_path(path)} ({self.origin(path)})"

    def problem(self, path: Path, message: str) -> Problem:
        """A problem of the setting at `path`."""
        return Problem(self.origin(path), show_path(path), message)

    def complain(self, path: Path, message: str) -> None:
        """Add a problem of the setting at `path`."""
        self.problems.append(self.problem(path, message))

    def check_unique(self, entries: Iterable[tuple[Path, object]]) -> None:
        """Add a problem for each setting that has the same value as one before it."""
        seen: dict[object, Path] = {}
        for path, value in entries:
            first = seen.setdefault(value, path)
            if first != path:
                self.complain(path, f"the same as {self.place(first)}; each needs its own")

    def sorted_problems(self) -> list[str]:
        """The problems as text, each once, in the order of the lines."""

        def line(problem: Problem) -> int:
            number = problem.origin.removeprefix(f"{self.source}:")
            return int(number) if number.isdecimal() else 0

        return list(dict.fromkeys(str(problem) for problem in sorted(self.problems, key=line)))


def show_path(path: Path) -> str:
    """`pools[0].queue.capacity`."""
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path)
    return shown.removeprefix(".")


def nearest(name: str, names: list[str]) -> str | None:
    """The name that was probably meant, or None."""
    return next(iter(get_close_matches(name, names, n=1, cutoff=0.6)), None)


def hint(name: str, known: list[str], otherwise: str) -> str:
    """What to do about a name that matches nothing."""
    meant = nearest(name, known)
    return f'did you mean "{meant}"?' if meant else otherwise


def resolve(schema: Schema, root: Schema) -> Schema:
    """The schema behind its `$ref`."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `yes`, `010`, `1:30` and dates mean what they look like, text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class's attribute)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": _finite,
    "tag:yaml.org,2002:str": str,
}
_PLAIN: list[tuple[str, str, list[str]]] = [
    ("null", r"^(null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(0|[1-9][0-9]{0,17})$", [*"-+0123456789"]),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
]
for _name, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def read_yaml(text: bytes, source: str) -> Document:
    """The document in `text`; what is wrong with it stands in its `problems`."""
    document = Document(source)
    if len(text) > MAX_BYTES:
        document.complain((), f"the file is larger than {MAX_BYTES} bytes")
        return document
    try:
        node = yaml.compose(text.decode("utf-8"), Loader=_Loader)
        if node is not None:
            _Reader(document).read_top(node)
    except UnicodeDecodeError:
        document.complain((), "the file is not UTF-8 text")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = f"{source}:{mark.line + 1}" if mark is not None else source
        document.problems.append(Problem(origin, "", f"not valid YAML: {_without_content(error.problem)}"))
    except yaml.YAMLError:
        document.complain((), "not valid YAML: a character that YAML does not allow")
    except (RecursionError, _TooLarge):
        message = (
            f"nested deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} values, counting every use of an alias"
        )
        document.complain((), message)
    return document


def parse_scalar(text: str) -> Any:
    """What the text would be as a plain scalar or a flow collection of YAML; raises ValueError."""
    document = read_yaml(b"value: " + text.encode(), "")
    if document.problems or [*document.values] != ["value"]:
        raise ValueError
    return document.values["value"]


def _without_content(problem: str | None) -> str:
    """PyYAML quotes pieces of the file in its messages: only the short ones, which are punctuation, stay."""
    return re.sub(
        r"'[^']*'|\"[^\"]*\"", lambda quote: quote[0] if len(quote[0]) < 6 else "…", problem or "cannot be parsed"
    )


class _TooLarge(Exception):
    """The document exceeds a bound."""


class _Reader:
    """Turns YAML nodes into plain values, with the origin of each."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def read_top(self, node: yaml.Node) -> None:
        """Read the whole document."""
        if not isinstance(node, yaml.MappingNode):
            message = "expected settings, as `name: value` lines"
            self._document.problems.append(Problem(self._at(node), "", message))
            return
        self._document.values = self._read_mapping(node, ())

    def _read(self, node: yaml.Node, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise _TooLarge
        if path not in self._document.origins:
            self._note(path, node)
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._read_scalar(node, path)

    def _read_mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._document.complain(path, "a key must be a plain name")
                continue
            name, inner = key.value, (*path, key.value)
            if name in values:
                first = self._document.origin(inner)
                self._document.problems.append(
                    Problem(self._at(key), show_path(inner), f"given twice, first at {first}; remove one of them")
                )
                continue
            self._note(inner, key)
            values[name] = self._read(value, inner)
        return values

    def _read_scalar(self, node: yaml.Node, path: Path) -> Any:
        known = _SCALARS.get(node.tag)
        if known is None:
            self._document.complain(path, "tags such as `!name` are not supported")
            return None
        try:
            return known(node.value)
        except ValueError:
            self._document.complain(path, "the value does not fit its tag, or is no finite number")
            return None

    def _note(self, path: Path, node: yaml.Node) -> None:
        self._document.origins[path] = self._at(node)

    def _at(self, node: yaml.Node) -> str:
        return f"{self._document.source}:{node.start_mark.line + 1}"


# Environment


def apply_environment(document: Document, environ: Mapping[str, str], schema: Schema, *, strict: bool) -> list[Problem]:
    """Put `LLORCH_SERVER__PORT=9000` and the like over the document, typed by the schema, lists by index.

    Unknown names are problems of the document, or, when not strict, returned as warnings and left out.
    """
    unknown: list[Problem] = []
    for name in sorted(environ, key=_by_number):
        if name.startswith(ENV_PREFIX) and name not in RESERVED_ENV:
            problem = _Override(document, name, schema).apply(environ[name])
            if problem is not None:
                unknown.append(problem)
    if strict:
        document.problems += unknown
        return []
    return unknown


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Sorts `…__2__…` before `…__10__…`, so that list items are appended in order."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("__")]


class _Override:
    """One environment variable on its way to its place in the document."""

    def __init__(self, document: Document, name: str, schema: Schema) -> None:
        self._document = document
        self._name = name
        self._root = schema

    def apply(self, text: str) -> Problem | None:
        """Set the value; a name that is no setting is returned as a problem."""
        container: Any = self._document.values
        schema = self._root
        path: Path = ()
        parts = self._name.removeprefix(ENV_PREFIX).split("__")
        for position, part in enumerate(parts):
            step = self._step(container, schema, part)
            if isinstance(step, str):
                return Problem(self._name, "", step)
            key, schema = step
            path = (*path, key)
            if position == len(parts) - 1:
                self._set(container, key, path, self._typed(text, schema, path))
            else:
                container = self._descend(container, key, schema, path)
        return None

    def _step(self, container: Any, schema: Schema, part: str) -> tuple[str | int, Schema] | str:
        """The key that `part` means in the container and its schema, or why it means none.

        Keys of a map of texts are names of variables, and keep their case; all others are lower-case.
        """
        name = part.lower()
        if schema.get("type") == "array":
            size = len(container) if isinstance(container, list) else 0
            if not part.isdecimal() or int(part) > size:
                return f"expected a number from 0 to {size} for the item of the list, not {name!r}"
            return int(part), resolve(schema["items"], self._root)
        properties: Schema = schema.get("properties", {})
        if name in properties:
            return name, resolve(properties[name], self._root)
        others = schema.get("additionalProperties")
        if isinstance(others, Mapping):
            inner = resolve(others, self._root)
            new = part if inner.get("type") == "string" else name
            written = container if isinstance(container, dict) else {}
            return next((key for key in written if key.lower() == name), new), inner
        meant = self._meant()
        return "unknown setting" + (f"; did you mean {meant}?" if meant else "")

    def _meant(self) -> str | None:
        """The setting with the same last part, else the nearest name."""
        names = [name.removeprefix(ENV_PREFIX) for name in setting_names(self._root)]
        name = self._name.removeprefix(ENV_PREFIX)
        meant = next((other for other in names if other.endswith(f"__{name}")), nearest(name, names))
        return ENV_PREFIX + meant if meant else None

    def _descend(self, container: Any, key: str | int, schema: Schema, path: Path) -> Any:
        """The group or list under the key, made when there is none."""
        kind = list if schema.get("type") == "array" else dict
        try:
            existing = container[key]
        except LookupError:
            existing = None
        if existing is None:
            self._set(container, key, path, kind())
            return container[key]
        if not isinstance(existing, kind):
            self._complain(path, "what is written there has another form")
            return kind()
        return existing

    def _set(self, container: Any, key: str | int, path: Path, value: Any) -> None:
        if isinstance(container, list) and key == len(container):
            container.append(value)
        else:
            container[key] = value
        self._document.origins[path] = self._name

    def _typed(self, text: str, schema: Schema, path: Path) -> Any:
        """Text stays text where the schema asks for it; everything else is read as YAML would, and judged later."""
        try:
            text.encode()
            return text if schema.get("type") == "string" else parse_scalar(text)
        except ValueError:
            self._complain(path, "cannot be read")
            return None

    def _complain(self, path: Path, message: str) -> None:
        self._document.problems.append(Problem(self._name, show_path(path), message))


def setting_names(root: Schema) -> Iterator[str]:
    """Every setting as an environment variable; items of lists with index 0, of maps with NAME."""

    def walk(schema: Schema, name: str) -> Iterator[str]:
        schema = resolve(schema, root)
        children = {key.upper(): child for key, child in schema.get("properties", {}).items()}
        if isinstance(schema.get("additionalProperties"), Mapping):
            children["NAME"] = schema["additionalProperties"]
        if "items" in schema:
            children["0"] = schema["items"]
        for key, child in children.items():
            yield from walk(child, f"{name}__{key}" if name else f"{ENV_PREFIX}{key}")
        if not children:
            yield name

    return walk(root, "")
