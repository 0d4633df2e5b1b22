"""Masks, splits and what fits, with exact numbers."""

from fractions import Fraction
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch.domain.devices import (
    Demand,
    Device,
    check_alike,
    check_split,
    divide,
    find_overlaps,
    fit,
    fit_ram,
    format_bytes,
    needed_bytes,
    usable_bytes,
)

GIB = 1024**3
RATIOS = st.one_of(st.integers(1, 100).map(float), st.floats(0.01, 100))


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[Device], tuple[float, ...]]:
    """1 to 8 unequal GPUs, some of them in use, with ratios or without."""
    count = draw(st.integers(1, 8))
    devices = []
    for index in range(count):
        total = draw(st.integers(1, 192 * GIB))
        devices.append(Device(index, total, draw(st.integers(0, total))))
    split = draw(st.lists(RATIOS, min_size=count, max_size=count)) if count > 1 and draw(st.booleans()) else []
    return devices, tuple(split)


def gpu(index: int, total_gib: float, free_gib: float | None = None) -> Device:
    return Device(index, int(total_gib * GIB), int((total_gib if free_gib is None else free_gib) * GIB))


# ---- masks and splits


def test_replicas_that_share_a_gpu_are_told_in_pairs() -> None:
    """ORCH-3011."""
    masks = {"a/0": (0, 1), "a/1": (2,), "b/0": (1, 2), "c/0": ()}
    assert find_overlaps(masks) == (("a/0", "b/0"), ("a/1", "b/0"))
    assert find_overlaps({}) == ()


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(0, 7), unique=True).map(tuple), max_size=6))
def test_overlaps_are_exactly_the_pairs_with_a_common_gpu(masks: dict[str, tuple[int, ...]]) -> None:
    found = set(find_overlaps(masks))
    names = list(masks)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            assert ((first, second) in found) is any(index in masks[second] for index in masks[first])


@pytest.mark.parametrize(
    ("mask", "split", "problem"),
    [
        ((0, 1), (3.0, 1.0), None),
        ((), (), None),
        ((0,), (), None),
        ((0,), (1.0,), "at least 2 devices, and the mask has 1"),
        ((), (1.0, 1.0), "at least 2 devices, and the mask has 0"),
        ((0, 1), (1.0, 1.0, 1.0), "has 3 ratios for 2 devices"),
        ((0, 1), (1.0, 0.0), "greater than 0"),
        ((0, 1), (1.0, -1.0), "greater than 0"),
        ((0, 1), (1.0, nan), "greater than 0"),
        ((0, 1), (1.0, inf), "greater than 0"),
    ],
)
def test_split_needs_one_positive_ratio_for_each_of_two_devices(
    mask: tuple[int, ...], split: tuple[float, ...], problem: str | None
) -> None:
    """ORCH-3012."""
    found = check_split(mask, split)
    assert found is None if problem is None else problem in str(found)


def test_unequal_gpus_need_ratios() -> None:
    """ORCH-3012."""
    assert check_alike([gpu(0, 24), gpu(3, 16)]) == (
        "GPU 3 has 16.0 GiB and GPU 0 has 24.0 GiB: a mask of unequal GPUs needs a tensor_split."
    )
    assert check_alike([gpu(0, 24), gpu(3, 16)], (3, 2)) is None
    assert check_alike([gpu(0, 24)]) is None


def test_gpus_within_five_percent_are_alike() -> None:
    assert check_alike([Device(0, 100, 0), Device(1, 95, 0)]) is None
    assert check_alike([Device(0, 100, 0), Device(1, 94, 0)]) is not None


@given(machines())
def test_shares_sum_to_one_and_follow_the_ratios(machine: tuple[list[Device], tuple[float, ...]]) -> None:
    devices, split = machine
    shares = divide(len(devices), split)
    assert sum(shares) == 1
    ratios = split or (1.0,) * len(devices)
    for share, ratio in zip(shares, ratios, strict=True):
        assert share * Fraction(ratios[0]) == shares[0] * Fraction(ratio)


# ---- what fits


def test_even_split_is_capped_by_the_smallest_gpu() -> None:
    """ORCH-3012."""
    assert usable_bytes([gpu(0, 24), gpu(1, 24, 10)]) == 20 * GIB


def test_ratios_are_capped_by_the_gpu_that_is_full_first() -> None:
    """ORCH-3012."""
    assert usable_bytes([gpu(0, 24), gpu(1, 8)], (3, 1)) == 32 * GIB
    assert usable_bytes([gpu(0, 24), gpu(1, 4)], (3, 1)) == 16 * GIB
    assert usable_bytes([gpu(0, 24), gpu(1, 8)], (3, 1), reserve_bytes=4 * GIB) == 16 * GIB
    assert usable_bytes([]) == 0


@given(machines(), st.integers(0, 2 * GIB), st.data())
def test_fit_and_usable_bytes_agree_to_the_byte(
    machine: tuple[list[Device], tuple[float, ...]], reserve: int, data: st.DataObject
) -> None:
    devices, split = machine
    usable = usable_bytes(devices, split, reserve_bytes=reserve)
    model = data.draw(st.one_of(st.sampled_from([usable, usable + 1, max(0, usable - 1)]), st.integers(0, 2 * usable)))
    kv = data.draw(st.integers(0, model))
    fits = fit(devices, Demand(model - kv, kv, reserve), split=split) is None
    has_reserve = all(device.free_bytes >= reserve for device in devices)
    assert fits is (model <= usable and has_reserve)


@given(machines(), st.integers(0, 400 * GIB))
def test_even_split_uses_no_more_than_the_smallest_free_on_each(
    machine: tuple[list[Device], tuple[float, ...]], model: int
) -> None:
    devices, _ = machine
    smallest = min(device.free_bytes for device in devices)
    assert usable_bytes(devices) == smallest * len(devices)
    assert (fit(devices, Demand(model)) is None) is (model <= smallest * len(devices))


@given(machines(), st.integers(0, 400 * GIB), st.integers(0, 8 * GIB))
def test_more_free_memory_never_makes_it_worse(
    machine: tuple[list[Device], tuple[float, ...]], model: int, more: int
) -> None:
    devices, split = machine
    roomier = [Device(device.index, device.total_bytes, device.free_bytes + more) for device in devices]
    if fit(devices, Demand(model), split=split) is None:
        assert fit(roomier, Demand(model), split=split) is None


def test_misfit_is_told_with_numbers_for_the_gpu_that_lacks_most() -> None:
    """ORCH-3003."""
    devices = [gpu(0, 24, 14), gpu(1, 24, 8.2)]
    demand = Demand(int(18.2 * GIB), int(8.6 * GIB))
    assert fit(devices, demand) == "needs 13.4 GiB on GPU 1 (model 9.1 + KV 4.3), 8.2 GiB are free"


def test_reserve_must_stay_free_on_every_gpu() -> None:
    devices = [gpu(0, 8, 5), gpu(1, 8, 8)]
    assert fit(devices, Demand(8 * GIB, 0, GIB)) is None
    assert fit(devices, Demand(10 * GIB, 0, GIB)) == (
        "needs 6.0 GiB on GPU 0 (model 5.0 + reserve 1.0), 5.0 GiB are free"
    )
    assert fit([gpu(0, 8, 0.5)], Demand(0, 0, GIB)) == "needs 1.0 GiB on GPU 0 (reserve 1.0), 512 MiB are free"


def test_memory_of_the_host_is_one_whole() -> None:
    demand = Demand(96 * 1024**2, 90 * 1024**2, 512 * 1024**2)
    assert fit_ram(698 * 1024**2, demand) is None
    assert fit_ram(697 * 1024**2, demand) == ("needs 698 MiB of RAM (model 96 + KV 90 + reserve 512), 697 MiB are free")


def test_needed_bytes_count_every_slot() -> None:
    assert needed_bytes(1000, 100, slots=4, kv_bytes_per_token=2, overhead=50) == 1850


@pytest.mark.parametrize(("size", "text"), [(0, "0 MiB"), (310 * 1024**2, "310 MiB"), (GIB, "1.0 GiB")])
def test_sizes_are_told_in_binary_units(size: int, text: str) -> None:
    assert format_bytes(size) == text
