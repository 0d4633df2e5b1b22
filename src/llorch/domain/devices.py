"""Arithmetic of GPUs: masks, splits of a model over several GPUs, and whether something fits into memory.

A mask is a tuple of GPU indices of one host; a split gives each GPU of a mask its part of the model and of the KV
cache. Numbers are exact: a fit never depends on rounding. It knows nothing of how GPUs are read or engines told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil, floor, isfinite
from typing import Final

Mask = tuple[int, ...]

_ALIKE: Final = Fraction(1, 20)
"""GPUs whose sizes differ by no more than this part of the largest count as equal."""
_MIB: Final = 1024**2
_GIB: Final = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU of a mask, in bytes as last read."""

    index: int
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What an engine needs, in bytes. `reserve_bytes` must stay free beside it, in every memory that it uses."""

    model_bytes: int
    kv_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def split_bytes(self) -> int:
        """What is divided over the GPUs of a mask."""
        return self.model_bytes + self.kv_bytes


# ---- masks and splits


def find_overlaps(masks: Mapping[str, Mask]) -> tuple[tuple[str, str], ...]:
    """The pairs of replicas of one host that share a GPU, in the order of the mapping. An empty mask shares none."""
    return tuple((a, b) for a, b in combinations(masks, 2) if not set(masks[a]).isdisjoint(masks[b]))


def check_split(mask: Mask, split: Sequence[float]) -> str | None:
    """What is wrong with a split by ratios for this mask, in one sentence; None when nothing is, or there is none."""
    if not split:
        return None
    if len(mask) < 2:
        return f"A tensor_split needs at least 2 devices, and the mask has {len(mask)}."
    if len(split) != len(mask):
        return f"The tensor_split has {len(split)} ratios for {len(mask)} devices: give one for each."
    if not all(isfinite(ratio) and ratio > 0 for ratio in split):
        return "Every ratio of a tensor_split must be greater than 0: take the device out of the mask instead."
    return None


def check_alike(devices: Sequence[Device], split: Sequence[float] = ()) -> str | None:
    """Why this mask needs explicit ratios: GPUs of unequal size without a split (ORCH-3012). None when it does not."""
    if split or len(devices) < 2:
        return None
    small = min(devices, key=lambda device: device.total_bytes)
    large = max(devices, key=lambda device: device.total_bytes)
    if large.total_bytes - small.total_bytes <= _ALIKE * large.total_bytes:
        return None
    return (
        f"GPU {small.index} has {format_bytes(small.total_bytes)} and GPU {large.index} has"
        f" {format_bytes(large.total_bytes)}: a mask of unequal GPUs needs a tensor_split."
    )


def divide(count: int, split: Sequence[float] = ()) -> tuple[Fraction, ...]:
    """The share of each of `count` GPUs, of a sum of 1; equal ones without a split. The split must be a valid one."""
    ratios = [Fraction(ratio) for ratio in split] or [Fraction(1)] * count
    whole = sum(ratios)
    return tuple(ratio / whole for ratio in ratios)


def usable_bytes(devices: Sequence[Device], split: Sequence[float] = (), *, reserve_bytes: int = 0) -> int:
    """The most that can be divided over these GPUs: the one that is full first caps them all. Never below 0."""
    if not devices:
        return 0
    shares = divide(len(devices), split)
    rooms = (max(0, device.free_bytes - reserve_bytes) / share for device, share in zip(devices, shares, strict=True))
    return floor(min(rooms))


# ---- what fits


def needed_bytes(model_bytes: int, ctx: int, *, slots: int, kv_bytes_per_token: int, overhead: int = 0) -> int:
    """What a model with the KV cache of `slots` contexts of `ctx` tokens takes, in bytes, `overhead` included."""
    return model_bytes + ctx * slots * kv_bytes_per_token + overhead


def fit(devices: Sequence[Device], demand: Demand, *, split: Sequence[float] = ()) -> str | None:
    """Why the demand does not fit into these GPUs, with numbers, for the GPU that lacks most; None when it fits."""
    shares = divide(len(devices), split)
    lacks = [
        (ceil(demand.split_bytes * share) + demand.reserve_bytes - device.free_bytes, -position)
        for position, (device, share) in enumerate(zip(devices, shares, strict=True))
    ]
    if not lacks:
        return None
    lack, position = max(lacks)
    if lack <= 0:
        return None
    device = devices[-position]
    return _explain(demand, shares[-position], place=f"on GPU {device.index}", free_bytes=device.free_bytes)


def fit_ram(available_bytes: int, demand: Demand) -> str | None:
    """Why the demand does not fit into the host's memory, with numbers; None when it fits."""
    if demand.split_bytes + demand.reserve_bytes <= available_bytes:
        return None
    return _explain(demand, Fraction(1), place="of RAM", free_bytes=available_bytes)


def format_bytes(size: int) -> str:
    """`8.2 GiB`, or `310 MiB` below one GiB."""
    return f"{_number(size, _unit(size))} {_unit(size)}"


def _explain(demand: Demand, share: Fraction, *, place: str, free_bytes: int) -> str:
    need = ceil(demand.split_bytes * share) + demand.reserve_bytes
    unit = _unit(need)
    parts = {
        "model": ceil(demand.model_bytes * share),
        "KV": ceil(demand.kv_bytes * share),
        "reserve": demand.reserve_bytes,
    }
    told = " + ".join(f"{name} {_number(size, unit)}" for name, size in parts.items() if size)
    return f"needs {_number(need, unit)} {unit} {place} ({told}), {format_bytes(free_bytes)} are free"


def _unit(size: int) -> str:
    return "GiB" if size >= _GIB else "MiB"


def _number(size: int, unit: str) -> str:
    return f"{size / _GIB:.1f}" if unit == "GiB" else f"{size / _MIB:.0f}"
