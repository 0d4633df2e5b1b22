"""The GPUs and the memory of this host, as its driver and kernel tell them.

A GPU that the driver gave up stays in the list as lost, so that whoever runs on it hears of it. It knows nothing of
masks or orders.
"""

import threading
from dataclasses import replace
from typing import Any, Protocol

import psutil
import pynvml  # type: ignore[import-untyped]

from llorch.service.launching import Gpu, HostFacts


class Devices(Protocol):
    """Reads the hardware of one host."""

    def read(self) -> HostFacts:
        """The host as it is now. Never raises; may block for some milliseconds, so call it in a thread."""
        ...


class NvmlDevices:
    """NVIDIA GPUs through NVML, and RAM through psutil. Without driver or library there are no GPUs.

    `nvml` is the library's module. May be read from several threads.
    """

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._lock = threading.Lock()
        self._is_open = False
        self._known: dict[int, Gpu] = {}
        """As last read, by index."""
        self._resets = 0

    def read(self) -> HostFacts:
        with self._lock:
            self._read_gpus()
            memory = psutil.virtual_memory()
            return HostFacts(
                gpus=tuple(self._known[index] for index in sorted(self._known)),
                ram_total_bytes=memory.total,
                ram_available_bytes=memory.available,
                driver_resets=self._resets,
            )

    def _read_gpus(self) -> None:
        try:
            if not self._is_open:
                self._nvml.nvmlInit()
                self._is_open = True
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            self._close()
            count = 0
        for index in range(count):
            self._read_gpu(index)
        for index in [known for known in self._known if known >= count]:
            self._lose(index)  # the driver does not tell of it any more

    def _read_gpu(self, index: int) -> None:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            name = self._nvml.nvmlDeviceGetName(handle)
            total, used = self._read_memory(handle)
            self._known[index] = Gpu(index, str(name), total, used, self._read_utilization(handle))
        except self._nvml.NVMLError as exc:
            if exc.value in (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED):
                self._lose(index)

    def _read_memory(self, handle: Any) -> tuple[int, int]:
        """Bytes in all and in use; the host's where the GPU shares its memory and so has none to tell of."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        except self._nvml.NVMLError as exc:
            if exc.value != self._nvml.NVML_ERROR_NOT_SUPPORTED:
                raise
            shared = psutil.virtual_memory()
            return shared.total, shared.total - shared.available
        return int(memory.total), int(memory.used)

    def _read_utilization(self, handle: Any) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        except self._nvml.NVMLError as exc:
            if exc.value == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                return None
            raise

    def _lose(self, index: int) -> None:
        """Count it once for each loss: it is found again when it answers again."""
        known = self._known.get(index, Gpu(index, "", 0, 0))
        if not known.is_lost:
            self._resets += 1
            self._known[index] = replace(known, is_lost=True, utilization=None)

    def _close(self) -> None:
        """So that the next read begins anew, as it must after a restart of the driver."""
        if self._is_open:
            self._is_open = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                pass  # it was gone already
