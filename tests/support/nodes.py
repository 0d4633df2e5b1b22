"""A second host on the addresses of loopback: its pool manager, and the wires between it and the server.

The manager binds 127.0.0.2 and says that it is reached at 127.0.0.3, where a wire stands in front of each relay.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from llorch.launch.llamacpp import KEY_VARIABLE
from tests.support.network import Wire
from tests.support.process_table import url_of
from tests.support.processes import NO_TLS, Process, wait_for

BOUND, REACHED = "127.0.0.2", "127.0.0.3"


def token_of(node_id: str) -> str:
    return f"lln_{hashlib.sha256(f'test node {node_id}'.encode()).hexdigest()}"


def node_entry(node_id: str, **settings: Any) -> dict[str, Any]:
    """The node in the configuration."""
    digest = hashlib.sha256(token_of(node_id).encode()).hexdigest()
    return {"id": node_id, "sha256": digest, "networks": ["127.0.0.0/8"], **settings}


class ManagerProcess(Process):
    """`llorch pool-manager` as a process. `program` stands for `-m llorch`."""

    def __init__(
        self,
        log: Path,
        url: str,
        node_id: str = "far",
        *,
        options: Sequence[str] = (),
        token: str | None = None,
        program: Sequence[str] = ("-m", "llorch"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = [*program, "pool-manager", "--join", url, "--node", node_id, "--listen", BOUND, *options]
        super().__init__(
            words, log=log, environment={"LLORCH_NODE_TOKEN": token or token_of(node_id), **(environment or {})}
        )

    def events(self) -> list[str]:
        return [str(line.get("event")) for line in self.lines()]


def count_busy(engine: psutil.Process) -> int:
    """Slots of an engine that work, as it says itself on loopback, behind the back of relay and wires."""
    headers = {"Authorization": f"Bearer {engine.environ().get(KEY_VARIABLE)}"}
    with httpx.Client(base_url=url_of(engine), headers=headers, verify=NO_TLS, timeout=10) as http:
        if "llorch.testing.fake_engine" in engine.cmdline():
            return int(http.get("/_fake").json()["running"])
        slots = http.get("/slots")
        assert slots.status_code == 200, slots.text
        return sum(slot["is_processing"] for slot in slots.json())


class Cable:
    """Every wire between the server and one manager: `cut` as if the cable were pulled, `heal` as if it were back."""

    def __init__(self, server_url: str) -> None:
        self._ends = ExitStack()
        self.to_server = self._ends.enter_context(Wire(server_url))
        self._wires = [self.to_server]

    def reach(self, manager: Process, count: int) -> None:
        """Stand in front of each of the manager's relays, as soon as there are so many."""

        def listening() -> list[int]:
            found = psutil.Process(manager.pid).net_connections("tcp")
            return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN and each.laddr.ip == BOUND]

        wait_for(lambda: len(listening()) >= count, f"{count} relays", 30)
        for port in listening():
            wire = Wire(f"http://{BOUND}:{port}", listen=(REACHED, port))
            self._wires.append(self._ends.enter_context(wire))

    def cut(self) -> None:
        for wire in self._wires:
            wire.cut()

    def heal(self) -> None:
        for wire in self._wires:
            wire.heal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
