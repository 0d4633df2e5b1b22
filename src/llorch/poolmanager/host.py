"""The host as its manager sees it, read every 2 s: GPUs, memory, and how often the kernel killed for memory."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

from llorch.poolmanager.devices import Devices
from llorch.service.launching import HostFacts

READ_S: Final = 2.0
"""Between two readings."""

CGROUPS: Final = Path("/sys/fs/cgroup")


class Host:
    """The newest facts of the host. Readings run in a thread."""

    def __init__(self, devices: Devices, log: FilteringBoundLogger) -> None:
        self._devices = devices
        self._log = log
        self._oom_kills: deque[int] = deque([read_oom_kills()], maxlen=2)
        self.facts = HostFacts()

    async def read(self) -> HostFacts:
        """The facts as they are now, which are the newest from then on."""
        self.facts = await asyncio.to_thread(self._devices.read)
        return self.facts

    async def watch(self) -> None:
        """Read for ever."""
        while True:
            try:
                await self.read()
            except Exception as exc:  # noqa: BLE001 (it is told; without it engines would be kept by old facts for ever)
                self._log.error("unforeseen_error", where="pool manager, host", exc_info=exc)
            self._oom_kills.append(read_oom_kills())
            await asyncio.sleep(READ_S)

    def count_oom_kills(self) -> int:
        """How often the kernel killed something here for memory in the last 2 to 4 seconds; 0 where it does not tell.

        Older ones explain nothing: each process that is killed so is noticed at once.
        """
        return max(0, read_oom_kills() - self._oom_kills[0])


def read_oom_kills(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """How often the kernel has killed for memory in our control group (version 2); 0 where that is not told."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
        group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
        text = (cgroups / group.lstrip("/") / "memory.events").read_text(encoding="ascii")
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError, IndexError):
        return 0
