"""Every operation of both contracts, as schemathesis generates calls of it, against a live server with keys.

ORCH-2006, ORCH-2045, ORCH-2046. How it judges stands in `schemathesis.toml`. The control plane comes last: it drains
the one pool and reloads it, again and again.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llorch_contract.routes import ROUTES
from llorch_contract.specs import load_spec
from tests.conftest import Processes
from tests.support.identities import Identity
from tests.support.processes import ROOT
from tests.support.service import LlorchProcess, make_config, make_pool

EXAMINER = Identity("examiner", "examiners", ("admin",))
NODE = load_spec("control")["components"]["parameters"]["NodeIdPath"]["example"]
"""The node of the contract's examples, so that some heartbeats are answered."""
NODE_TOKEN = "lln_" + "examined".ljust(43, "0")
MODEL = load_spec("data")["components"]["schemas"]["TaskRequest"]["example"]["model_ref"]
"""The model of the contract's examples, so that some tasks are accepted."""


@pytest.fixture(scope="module")
def service(module_processes: Processes) -> Iterator[LlorchProcess]:
    engine = module_processes.fake(MODEL, slots=2, token_interval_ms=1)
    config = make_config(
        [make_pool(engine, pool_id="small")],
        keys=[EXAMINER],
        nodes=[{"id": NODE, "sha256": hashlib.sha256(NODE_TOKEN.encode()).hexdigest(), "pools": ["small"]}],
        streams={"disconnect_grace_s": 0.2, "heartbeat_s": 0.2},
    )
    expected = ["task_ended", "replica_changed", "config_reload", "Invalid HTTP request received."]
    service = module_processes.serve(config, expected=expected)
    yield service
    service.stop()


@pytest.mark.parametrize("name", ["data", "control"])
def test_live_server_keeps_the_contract(service: LlorchProcess, name: str, tmp_path: Path) -> None:
    contract = tmp_path / f"{name}.json"
    contract.write_text(json.dumps(load_spec(name)), encoding="utf-8")
    report = tmp_path / "report.ndjson"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", ROOT / "schemathesis.toml", "run", contract),
            *("--url", service.url, "--no-color", "--report", "ndjson", "--report-ndjson-path", report),
        ],
        env={**os.environ, "LLORCH_TEST_KEY": EXAMINER.key, "LLORCH_TEST_NODE_TOKEN": NODE_TOKEN},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    calls = count_calls(report)
    expected = {f"{route.method} {route.path}" for route in ROUTES if route.spec == name}
    assert min(calls[operation] for operation in expected) >= 5, calls


def count_calls(report: Path) -> Counter[str]:
    """How often each operation was called, by the report of the run."""
    calls: Counter[str] = Counter()
    for line in report.read_text(encoding="utf-8").splitlines():
        event: dict[str, Any] = json.loads(line)
        scenario = event.get("ScenarioFinished")
        if scenario is not None and scenario.get("recorder") is not None:
            for case in scenario["recorder"].get("cases", {}).values():
                calls[f"{case['value']['method']} {case['value']['path']}"] += 1
    return calls
