"""What a schema cannot say of a configuration: parts agree, names match something, nothing is there twice.

It judges a document that the schema has judged before: parts of a wrong form are passed over, they have been told. What
it finds becomes problems of the document. How replicas are run is judged in `config_replicas`.
"""

import ssl
from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic import ValidationError as ModelError

from llorch.config_replicas import InspectModel, ReplicaRules
from llorch.config_source import Document, Path, hint
from llorch_contract.config import Key, Node, Pool, Server, Tenant

EMPTY_PROFILE = "v1"
"""The sampler profile that exists without being configured; it sets nothing."""

KEYLESS_TENANT = "local"
"""Who everybody is when no keys are configured."""

_INDISTINCT = "tasks name model and engine, which cannot tell the two routes apart; make them equal, or rename a model"
_ONE_QUEUE = "pools of one route must agree here; make them equal"
_OF_A_ROUTE = ("queue", "preemption", "price", "timeouts")
"""Sections of a pool that are those of its route."""

Part = TypeVar("Part", bound=BaseModel)


def check_rules(document: Document, inspect_model: InspectModel | None = None) -> None:
    """Add what is wrong to the document's problems. Without `inspect_model` no model file is looked at."""
    _Rules(document).check(inspect_model)


def tenant_names(keys: Iterable[Key]) -> list[str]:
    """Every tenant that there is, each once, in the order of the keys."""
    return list(dict.fromkeys(key.tenant for key in keys)) or [KEYLESS_TENANT]


class _Rules:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._pools = list(self._parts("pools", Pool))
        self._keys = list(self._parts("keys", Key))
        self._tenants = list(self._parts("tenants", Tenant))
        self._nodes = list(self._parts("nodes", Node))

    def check(self, inspect_model: InspectModel | None) -> None:
        self._check_unique()
        self._check_routes()
        self._check_profiles()
        self._check_tenants()
        self._check_exposure()
        self._check_tls()
        self._check_nodes()
        nodes = self._nodes if self._is_whole("nodes", self._nodes) else None
        ReplicaRules(self._document, self._pools, nodes).check(inspect_model)

    def _parts(self, name: str, model: type[Part]) -> Iterator[tuple[Path, Part]]:
        written = self._document.values.get(name)
        for index, value in enumerate(written if isinstance(written, list) else ()):
            try:
                yield (name, index), model.model_validate(value)
            except ModelError:
                continue

    def _is_whole(self, name: str, parts: list[tuple[Path, Part]]) -> bool:
        """No part of the list was passed over: a name that is not among them is nowhere."""
        written = self._document.values.get(name, [])
        return isinstance(written, list) and len(parts) == len(written)

    # Nothing twice

    def _check_unique(self) -> None:
        unique = self._document.check_unique
        unique(((*at, "id"), pool.id) for at, pool in self._pools)
        unique(((*at, "id"), key.id) for at, key in self._keys)
        unique(((*at, "id"), node.id) for at, node in self._nodes)
        digests = [((*at, "sha256"), key.sha256) for at, key in self._keys]
        unique(digests + [((*at, "sha256"), node.sha256) for at, node in self._nodes])
        unique(((*at, "name"), tenant.name) for at, tenant in self._tenants)
        for at, pool in self._pools:
            names = ((index, replica.id or str(index)) for index, replica in enumerate(pool.replicas))
            unique(((*at, "replicas", index, "id"), name) for index, name in names)

    # Names and parts that must match

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
        self._document.complain(path, f"differs from {self._document.place(first)}: {message}")

    def _check_profiles(self) -> None:
        written = self._document.values.get("sampler_profiles")
        profiles = [EMPTY_PROFILE, *(written if isinstance(written, dict) else ())]
        for path, pool in self._pools:
            name = pool.sampler_profile_version
            if name not in profiles:
                remedy = hint(name, profiles, "add it to sampler_profiles")
                self._document.complain((*path, "sampler_profile_version"), f"no such sampler profile; {remedy}")

    def _check_tenants(self) -> None:
        """A quota of a tenant that nobody belongs to would bind nothing, and silently."""
        if not self._is_whole("keys", self._keys):
            return  # a key of wrong form may be the one that names it
        known = tenant_names(key for _, key in self._keys)
        for path, tenant in self._tenants:
            if tenant.name not in known:
                message = f"no key belongs to this tenant; {self._tenant_hint(tenant, known)}"
                self._document.complain((*path, "name"), message)

    def _tenant_hint(self, tenant: Tenant, known: list[str]) -> str:
        if not self._keys:
            return f'without keys everybody is "{KEYLESS_TENANT}"'
        return hint(tenant.name, known, "name the tenant of a key, or add a key (`llorch keys new`)")

    def _check_nodes(self) -> None:
        """1. Address ranges are some. 2. Pools exist. 3. Certificates can be read."""
        known = [pool.id for _, pool in self._pools]
        for path, node in self._nodes:
            for index, network in enumerate(node.networks):
                if not _is_network(network):
                    message = "expected an address range, as 10.0.0.0/8, with no bit set behind the prefix"
                    self._document.complain((*path, "networks", index), message)
            unknown = [(i, name) for i, name in enumerate(node.pools or ()) if name not in known]
            for index, name in unknown if self._is_whole("pools", self._pools) else ():
                message = f"no such pool; {hint(name, known, 'name a pool of this file, or remove it')}"
                self._document.complain((*path, "pools", index), message)
            if node.ca is not None and not _has_certificates(node.ca):
                self._document.complain((*path, "ca"), "there is no such file, or it has no certificates in PEM")

    # The server

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


def _has_certificates(file: str) -> bool:
    try:
        return ssl.create_default_context(cafile=file).cert_store_stats()["x509"] > 0
    except OSError:
        return False


def _differences(one: BaseModel, other: BaseModel, names: Iterable[str]) -> list[str]:
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True
