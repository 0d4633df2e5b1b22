"""The host as its manager sees it: newest facts, and kills for memory counted for a moment only."""

import asyncio
from pathlib import Path

import pytest
from structlog.testing import LogCapture

from llorch.poolmanager import host as host_module
from llorch.poolmanager.host import Host, read_oom_kills
from llorch.service.launching import HostFacts
from llorch.testing.devices import FakeDevices
from tests.unit.poolmanager.supervised import make_log


class Counted(FakeDevices):
    """Tells when it was read."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Semaphore(0)

    def read(self) -> HostFacts:
        self._loop.call_soon_threadsafe(self._told.release)
        return super().read()

    async def read_more(self, count: int) -> None:
        """Return when it was read so often from now on; everything read before the last of them is in use then."""
        while not self._told.locked():
            await self._told.acquire()
        async with asyncio.timeout(10):
            for _ in range(count):
                await self._told.acquire()


@pytest.mark.parametrize(
    ("own", "group", "events", "count"),
    [
        ("0::/\n", "", "low 0\noom 3\noom_kill 2\noom_group_kill 1\n", 2),
        ("12:cpu:/x\n0::/system.slice/llorch.service\n", "system.slice/llorch.service", "oom_kill 7\n", 7),
        ("0::/\n", "", "low 0\n", 0),
        ("0::/\n", "", "oom_kill many\n", 0),
        ("0::/\n", "elsewhere", "oom_kill 5\n", 0),
    ],
)
def test_kills_for_memory_are_read_from_the_own_control_group(
    tmp_path: Path, own: str, group: str, events: str, count: int
) -> None:
    """ORCH-3039."""
    (tmp_path / "own").write_text(own)
    (tmp_path / "cgroups" / group).mkdir(parents=True)
    (tmp_path / "cgroups" / group / "memory.events").write_text(events)
    assert read_oom_kills(tmp_path / "cgroups", tmp_path / "own") == count


def test_host_without_control_groups_tells_of_no_kills(tmp_path: Path) -> None:
    assert read_oom_kills(tmp_path, tmp_path / "absent") == 0


async def test_old_kills_explain_nothing_and_facts_are_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """ORCH-3039."""
    kills = 5
    monkeypatch.setattr(host_module, "READ_S", 0.0)
    monkeypatch.setattr(host_module, "read_oom_kills", lambda: kills)
    devices = Counted()
    host = Host(devices, make_log(LogCapture()))
    assert host.facts == HostFacts()
    assert host.count_oom_kills() == 0
    kills = 6
    assert host.count_oom_kills() == 1
    watch = asyncio.create_task(host.watch())
    await devices.read_more(3)
    assert host.count_oom_kills() == 0
    devices.put(0, total_gib=8)
    await devices.read_more(2)
    assert host.facts.gpus[0].index == 0
    watch.cancel()


async def test_reading_that_fails_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Counted):
        def read(self) -> HostFacts:
            super().read()
            raise RuntimeError("a bug")

    monkeypatch.setattr(host_module, "READ_S", 0.0)
    devices, capture = Broken(), LogCapture()
    watch = asyncio.create_task(Host(devices, make_log(capture)).watch())
    await devices.read_more(3)
    watch.cancel()
    assert capture.entries[0]["event"] == "unforeseen_error"
