"""A host with the GPUs and the memory that a test gives it."""

from collections.abc import Iterable
from dataclasses import replace

from llorch.service.launching import Gpu, HostFacts

GIB = 1024**3


class FakeDevices:
    """The port `poolmanager.devices.Devices`, with everything settable at any time."""

    def __init__(
        self,
        gpus: Iterable[Gpu] = (),
        *,
        ram_total_bytes: int = 64 * GIB,
        ram_available_bytes: int = 32 * GIB,
    ) -> None:
        self.gpus = {gpu.index: gpu for gpu in gpus}
        self.ram_total_bytes = ram_total_bytes
        self.ram_available_bytes = ram_available_bytes
        self.driver_resets = 0
        self.reads = 0

    def read(self) -> HostFacts:
        self.reads += 1
        gpus = tuple(self.gpus[index] for index in sorted(self.gpus))
        return HostFacts(gpus, self.ram_total_bytes, self.ram_available_bytes, self.driver_resets)

    def put(self, index: int, *, total_gib: float, used_gib: float = 0.0) -> None:
        """Add a GPU, or change its memory."""
        self.gpus[index] = Gpu(index, f"Fake {total_gib:g} GB", int(total_gib * GIB), int(used_gib * GIB), 0.0)

    def lose(self, index: int) -> None:
        """The driver gives it up, and counts a reset."""
        self.gpus[index] = replace(self.gpus[index], is_lost=True, utilization=None)
        self.driver_resets += 1

    def find(self, index: int) -> None:
        """A lost one answers again."""
        self.gpus[index] = replace(self.gpus[index], is_lost=False)
