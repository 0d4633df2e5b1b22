"""The second host: joined, cut off and healed, killed, ended, and kept out when it should be.

ORCH-2105, ORCH-2107, ORCH-2108, ORCH-2109, ORCH-3304.
"""

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from llorch import __version__
from llorch.client import NodeClient
from llorch.client.errors import ApiError
from llorch.service.launching import HostFacts, LaunchReport, Phase
from llorch.service.nodes import Registration
from tests.conftest import Processes
from tests.support.deployment import started
from tests.support.load import KEEPING, Load, Want, fake_answer
from tests.support.managed import HONEST, WARNINGS, Operator, fake, genuine_pool, pool, tiny
from tests.support.nodes import BOUND, REACHED, Cable, ManagerProcess, count_busy, node_entry, token_of
from tests.support.process_table import assert_none_left, engine_processes, wait_gone
from tests.support.processes import wait_for
from tests.support.service import LlorchProcess, make_config

EXPECTED = (*WARNINGS, "engine_failed", "node_changed")


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as ends:
        yield ends


def on_node(replica: dict[str, Any], node_id: str = "far") -> dict[str, Any]:
    return {**replica, "managed": {**replica["managed"], "node": node_id}}


def serve(processes: Processes, ends: ExitStack, *pools: dict[str, Any], **sections: Any) -> LlorchProcess:
    """A server that is starting; managers try until it is there."""
    usual: dict[str, Any] = {"nodes": [node_entry("far")], "node_lease_s": 3.0, "streams": KEEPING}
    config = make_config(pools, **{**usual, **sections})
    return started(ends, LlorchProcess(processes.directory, config, expected=EXPECTED))


def join(ends: ExitStack, directory: Path, url: str, *, name: str = "manager", **settings: Any) -> ManagerProcess:
    return started(ends, ManagerProcess(directory / f"{name}.log", url, **settings))


def state_of(operator: Operator) -> str:
    return str(operator.get("/v1/nodes")["nodes"][0]["state"])


def cut_and_heal(
    processes: Processes,
    ends: ExitStack,
    pools: list[dict[str, Any]],
    wants: list[Want],
    *,
    lease_s: float,
    cut_s: float,
) -> float:
    """Under load; seconds from the healing until every replica of the node is Ready again."""
    service = serve(processes, ends, *pools, node_lease_s=lease_s)
    operator = Operator(service)
    cable = ends.enter_context(Cable(service.url))
    manager = join(ends, processes.directory, cable.to_server.url, options=("--address", REACHED))
    cable.reach(manager, 2)
    service.wait_ready(3)
    engines = {each.pid: each for each in engine_processes(manager.pid)}
    oracle = fake_answer if wants[0].model == "fake" else None
    with Load(service.url, wants, clients=8, may_fail=HONEST, oracle=oracle) as load:
        load.wait_succeeded(20)
        cable.cut()
        cut_at = time.monotonic()
        wait_for(lambda: state_of(operator) == "silent", "the node is silent", lease_s + 5)
        assert operator.replica("far/0")["process"]["phase"] == "lost"
        wait_for(lambda: not any(map(count_busy, engines.values())), "the fence has ended every stale attempt", 2)
        while time.monotonic() < cut_at + cut_s:
            load.wait_succeeded(5, cut_s + 30)  # the sibling serves on
        cable.heal()
        healed_at = time.monotonic()
        for replica_id in ("far/0", "far/1"):
            operator.wait(replica_id, lambda found: found["state"] == "ready", "Ready again", 30)
        ready_s = time.monotonic() - healed_at
        load.wait_succeeded(20)
        report = load.stop()
    assert {each.pid for each in engine_processes(manager.pid)} == set(engines), "no engine was started anew"
    assert "fenced" in manager.events(), "the node cut its engines' connections by itself"
    assert ready_s < 10, ready_s
    assert report.outcomes["succeeded"] > 40, report
    moved = sum(line.get("event") == "task_requeued" for line in service.lines())
    assert moved + report.outcomes.get("WORKER_RESET", 0) > 0, "tasks ran on the node when it was cut off"
    print(f"node cut for {cut_s:g} s: Ready {ready_s:.1f} s after the healing; {report.outcomes}, {moved} moved")  # noqa: T201
    operator.close()
    assert manager.end() == 0
    assert_none_left(manager.pid, within_s=5)
    service.stop()
    assert_none_left(service.pid, within_s=5)
    return ready_s


def test_node_that_is_cut_off_and_healed_goes_on_with_its_engines(processes: Processes, ends: ExitStack) -> None:
    """Bar 4, with a lease of 1 s."""
    pools = [
        pool("near", fake(2, token_interval_ms=5)),
        pool("far", on_node(fake(2, token_interval_ms=5)), on_node(fake(2, token_interval_ms=5))),
    ]
    cut_and_heal(processes, ends, pools, [Want("fake", max_tokens=(10, 60))], lease_s=1.0, cut_s=4.0)


@pytest.mark.chaos
def test_node_of_genuine_engines_is_cut_off_for_30_s(processes: Processes, ends: ExitStack) -> None:
    """Bar 4."""
    pools = [genuine_pool("near", tiny()), genuine_pool("far", on_node(tiny()), on_node(tiny()))]
    wants = [Want("tiny", max_tokens=(100, 400), prompts=["Once upon a time"])]
    cut_and_heal(processes, ends, pools, wants, lease_s=10.0, cut_s=30.0)


def test_tasks_wait_for_a_node_that_is_cut_off_when_nobody_else_serves_their_route(
    processes: Processes, ends: ExitStack
) -> None:
    """ORCH-2105: they are requeued or end honestly, and no client that submits meanwhile is left without an answer."""
    service = serve(processes, ends, pool("far", on_node(fake(2, token_interval_ms=5))), node_lease_s=1.0)
    operator = Operator(service)
    cable = ends.enter_context(Cable(service.url))
    manager = join(ends, processes.directory, cable.to_server.url, options=("--address", REACHED))
    cable.reach(manager, 1)
    service.wait_ready(1)
    engines = engine_processes(manager.pid)
    with Load(service.url, [Want("fake")], clients=6, allowed=(503,), may_fail=HONEST, oracle=fake_answer) as load:
        load.wait_succeeded(10)
        cable.cut()
        wait_for(lambda: state_of(operator) == "silent", "the node is silent", 6)
        wait_for(lambda: not any(map(count_busy, engines)), "the fence has ended every stale attempt", 2)
        cable.heal()
        load.wait_succeeded(20)
        load.stop()
    assert engine_processes(manager.pid) == engines
    operator.close()
    assert manager.end() == 0
    assert_none_left(manager.pid, within_s=5)
    service.stop()


def test_killed_manager_takes_its_engines_along_and_the_next_one_starts_them_anew(
    processes: Processes, ends: ExitStack
) -> None:
    pools = [pool("near", fake(2, token_interval_ms=5)), pool("far", on_node(fake(2, token_interval_ms=5)))]
    service = serve(processes, ends, *pools, node_lease_s=1.0)
    operator = Operator(service)
    first = join(ends, processes.directory, service.url)
    service.wait_ready(2)
    engines = engine_processes(first.pid)
    with Load(service.url, [Want("fake")], clients=6, may_fail=HONEST, oracle=fake_answer) as load:
        load.wait_succeeded(10)
        first.signal(signal.SIGKILL)
        wait_gone(engines, 5)
        second = join(ends, processes.directory, service.url, name="second")
        service.wait_ready(2)
        load.wait_succeeded(10)
        assert operator.replica("far/0")["process"]["pid"] not in [each.pid for each in engines]

        second.signal(signal.SIGTERM)
        assert second.wait(20) == 0
        assert_none_left(second.pid)
        assert state_of(operator) == "absent"
        load.wait_succeeded(10)
        load.stop()
    operator.close()
    service.stop()


def test_second_manager_waits_until_the_first_has_left(processes: Processes, ends: ExitStack) -> None:
    """ORCH-2109."""
    service = serve(processes, ends, pool("far", on_node(fake())))
    first = join(ends, processes.directory, service.url)
    service.wait_ready(1)
    second = join(ends, processes.directory, service.url, name="second")
    wait_for(lambda: "node_not_joined" in second.events(), "told that the node is held", 30)
    assert "holds node far" in second.text
    assert not engine_processes(second.pid)
    assert first.end() == 0
    wait_for(lambda: "node_joined" in second.events(), "joined", 30)
    service.wait_ready(1)
    assert second.end() == 0
    service.stop()


SKEWED = """
import llorch
llorch.__version__ = "9.9.0"
from llorch.cli.main import main
main()
"""


def test_manager_that_may_not_join_ends_with_one_clear_message(processes: Processes, ends: ExitStack) -> None:
    """ORCH-2109, ORCH-3304: another version, a foreign token, an address that is not its own."""
    service = serve(processes, ends, pool("far", on_node(fake())))
    directory = processes.directory
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("version", {"program": ("-c", SKEWED)}, "9.9.0"),
        ("token", {"token": "lln_" + "x" * 43}, "UNAUTHENTICATED"),
        ("other", {"node_id": "other", "token": token_of("far")}, "FORBIDDEN"),
        ("address", {"options": ("--address", "10.1.2.3")}, "10.1.2.3"),
        ("listen", {"options": ("--listen", "192.0.2.1", "--address", REACHED)}, "192.0.2.1"),
    ]
    managers = [join(ends, directory, service.url, name=name, **settings) for name, settings, _ in cases]
    for manager, (name, _, words) in zip(managers, cases, strict=True):
        assert manager.wait(30) == 1, manager.text
        said = [line["text"] for line in manager.lines() if "text" in line]
        assert len(said) == 1, manager.text
        assert words in said[0], said
        assert "Traceback" not in manager.text
        assert token_of("far") not in manager.text
        if name == "version":
            assert f"llorch {__version__}" in said[0], "both versions are named"
        assert_none_left(manager.pid)
    service.stop()


def test_node_may_not_run_pools_of_others_nor_come_from_anywhere(processes: Processes, ends: ExitStack) -> None:
    """ORCH-2108."""
    nodes = [node_entry("far", pools=["far"]), node_entry("abroad", networks=["10.0.0.0/8"])]
    service = serve(processes, ends, pool("far", on_node(fake())), pool("near", on_node(fake(), "abroad")), nodes=nodes)
    service.wait_ready(0)

    async def register(node_id: str, replica_id: str) -> None:
        """As a manager that decides itself what it runs."""
        report = LaunchReport(replica_id, 0, Phase.UP, 1, url=f"http://{BOUND}:9")
        client = NodeClient(service.url, token_of(node_id))
        try:
            await client.register(Registration(node_id, "boot", __version__, BOUND, HostFacts(), (report,)))
        finally:
            await client.aclose()

    with pytest.raises(ApiError, match="FORBIDDEN: node far may not run near/0"):
        asyncio.run(register("far", "near/0"))
    with pytest.raises(ApiError, match=r"FORBIDDEN: node abroad may not join from 127\.0\.0\.1"):
        asyncio.run(register("abroad", "near/0"))
    asyncio.run(register("far", "far/0"))
    service.stop()


def test_relays_speak_tls_with_the_certificate_of_the_node(processes: Processes, ends: ExitStack) -> None:
    """ORCH-3304."""
    certificate, key = processes.directory / "node.pem", processes.directory / "node.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=far",
         "-addext", f"subjectAltName=IP:{BOUND}", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    service = serve(processes, ends, pool("far", on_node(fake(2))), nodes=[node_entry("far", ca=str(certificate))])
    options = ("--cert", str(certificate), "--key", str(key))
    manager = join(ends, processes.directory, service.url, options=options)
    service.wait_ready(1)
    with Load(service.url, [Want("fake")], clients=4, oracle=fake_answer) as load:
        load.wait_succeeded(10)
    operator = Operator(service)
    shown = operator.command("nodes")
    assert "joined" in shown
    assert "far/0 up" in shown
    assert "on far" in operator.command("pools")
    operator.close()
    assert manager.end() == 0
    assert_none_left(manager.pid, within_s=5)
    service.stop()
