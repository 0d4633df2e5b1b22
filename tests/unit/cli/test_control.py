"""The commands of an operator: pools, drain, reload, nodes, pool-manager (ORCH-3271)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llorch import app
from llorch.cli.exits import Exit
from llorch.cli.main import cli
from tests.unit.client.scripted_server import ScriptedServer, body, problem

AT = "2025-11-23T04:25:00Z"
ERROR = {"code": "WORKER_RESET", "message": "The engine ended: killed by SIGKILL.", "at": AT}
PROCESS: dict[str, Any] = {
    "phase": "up", "pid": 4711, "incarnation": 2, "restarts": 1, "breaker": "closed", "cause": "signal",
    "next_start_ms": None, "load_ms": 612,
}  # fmt: skip
WAITING = {"phase": "waiting", "pid": None, "next_start_ms": 41_500, "breaker": "open", "restarts": 4}
REPLICA: dict[str, Any] = {
    "replica_id": "small/0", "state": "ready", "slots": 2, "slots_busy": 1, "engine_version": "b6500",
    "engine_version_source": "measured", "model_digest": None, "model_digest_source": "unverified",
    "determinism": "best_effort", "allow_cpu": True, "devices": [], "kv_cache_usage_ratio": 0.25, "node": None,
    "process": PROCESS, "last_error": ERROR,
}  # fmt: skip
CHANGE: dict[str, Any] = {
    "kind": "reload", "state": "running", "started_at": AT, "deadline_at": AT, "ended_at": None, "replicas_total": 2,
    "replicas_done": 1, "running": 7, "queued": 3, "moved": 0, "ready_ms": 1877, "message": None,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "revision": 2, "loaded_at": AT, "can_revert": True,
    "change": {"state": "done", "started_at": AT, "ended_at": AT, "changed": ["pools[small].ctx"], "message": None},
}  # fmt: skip


def run(server: ScriptedServer, *arguments: str) -> Result:
    environment = {"LLORCH_URL": server.url, "LLORCH_KEY": "llk_test", "LLORCH_NODE_TOKEN": ""}
    return CliRunner().invoke(cli, [*arguments], env=environment)


def serve_pool(server: ScriptedServer, *replicas: dict[str, Any], **health: Any) -> tuple[dict[str, Any], ...]:
    counts = dict.fromkeys(("starting", "loading", "self_test", "unready", "draining", "stopped", "failed"), 0)
    pool = {
        "id": "small",
        "route": {"engine": "llamacpp", "model": "tiny", "quant": None, "ctx": 2048, "sampler_profile_version": "v1"},
        "allow_cpu": True, "notice": "CPU demonstration, not for production",
        "queues": [
            {"priority": "interactive", "capacity": 64, "full_policy": "reject", "depth": 3},
            {"priority": "batch", "capacity": 64, "full_policy": "drop-lru", "depth": 0},
        ],
        "replicas": {**counts, "total": 2, "ready": 1},
    }  # fmt: skip
    told = {
        "pool_id": "small", "live": True, "ready": True, "draining": False, "change": None, "last_error": ERROR,
        "notice": pool["notice"], "replicas": list(replicas), **health,
    }  # fmt: skip
    server.on("GET", "/v1/pools", body({"pools": [pool]}))
    server.on("GET", "/v1/pools/small/health", body(told))
    return pool, told


def lines(server: ScriptedServer, *replicas: dict[str, Any], **health: Any) -> list[str]:
    serve_pool(server, *replicas, **health)
    return run(server, "pools").stdout.splitlines()


def line_of(shown: list[str], start: str) -> str:
    return next(" ".join(line.split()) for line in shown if line.startswith(start))


# pools


def test_pools_shows_health_slots_and_the_cpu_notice(server: ScriptedServer) -> None:
    shown = "\n".join(lines(server, REPLICA))
    assert "interactive 3/64 (reject), batch 0/64 (drop-lru)" in shown
    assert "1/2" in shown
    assert "b6500 (measured)" in shown
    assert "small: CPU demonstration, not for production" in shown


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "small/0 ready 1/2 up, pid 4711, 1 failure b6500"),
        ({"process": None}, "small/0 ready 1/2 not managed b6500"),
        ({"node": "gpu-2", "devices": [0, 3]}, "up, pid 4711, on gpu-2, GPU 0,3, 1 failure"),
        (
            {
                "state": "starting",
                "process": {**PROCESS, **WAITING},
            },
            "small/0 starting 1/2 waiting 42 s, 4 failures, breaker open",
        ),
        ({"state": "self-test"}, "small/0 self-test"),
    ],
)  # fmt: skip
def test_pools_tells_how_each_process_is(server: ScriptedServer, changed: dict[str, Any], words: str) -> None:
    assert words in line_of(lines(server, {**REPLICA, **changed}), "small/0")


@pytest.mark.parametrize(("state", "when"), [("ready", f"[last error, {AT}]"), ("starting", f"[{AT}]")])
def test_error_is_a_line_of_its_own_and_told_as_past_once_it_is_over(
    server: ScriptedServer, state: str, when: str
) -> None:
    """OC-POOL-3003."""
    words = "small/0: WORKER_RESET (signal): The engine ended: killed by SIGKILL."
    assert line_of(lines(server, {**REPLICA, "state": state}), "small/0:") == f"{words} {when}"


def test_pools_shows_a_change_under_way(server: ScriptedServer) -> None:
    shown = lines(server, REPLICA, change=CHANGE)
    assert line_of(shown, "small: reload") == (
        "small: reload under way · 1/2 replicas · 7 running · 3 queued · ready after 1.9 s"
    )


@pytest.mark.parametrize(("state", "busy", "words"), [("draining", 1, "draining"), ("stopped", 0, "drained")])
def test_drained_pool_is_told_from_one_that_drains(server: ScriptedServer, state: str, busy: int, words: str) -> None:
    shown = lines(server, {**REPLICA, "state": state, "slots_busy": busy}, draining=True, ready=False)
    assert words in line_of(shown, "small ").split()


def test_pools_json_is_one_object_a_pool(server: ScriptedServer) -> None:
    pool, health = serve_pool(server, REPLICA)
    assert json.loads(run(server, "pools", "--json").stdout) == {"pool": pool, "health": health}


# drain and reload


def serve_change(server: ScriptedServer, kind: str, **ended: Any) -> None:
    begun = {**CHANGE, "kind": kind}
    over = {**begun, "state": "done", "replicas_done": 2, "ended_at": AT, "deadline_at": None, **ended}
    server.on("POST", f"/v1/pools/small/{kind}", body(begun, 202))
    serve_pool(server, REPLICA, change=over)


@pytest.mark.parametrize("kind", ["drain", "reload"])
def test_change_is_followed_to_its_end(server: ScriptedServer, kind: str) -> None:
    serve_change(server, kind, moved=2)
    result = run(server, kind, "small", "--deadline-s", "1.5")
    assert (result.exit_code, result.stdout) == (
        0, f"small: {kind} done · 2/2 replicas · 2 moved · ready after 1.9 s\n",
    )  # fmt: skip
    assert server.requests[0].json == {"deadline_ms": 1500}


def test_change_that_is_not_waited_for_tells_how_it_began(server: ScriptedServer) -> None:
    serve_change(server, "drain")
    result = run(server, "drain", "small", "--no-wait", "--json")
    assert json.loads(result.stdout) == {**CHANGE, "kind": "drain"}
    assert len(server.requests) == 1
    assert server.requests[0].json == {}


@pytest.mark.parametrize(
    ("state", "words"), [("rolled_back", "everything is as it was before"), ("failed", "could be put back")]
)
def test_change_that_failed_ends_the_command_so(server: ScriptedServer, state: str, words: str) -> None:
    serve_change(server, "reload", state=state, message="small/0+: no luck")
    result = run(server, "reload", "small")
    assert result.exit_code == Exit.FAILED
    assert "small/0+: no luck" in result.stdout
    assert words in result.stderr


@pytest.mark.parametrize("seen", [None, {**CHANGE, "started_at": "2025-11-23T05:00:00Z", "state": "done"}])
def test_change_that_the_server_tells_of_no_more_is_not_followed_on(
    server: ScriptedServer, seen: dict[str, Any] | None
) -> None:
    """ORCH-3271: neither for ever after a restart of the server, nor with the end of somebody else's change."""
    server.on("POST", "/v1/pools/small/reload", body(CHANGE, 202))
    serve_pool(server, REPLICA, change=seen)
    result = run(server, "reload", "small")
    assert (result.exit_code, result.stdout) == (Exit.FAILED, "")
    assert "how it ended is not known" in result.stderr


@pytest.mark.parametrize("seen", [None, {**CONFIG["change"], "started_at": "2025-11-23T05:00:00Z"}])
def test_configuration_of_a_restarted_server_is_not_told_as_the_one_that_was_asked_for(
    server: ScriptedServer, seen: dict[str, Any] | None
) -> None:
    """ORCH-3271."""
    server.on("POST", "/v1/config/reload", body({**CONFIG, "change": {**CONFIG["change"], "state": "running"}}, 202))
    server.on("GET", "/v1/config", body({**CONFIG, "revision": 1, "change": seen}))
    result = run(server, "reload", "--config")
    assert (result.exit_code, result.stdout) == (Exit.FAILED, "")
    assert "how it ended is not known" in result.stderr


def test_configuration_is_followed_to_its_end(server: ScriptedServer) -> None:
    server.on("POST", "/v1/config/reload", body({**CONFIG, "change": {**CONFIG["change"], "state": "running"}}, 202))
    server.on("GET", "/v1/config", body({**CONFIG, "change": {**CONFIG["change"], "state": "rolled_back"}}))
    result = run(server, "reload", "--config")
    assert (result.exit_code, result.stdout) == (
        Exit.FAILED, "configuration 2: rolled back · pools[small].ctx\n",
    )  # fmt: skip
    assert "everything is as it was before" in result.stderr


def test_change_that_is_refused_says_why(server: ScriptedServer) -> None:
    server.on("POST", "/v1/pools/small/drain", problem(409, "CONFLICT", "another change of pool small is under way"))
    result = run(server, "drain", "small")
    assert result.exit_code == Exit.USAGE
    assert "another change of pool small" in result.stderr


def test_configuration_is_reloaded_and_reverted(server: ScriptedServer) -> None:
    server.on("POST", "/v1/config/reload", body(CONFIG, 202))
    server.on("POST", "/v1/config/revert", body({**CONFIG, "revision": 3}, 202))
    result = run(server, "reload", "--config")
    assert (result.exit_code, result.stdout) == (0, "configuration 2: done · pools[small].ctx\n")
    assert run(server, "reload", "--revert").stdout.startswith("configuration 3: done")


@pytest.mark.parametrize("words", [
        (), ("small", "--config"), ("--config", "--revert"), ("small", "--revert"), ("--config", "--deadline-s", "3"),
    ])  # fmt: skip
def test_reload_is_of_one_thing(server: ScriptedServer, words: tuple[str, ...]) -> None:
    result = run(server, "reload", *words)
    assert result.exit_code == Exit.USAGE
    assert not server.requests


# nodes


def test_nodes_shows_hosts_their_gpus_and_processes(server: ScriptedServer) -> None:
    gib = 1 << 30
    gpu = {
        "index": 0,
        "name": "A100",
        "total_bytes": 40 * gib,
        "used_bytes": 10 * gib,
        "utilization": 0.5,
        "is_lost": False,
    }
    gpus = [gpu, {**gpu, "index": 1, "is_lost": True}]
    host = {"gpus": gpus, "ram_total_bytes": 64 * gib, "ram_available_bytes": gib, "driver_resets": 1}
    node = {
        "node_id": "gpu-2", "state": "joined", "since": "2025-11-23T04:25:00.123Z",
        "manager_version": "0.1.0", "address": "10.0.0.2", "lease_remaining_ms": 8400, "host": host,
        "replicas": [{"replica_id": "small/0", "phase": "up", "incarnation": 1}],
    }  # fmt: skip
    absent = {**node, "node_id": "gpu-3", "state": "absent", "since": None, "manager_version": None, "address": None,
              "lease_remaining_ms": None, "host": None, "replicas": []}  # fmt: skip
    server.on("GET", "/v1/nodes", body({"nodes": [node, absent]}))
    shown = run(server, "nodes").stdout.splitlines()
    assert line_of(shown, "gpu-2 ") == f"gpu-2 joined {AT} 8.4 s 0.1.0 10.0.0.2 1.0 of 64.0 GiB free small/0 up"
    assert line_of(shown, "gpu-3") == "gpu-3 absent"
    assert line_of(shown, "gpu-2 GPU 0") == "gpu-2 GPU 0 A100: 10.0 of 40.0 GiB used, 50% busy"
    assert line_of(shown, "gpu-2 GPU 1") == "gpu-2 GPU 1 A100: LOST"
    told = [json.loads(line) for line in run(server, "nodes", "--json").stdout.splitlines()]
    assert told == [node, absent]


def test_no_nodes_is_told_with_the_way_to_one(server: ScriptedServer) -> None:
    server.on("GET", "/v1/nodes", body({"nodes": []}))
    result = run(server, "nodes")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "llorch nodes new" in result.stderr


def test_new_node_has_a_token_and_an_entry_that_the_configuration_takes(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["nodes", "new", "--id", "gpu-2", "--network", "10.0.0.0/8"])
    token, _, *entry = result.stdout.splitlines()
    assert token.startswith("lln_")
    assert token not in "".join(entry)
    file = tmp_path / "llorch.yaml"
    pools = "pools:\n  - {id: p, engine: llamacpp, model: m, replicas: [{url: 'http://127.0.0.1:1'}]}"
    file.write_text("\n".join([*entry, pools]))
    checked = CliRunner().invoke(cli, ["check-config", str(file)])
    assert checked.exit_code == 0, checked.stderr


# pool-manager


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[app.NodeOptions]:
    ran: list[app.NodeOptions] = []
    monkeypatch.setattr(app, "run_pool_manager", ran.append)
    return ran


def test_pool_manager_takes_its_token_from_the_environment_and_out_of_it(options: list[app.NodeOptions]) -> None:
    arguments = ["pool-manager", "--join", "http://h:1", "--node", "n", "--listen", "10.0.0.2"]
    seen = CliRunner(env={"LLORCH_NODE_TOKEN": "lln_x"}).invoke(cli, arguments)
    assert seen.exit_code == 0, seen.stderr
    [told] = options
    assert (told.url, told.token, told.node_id, told.address) == ("http://h:1", "lln_x", "n", "10.0.0.2")
    assert "LLORCH_NODE_TOKEN" not in os.environ, "engines would inherit it"


def test_pool_manager_takes_its_token_from_a_file(options: list[app.NodeOptions], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("lln_y\n")
    arguments = ["pool-manager", "--join", "http://h:1", "--address", "a.test", "--token-file", str(file)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert (options[0].token, options[0].address, options[0].listen) == ("lln_y", "a.test", "127.0.0.1")


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"lln_y lln_z"])
def test_file_that_is_no_token_is_told_with_its_name(
    options: list[app.NodeOptions], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    seen = CliRunner().invoke(cli, ["pool-manager", "--join", "http://h:1", "--token-file", str(file)])
    assert (seen.exit_code, options) == (Exit.USAGE, [])
    assert "there is no token in" in seen.stderr
    assert "lln_" not in seen.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--join", "http://h:1"),
        ("--join", "http://h:1", "--token", ""),
        ("--token", "t"),
        ("--join", "http://h:1", "--token", "t", "--cert", __file__),
        ("--join", "http://h:1", "--token", "t", "--node", "no such name"),
    ],
)
def test_pool_manager_needs_a_server_one_token_and_a_whole_certificate(
    options: list[app.NodeOptions], words: tuple[str, ...]
) -> None:
    assert CliRunner(env={"LLORCH_URL": ""}).invoke(cli, ["pool-manager", *words]).exit_code == Exit.USAGE
    assert not options
