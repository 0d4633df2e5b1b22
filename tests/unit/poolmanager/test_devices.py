"""What NVML tells becomes host facts, and what it refuses to tell becomes no exception."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
import pytest

from llorch.poolmanager.devices import Devices, NvmlDevices
from llorch.service.launching import Gpu
from llorch.testing.devices import GIB, FakeDevices


@dataclass
class Card:
    name: str = "Card"
    total: int = 24 * GIB
    used: int = 4 * GIB
    load: int = 50
    fails: int | None = None
    """Error code of every call that names it."""
    memory_fails: int | None = None
    load_fails: int | None = None


class FakeNvml:
    """Stands in for the module pynvml: its calls, with its own error classes."""

    NVMLError = pynvml.NVMLError
    NVML_ERROR_GPU_IS_LOST = pynvml.NVML_ERROR_GPU_IS_LOST
    NVML_ERROR_RESET_REQUIRED = pynvml.NVML_ERROR_RESET_REQUIRED
    NVML_ERROR_NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED

    def __init__(self, *cards: Card) -> None:
        self.cards = list(cards)
        self.init_fails: int | None = None
        self.count_fails: int | None = None
        self.is_open = False
        self.inits = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.inits += 1
        self._answer(self.init_fails)
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._need_open()
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._need_open()
        self._answer(self.count_fails)
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        self._need_open()
        return self._card(self.cards[index], None)

    def nvmlDeviceGetName(self, handle: Card) -> str:  # noqa: N802
        return self._card(handle, None).name

    def nvmlDeviceGetMemoryInfo(self, handle: Card) -> Any:  # noqa: N802
        card = self._card(handle, handle.memory_fails)
        return SimpleNamespace(total=card.total, used=card.used, free=card.total - card.used)

    def nvmlDeviceGetUtilizationRates(self, handle: Card) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self._card(handle, handle.load_fails).load, memory=1)

    def _card(self, card: Card, also_fails: int | None) -> Card:
        self._answer(card.fails)
        self._answer(also_fails)
        return card

    def _need_open(self) -> None:
        if not self.is_open:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    @staticmethod
    def _answer(code: int | None) -> None:
        if code is not None:
            raise pynvml.NVMLError(code)


def test_gpus_and_memory_are_read() -> None:
    nvml = FakeNvml(Card("A100"), Card("T4", total=16 * GIB, used=0, load=0))
    facts = NvmlDevices(nvml).read()
    assert facts.gpus == (Gpu(0, "A100", 24 * GIB, 4 * GIB, 0.5), Gpu(1, "T4", 16 * GIB, 0, 0.0))
    assert facts.ram_total_bytes == psutil.virtual_memory().total
    assert 0 < facts.ram_available_bytes <= facts.ram_total_bytes
    assert facts.driver_resets == 0


def test_every_read_is_new_and_the_library_is_opened_once() -> None:
    nvml = FakeNvml(Card())
    devices = NvmlDevices(nvml)
    devices.read()
    nvml.cards[0].used = 20 * GIB
    assert devices.read().gpus[0].used_bytes == 20 * GIB
    assert nvml.inits == 1


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_NO_PERMISSION]
)
def test_host_without_a_driver_has_no_gpus_until_there_is_one(code: int) -> None:
    nvml = FakeNvml(Card())
    nvml.init_fails = code
    devices = NvmlDevices(nvml)
    assert devices.read().gpus == ()
    nvml.init_fails = None
    assert len(devices.read().gpus) == 1
    assert devices.read().driver_resets == 0


def test_this_machine_is_read_with_the_real_library() -> None:
    facts = NvmlDevices().read()
    assert facts.ram_total_bytes > 0
    assert facts.driver_resets == 0


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED])
def test_lost_gpu_stays_in_the_list_and_counts_once_for_each_loss(code: int) -> None:
    """ORCH-3038."""
    nvml = FakeNvml(Card("A"), Card("B"))
    devices = NvmlDevices(nvml)
    devices.read()
    nvml.cards[1].fails = code
    for facts in [devices.read() for _ in range(3)]:
        assert facts.gpus == (Gpu(0, "A", 24 * GIB, 4 * GIB, 0.5), Gpu(1, "B", 24 * GIB, 4 * GIB, None, is_lost=True))
        assert facts.driver_resets == 1
    nvml.cards[1].fails = None
    assert not devices.read().gpus[1].is_lost
    nvml.cards[1].fails = code
    assert devices.read().driver_resets == 2


def test_gpu_that_is_lost_from_the_beginning_is_known_by_its_index() -> None:
    nvml = FakeNvml(Card(fails=pynvml.NVML_ERROR_GPU_IS_LOST))
    assert NvmlDevices(nvml).read().gpus == (Gpu(0, "", 0, 0, None, is_lost=True),)


def test_loss_in_the_middle_of_a_read_is_a_loss() -> None:
    for lost in (Card(memory_fails=pynvml.NVML_ERROR_GPU_IS_LOST), Card(load_fails=pynvml.NVML_ERROR_GPU_IS_LOST)):
        facts = NvmlDevices(FakeNvml(lost)).read()
        assert facts.gpus[0].is_lost
        assert facts.driver_resets == 1


def test_gpu_that_vanishes_from_the_count_is_lost() -> None:
    nvml = FakeNvml(Card("A"), Card("B"))
    devices = NvmlDevices(nvml)
    devices.read()
    del nvml.cards[1]
    facts = devices.read()
    assert [gpu.is_lost for gpu in facts.gpus] == [False, True]
    assert facts.driver_resets == 1


def test_restarted_driver_loses_the_gpus_and_finds_them_again() -> None:
    nvml = FakeNvml(Card())
    devices = NvmlDevices(nvml)
    devices.read()
    nvml.count_fails = nvml.init_fails = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    for _ in range(2):
        assert devices.read().gpus[0].is_lost
    nvml.count_fails = nvml.init_fails = None
    facts = devices.read()
    assert not facts.gpus[0].is_lost
    assert facts.driver_resets == 1


def test_what_a_gpu_does_not_support_is_unknown() -> None:
    nvml = FakeNvml(Card(load_fails=pynvml.NVML_ERROR_NOT_SUPPORTED))
    assert NvmlDevices(nvml).read().gpus[0].utilization is None


def test_gpu_that_shares_the_memory_of_the_host_has_that_memory() -> None:
    gpu = NvmlDevices(FakeNvml(Card(memory_fails=pynvml.NVML_ERROR_NOT_SUPPORTED))).read().gpus[0]
    assert gpu.total_bytes == psutil.virtual_memory().total
    assert 0 < gpu.used_bytes < gpu.total_bytes


def test_any_other_error_leaves_the_gpu_as_it_was_last_read() -> None:
    nvml = FakeNvml(Card())
    devices = NvmlDevices(nvml)
    before = devices.read().gpus
    nvml.cards[0].fails = pynvml.NVML_ERROR_UNKNOWN
    facts = devices.read()
    assert facts.gpus == before
    assert facts.driver_resets == 0


def test_fake_devices_tell_what_a_test_gave_them() -> None:
    fake = FakeDevices(ram_available_bytes=GIB)
    devices: Devices = fake
    steps: list[Callable[[], None]] = [
        lambda: fake.put(1, total_gib=24, used_gib=4),
        lambda: fake.lose(1),
        lambda: fake.find(1),
    ]
    seen = []
    for step in steps:
        step()
        facts = devices.read()
        seen.append((facts.gpus[0].is_lost, facts.driver_resets, facts.gpus[0].used_bytes))
    assert seen == [(False, 0, 4 * GIB), (True, 1, 4 * GIB), (False, 1, 4 * GIB)]
    assert (devices.read().ram_available_bytes, fake.reads) == (GIB, 4)
