"""Loads `llorch.yaml` and the environment into one frozen tree, or says everything that is wrong with them at once.

The form of a setting is judged by the contract's schema, what a schema cannot say by the rules below. Messages carry
line, setting and remedy, and never a value, which may be a secret.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path as FilePath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jsonschema_rs import Draft202012Validator, ValidationError
from pydantic import BaseModel
from pydantic import ValidationError as ModelError

from llorch.config_source import (
    Document,
    Path,
    Schema,
    apply_environment,
    nearest,
    read_yaml,
    resolve,
    show_path,
)
from llorch.errors import ConfigError
from llorch_contract.config import Config as Settings
from llorch_contract.config import (
    Key,
    Limits,
    Log,
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
    Tenant,
    TenantDefaults,
    Timeouts,
    Tls,
)
from llorch_contract.specs import load_config_schema

__all__ = [
    "Key",
    "Limits",
    "Log",
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
    "Tenant",
    "TenantDefaults",
    "Timeouts",
    "Tls",
    "load",
    "tenant_names",
]

EMPTY_PROFILE = "v1"
"""The sampler profile that exists without being configured; it sets nothing."""

KEYLESS_TENANT = "local"
"""Who everybody is when no keys are configured."""

Part = TypeVar("Part", bound=BaseModel)


_LOG = logging.getLogger(__name__)


def load(path: FilePath | None, environ: Mapping[str, str], *, warn: Callable[[str], None] = _LOG.warning) -> Settings:
    """Read the file (None: there is none), put the environment over it, and check the whole.

    With `compat: true` unknown keys are told to `warn` and left out. Raises ConfigError with a line for each problem.
    """
    schema = load_config_schema()
    document = _read(path)
    is_compat = document.values.get("compat") is True or environ.get("LLORCH_COMPAT") == "true"
    warnings = apply_environment(document, environ, schema, strict=not is_compat)
    unknown = [document.problem(*found) for found in _drop_unknown(document.values, schema, schema, ())]
    (warnings if is_compat else document.problems).extend(unknown)
    _check_form(document, schema)
    _Rules(document).check()
    settings = _build(document)
    for warning in warnings:
        warn(str(warning))
    return settings


def tenant_names(keys: Iterable[Key]) -> list[str]:
    """Every tenant that there is, each once, in the order of the keys."""
    return list(dict.fromkeys(key.tenant for key in keys)) or [KEYLESS_TENANT]


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
    meant = nearest(key, known)
    if meant is not None:
        return f'unknown key; did you mean "{meant}"?'
    return f"unknown key; expected one of {', '.join(sorted(known))}"


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


# Rules


_INDISTINCT = "tasks name model and engine, which cannot tell the two routes apart; make them equal, or rename a model"
_ONE_QUEUE = "pools of one route must agree here; make them equal"
_OF_A_ROUTE = ("queue", "preemption", "price", "timeouts")
"""Sections of a pool that are those of its route."""


class _Rules:
    """What a schema cannot say. Parts of a wrong form are passed over here: the schema has told of them."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._pools = list(self._parts("pools", Pool))
        self._keys = list(self._parts("keys", Key))
        self._tenants = list(self._parts("tenants", Tenant))

    def check(self) -> None:
        """Add the problems to the document's."""
        self._check_unique()
        self._check_routes()
        self._check_profiles()
        self._check_tenants()
        self._check_exposure()
        self._check_tls()

    def _parts(self, name: str, model: type[Part]) -> Iterator[tuple[Path, Part]]:
        written = self._document.values.get(name)
        for index, value in enumerate(written if isinstance(written, list) else ()):
            try:
                yield (name, index), model.model_validate(value)
            except ModelError:
                continue

    def _check_unique(self) -> None:
        self._unique(((*at, "id"), pool.id) for at, pool in self._pools)
        self._unique(((*at, "id"), key.id) for at, key in self._keys)
        self._unique(((*at, "sha256"), key.sha256) for at, key in self._keys)
        self._unique(((*at, "name"), tenant.name) for at, tenant in self._tenants)
        replicas = [(at, list(enumerate(pool.replicas))) for at, pool in self._pools]
        self._unique(
            ((*at, "replicas", index, "url"), _address(replica.url)) for at, some in replicas for index, replica in some
        )
        for at, some in replicas:
            self._unique(((*at, "replicas", index, "id"), replica.id or str(index)) for index, replica in some)

    def _unique(self, entries: Iterator[tuple[Path, str]]) -> None:
        seen: dict[str, Path] = {}
        for path, value in entries:
            first = seen.setdefault(value, path)
            if first != path:
                place = f"{show_path(first)} ({self._document.origin(first)})"
                self._document.complain(path, f"the same as {place}; each needs its own")

    def _check_routes(self) -> None:
        """1. model and engine name one route. 2. Pools of one route share its queue, its rules and its timeouts."""
        firsts: dict[tuple[str, str], tuple[Path, Pool]] = {}
        for path, pool in self._pools:
            first_path, first = firsts.setdefault((pool.model, pool.engine), (path, pool))
            identity = _differences(pool, first, ("quant", "ctx", "sampler_profile_version"))
            for name in identity:
                self._complain_differs((*path, name), (*first_path, name), _INDISTINCT)
            for section in () if identity else _OF_A_ROUTE:
                mine, theirs = getattr(pool, section), getattr(first, section)
                for name in _differences(mine, theirs, type(mine).model_fields):
                    self._complain_differs((*path, section, name), (*first_path, section, name), _ONE_QUEUE)

    def _complain_differs(self, path: Path, first: Path, message: str) -> None:
        self._document.complain(path, f"differs from {show_path(first)} ({self._document.origin(first)}): {message}")

    def _check_profiles(self) -> None:
        written = self._document.values.get("sampler_profiles")
        profiles = [EMPTY_PROFILE, *(written if isinstance(written, dict) else ())]
        for path, pool in self._pools:
            name = pool.sampler_profile_version
            if name not in profiles:
                meant = nearest(name, profiles)
                hint = f'did you mean "{meant}"?' if meant else "add it to sampler_profiles"
                self._document.complain((*path, "sampler_profile_version"), f"no such sampler profile; {hint}")

    def _check_tenants(self) -> None:
        """A quota of a tenant that nobody belongs to would bind nothing, and silently."""
        written = self._document.values.get("keys", [])
        if not isinstance(written, list) or len(self._keys) < len(written):
            return  # a key of wrong form may be the one that names it
        known = tenant_names(key for _, key in self._keys)
        for path, tenant in self._tenants:
            if tenant.name not in known:
                self._document.complain(
                    (*path, "name"), f"no key belongs to this tenant; {self._tenant_hint(tenant, known)}"
                )

    def _tenant_hint(self, tenant: Tenant, known: list[str]) -> str:
        if not self._keys:
            return f'without keys everybody is "{KEYLESS_TENANT}"'
        meant = nearest(tenant.name, known)
        return f'did you mean "{meant}"?' if meant else "name the tenant of a key, or add a key (`llorch keys new`)"

    def _check_exposure(self) -> None:
        host = self._server().get("host", Server().host)
        if isinstance(host, str) and not _is_loopback(host) and not self._document.values.get("keys"):
            message = "without keys llorch binds loopback only; bind 127.0.0.1, or add a key (`llorch keys new`)"
            self._document.complain(("server", "host"), message)

    def _check_tls(self) -> None:
        tls = self._server().get("tls")
        for name, file in tls.items() if isinstance(tls, dict) else ():
            if isinstance(file, str) and not FilePath(file).is_file():
                self._document.complain(("server", "tls", name), "there is no such file")

    def _server(self) -> dict[str, Any]:
        written = self._document.values.get("server")
        return written if isinstance(written, dict) else {}


def _address(url: str) -> str:
    """The url in one spelling."""
    parts = urlsplit(url.rstrip("/"))
    return f"{parts.scheme}://{parts.netloc.lower()}"


def _differences(one: BaseModel, other: BaseModel, names: Any) -> list[str]:
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
