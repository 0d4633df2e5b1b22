"""What a schema cannot say of replicas: how each is run, on which GPUs and ports of its host, with how much context.

Whether binaries, models and GPUs are there is found on the host of the replica, before each start; it may be another
host, and is not looked at here.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path as FilePath
from typing import Final
from urllib.parse import urlsplit

from llorch.config_source import ENV_PREFIX, Document, Path, hint
from llorch_contract.config import Engine, Launcher, Managed, Node, Pool, Replica

InspectModel = Callable[[FilePath], int | None]
"""How many tokens of context the model in a file was trained for; None where the file does not tell. Raises nothing."""

_ADAPTED: Final = (Engine.llamacpp,)
"""Engines that llorch can talk to."""

_STARTS: Final = {
    Launcher.llamacpp: Engine.llamacpp,
    Launcher.llama_server: Engine.llamacpp,
    Launcher.vllm: Engine.vllm,
    Launcher.tgi: Engine.tgi,
    Launcher.triton: Engine.triton,
}
"""What each launcher starts; `command` starts whatever it says."""

_SPLITTING: Final = (Launcher.llama_server, Launcher.command)
"""Launchers that can tell the engine ratios."""

_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")
_PLACEHOLDERS: Final = ["host", "port", "model", "alias", "slots", "ctx", "ctx_total", "api_key", "tensor_split"]

_MOST_TOKENS: Final = 2**31 - 1
"""Engines count the context of all slots together in 32 bits."""

_MASK_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"

# Remedies

_UNADAPTED = "llorch has a launcher for this engine, but no adapter that talks to it yet; use llamacpp"
_NEITHER = "needs url, where an engine listens already, or managed, for one that llorch starts"
_BOTH = "beside url: an engine either runs already or is started by llorch; remove one of the two"
_OF_MANAGED = "only with managed: the engine at a url has its GPUs already; remove it"
_OF_URL = "only with url: an engine that llorch starts is given a new key at each start; remove it"
_SPLIT_WITHOUT = "needs devices, the GPUs that the shares are of; add them, or remove it"
_SPLIT_LENGTH = "expected as many shares as devices has GPUs"
_CANNOT_SPLIT = "this launcher cannot divide a model by ratios; use the launcher llama-server, or remove it"
_NO_COMMAND = "is missing; the launcher `command` runs nothing else"
_OTHER_COMMAND = "only with the launcher `command`; set that one, or add arguments by args"
_OTHER_BINARY = "not with the launcher `command`, which runs the first word of its command; remove it"
_NO_MODEL = "is missing; what llorch starts loads the model from there"
_TOO_MANY_TOKENS = f"ctx times slots is more than {_MOST_TOKENS} tokens, which no engine can count; lower one of them"
_FIRST_ABOVE_MAX = "is more than backoff_max_s; lower it, or raise the other"
_OWN_OR_SHARED = "give each GPU to one replica, or set managed.shares_devices in both"
_NO_VARIABLE = "expected the name of an environment variable, which has no `=` and no NUL"
_OWN_VARIABLE = f"names that begin with {ENV_PREFIX} are for llorch itself; remove it"
_TWO_MASKS = "devices says which GPUs the process sees; remove one of the two"
_NUL = "has a NUL character, which no path, argument or variable can have; remove it"


@dataclass(frozen=True, slots=True)
class _Started:
    """A replica that llorch starts, its pool, and where it was written."""

    path: Path
    replica: Replica
    managed: Managed
    pool: Pool

    @property
    def takes_gpus(self) -> bool:
        """It has a mask, or takes whatever there is."""
        return bool(self.replica.devices) or not self.pool.allow_cpu


class ReplicaRules:
    """The rules of all replicas together. `nodes` is None when not all of them could be read."""

    def __init__(
        self, document: Document, pools: Sequence[tuple[Path, Pool]], nodes: Sequence[tuple[Path, Node]] | None
    ) -> None:
        self._document = document
        self._pools = pools
        self._nodes = None if nodes is None else {node.id: (path, node) for path, node in nodes}
        self._started = list(self._find_started())

    def check(self, inspect_model: InspectModel | None) -> None:
        """Add what is wrong to the document's problems."""
        for path, pool in self._pools:
            self._check_pool(path, pool)
            for index, replica in enumerate(pool.replicas):
                self._check_replica((*path, "replicas", index), replica, pool)
        for started in self._started:
            self._check_launcher(started)
            self._check_command(started)
            self._check_process(started)
            self._check_node(started)
        self._check_hosts()
        if inspect_model is not None:
            self._check_trained(inspect_model)

    def _find_started(self) -> Iterator[_Started]:
        for path, pool in self._pools:
            for index, replica in enumerate(pool.replicas):
                if replica.managed is not None:
                    yield _Started((*path, "replicas", index), replica, replica.managed, pool)

    # One pool

    def _check_pool(self, path: Path, pool: Pool) -> None:
        if pool.engine not in _ADAPTED:
            self._complain((*path, "engine"), _UNADAPTED)
        if pool.supervision.backoff_first_s > pool.supervision.backoff_max_s:
            self._complain((*path, "supervision", "backoff_first_s"), _FIRST_ABOVE_MAX)
        if pool.model_path and "\0" in pool.model_path:
            self._complain((*path, "model_path"), _NUL)
        if not pool.model_path and any(_needs_model(each.managed) for each in self._started if each.pool is pool):
            self._complain((*path, "model_path"), _NO_MODEL)

    def _check_trained(self, inspect_model: InspectModel) -> None:
        """The model file of a pool is looked at where a process of this host is to load it."""
        here = {id(started.pool) for started in self._started if started.managed.node is None}
        for path, pool in self._pools:
            if pool.model_path and "\0" not in pool.model_path and id(pool) in here:
                trained = inspect_model(FilePath(pool.model_path))
                if trained and pool.ctx > trained:
                    self._complain(
                        (*path, "ctx"), f"more than the {trained} tokens that the model was trained for; lower it"
                    )

    # One replica

    def _check_replica(self, path: Path, replica: Replica, pool: Pool) -> None:
        if replica.url is None and replica.managed is None:
            self._complain(path, _NEITHER)
        elif replica.url is not None and replica.managed is not None:
            self._complain((*path, "managed"), _BOTH)
        elif replica.managed is None:
            for name in ("devices", "tensor_split"):
                if getattr(replica, name) is not None:
                    self._complain((*path, name), _OF_MANAGED)
        elif replica.api_key is not None:
            self._complain((*path, "api_key"), _OF_URL)
        if pool.ctx * replica.slots > _MOST_TOKENS:
            self._complain((*path, "slots"), _TOO_MANY_TOKENS)

    def _check_launcher(self, started: _Started) -> None:
        """1. It starts the engine of the pool, where llorch can talk to that. 2. It has a use for the split."""
        launcher, engine, split = started.managed.launcher, started.pool.engine, started.replica.tensor_split
        if engine in _ADAPTED and _STARTS.get(launcher, engine) is not engine:  # 1
            fitting = [known.value for known, starts in _STARTS.items() if starts is engine] + ["command"]
            message = f"does not start the engine of its pool; use one of {', '.join(fitting)}"
            self._complain((*started.path, "managed", "launcher"), message)
        wrong = None if split is None else _split_problem(started, split)
        if wrong is not None:  # 2
            self._complain((*started.path, "tensor_split"), wrong)

    def _check_command(self, started: _Started) -> None:
        managed, path = started.managed, (*started.path, "managed")
        if managed.launcher is not Launcher.command:
            if managed.command is not None:
                self._complain((*path, "command"), _OTHER_COMMAND)
            return
        if managed.command is None:
            self._complain((*path, "command"), _NO_COMMAND)
        if managed.binary is not None:
            self._complain((*path, "binary"), _OTHER_BINARY)
        for index, word in enumerate(managed.command or ()):
            for name in _PLACEHOLDER.findall(word):
                if name not in _PLACEHOLDERS:
                    remedy = hint(name, _PLACEHOLDERS, f"there are {', '.join(_PLACEHOLDERS)}")
                    self._complain((*path, "command", index), f"no such placeholder; {remedy}")

    def _check_process(self, started: _Started) -> None:
        """What no process can be started with, or would undo what llorch gives it."""
        managed, path = started.managed, (*started.path, "managed")
        for name in managed.env:
            message = _variable_problem(name, has_mask=bool(started.replica.devices))
            if message is not None:
                self._complain((*path, "env", name), message)
        texts: dict[Path, str | None] = {("binary",): managed.binary, ("health_path",): managed.health_path}
        texts |= {("env", name): value for name, value in managed.env.items()}
        for words in ("args", "command"):
            texts |= {(words, index): word for index, word in enumerate(getattr(managed, words) or ())}
        for setting, text in texts.items():
            if text is not None and "\0" in text:
                self._complain((*path, *setting), _NUL)

    def _check_node(self, started: _Started) -> None:
        name, path = started.managed.node, (*started.path, "managed", "node")
        if name is None or self._nodes is None:
            return
        if name not in self._nodes:
            remedy = hint(name, list(self._nodes), "add it to nodes (`llorch nodes new`)")
            self._complain(path, f"no such node; {remedy}")
            return
        node_path, node = self._nodes[name]
        if node.pools is not None and started.pool.id not in node.pools:
            place = self._document.place((*node_path, "pools"))
            self._complain(path, f"the node may not run this pool; add the pool to {place}, or remove that list")

    # What replicas of one host share

    def _check_hosts(self) -> None:
        urls = (
            ((*path, "replicas", index, "url"), _address(replica.url))
            for path, pool in self._pools
            for index, replica in enumerate(pool.replicas)
            if replica.url is not None
        )
        self._document.check_unique(urls)
        hosts: dict[str | None, list[_Started]] = defaultdict(list)
        for started in self._started:
            hosts[started.managed.node].append(started)
        for members in hosts.values():
            ports = [((*each.path, "managed", "port"), each.managed.port) for each in members if each.managed.port]
            self._document.check_unique(ports)
            self._check_masks([each for each in members if each.takes_gpus])

    def _check_masks(self, members: Sequence[_Started]) -> None:
        """Of each replica that takes GPUs of others, the first of those is told."""
        overlaps: dict[Path, str] = {}
        for one, other in combinations(members, 2):
            if one.managed.shares_devices and other.managed.shares_devices:
                continue
            if one.replica.devices and other.replica.devices:
                if not set(one.replica.devices).isdisjoint(other.replica.devices):
                    place = self._document.place((*one.path, "devices"))
                    message = f"has a GPU that is also in {place}; {_OWN_OR_SHARED}"
                    overlaps.setdefault((*other.path, "devices"), message)
            else:
                taker, owner = (one, other) if other.replica.devices else (other, one)
                place = self._document.place(owner.path)
                message = f"without devices it takes every GPU of its host, also those of {place}; {_OWN_OR_SHARED}"
                overlaps.setdefault(taker.path, message)
        for path, message in overlaps.items():
            self._complain(path, message)

    def _complain(self, path: Path, message: str) -> None:
        self._document.complain(path, message)


def _needs_model(managed: Managed) -> bool:
    return managed.launcher is not Launcher.command or any("{model}" in word for word in managed.command or ())


def _split_problem(started: _Started, split: Sequence[float]) -> str | None:
    if not started.replica.devices:
        return _SPLIT_WITHOUT
    if len(split) != len(started.replica.devices):
        return _SPLIT_LENGTH
    return None if started.managed.launcher in _SPLITTING else _CANNOT_SPLIT


def _variable_problem(name: str, *, has_mask: bool) -> str | None:
    if not name or "=" in name or "\0" in name:
        return _NO_VARIABLE
    if name.upper().startswith(ENV_PREFIX):
        return _OWN_VARIABLE
    return _TWO_MASKS if has_mask and name == _MASK_VARIABLE else None


def _address(url: str) -> str:
    """The url in one spelling."""
    parts = urlsplit(url.rstrip("/"))
    return f"{parts.scheme}://{parts.netloc.lower()}"
