"""How one configuration differs from another: for people as paths of settings, for a reload as what it has to do.

Values are never told, they may be secrets. What becomes of a difference is not known here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from pydantic import BaseModel

from llorch import config

_AT_RESTART: Final = ("server", "log", "streams", "compat", "node_lease_s")
"""Sections that are read when llorch starts, and never again."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two configurations. Paths are as `pools[small].ctx`: entries of lists by their names.

    `needs_restart` are those of `changed` that take effect only when llorch starts, and `keys` where there are keys now
    and were none, or the other way round. A pool counts as changed when anything of its own entry is another.
    """

    changed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()
    pools_added: frozenset[str] = frozenset()
    pools_removed: frozenset[str] = frozenset()
    pools_changed: frozenset[str] = frozenset()


def difference(old: config.Settings, new: config.Settings) -> Difference:
    """What `new` has other than `old`; nothing is changed only where both are equal."""
    changed = tuple(_differ(old, new, ""))
    at_restart = [path for path in changed if path.partition(".")[0] in _AT_RESTART]
    appear_or_go = ["keys"] if bool(old.keys) != bool(new.keys) else []
    before, after = ({pool.id: pool for pool in settings.pools} for settings in (old, new))
    return Difference(
        changed=changed,
        needs_restart=(*at_restart, *appear_or_go),
        pools_added=frozenset(after.keys() - before.keys()),
        pools_removed=frozenset(before.keys() - after.keys()),
        pools_changed=frozenset(name for name in before.keys() & after.keys() if before[name] != after[name]),
    )


def _differ(old: object, new: object, path: str) -> Iterator[str]:
    """The paths at which the values differ, as deep as both have something there."""
    if old == new:
        return
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        for name in type(old).model_fields:
            yield from _differ(getattr(old, name), getattr(new, name), f"{path}.{name}".removeprefix("."))
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _differ_by_name(old, new, path + ".{}")
    elif isinstance(old, Sequence) and isinstance(new, Sequence) and _has_entries(chain(old, new)):
        yield from _differ_by_name(_named(old), _named(new), path + "[{}]", order=path)
    else:
        yield path


def _differ_by_name(
    old: Mapping[str, object], new: Mapping[str, object], shape: str, *, order: str | None = None
) -> Iterator[str]:
    """Entries that are in one of both or differ; `order` is told where entries of both stand in another order."""
    for name in dict.fromkeys(chain(old, new)):
        path = shape.format(name)
        if name in old and name in new:
            yield from _differ(old[name], new[name], path)
        else:
            yield path
    if order is not None and [name for name in old if name in new] != [name for name in new if name in old]:
        yield order


def _has_entries(items: Iterable[object]) -> bool:
    return any(isinstance(item, BaseModel) for item in items)


def _named(entries: Sequence[object]) -> dict[str, object]:
    """Entries of a list by what they are called, else by their number."""
    return {
        str(getattr(entry, "id", None) or getattr(entry, "name", None) or number): entry
        for number, entry in enumerate(entries)
    }
