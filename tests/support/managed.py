"""Servers that start their engines themselves: their configuration, and what an operator sees and does of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.engines import TINY_MODEL
from tests.support.identities import ADMIN
from tests.support.process_table import url_of
from tests.support.processes import NO_TLS, wait_for
from tests.support.service import LlorchProcess

QUICK: Mapping[str, float] = {
    "start_s": 30,
    "self_test_s": 10,
    "unresponsive_s": 1,
    "stop_s": 2,
    "backoff_first_s": 0.2,
    "backoff_factor": 2,
    "backoff_max_s": 1,
    "storm_failures": 5,
    "cool_down_s": 2,
    "stable_s": 3,
}
"""Supervision within the reach of a test."""


WARNINGS = (
    "task_ended",
    "task_requeued",
    "attempt_ended",
    "replica_changed",
    "engine_ended",
    "engine_refused",
    "breaker_opened",
)
"""What the log of a server warns of whose engines fail."""

HONEST = ("WORKER_RESET", "DECODE_TIMEOUT")
"""How a task may end whose engine went away after its first token."""


def fake(slots: int = 1, *, managed: Mapping[str, Any] | None = None, **options: object) -> dict[str, Any]:
    """A replica that is a FakeEngine, started by llorch; `options` are its flags, `managed` further settings."""
    flags = {"host": "{host}", "port": "{port}", "slots": "{slots}", "api-key": "{api_key}", "model": "{alias}"}
    flags |= {name.replace("_", "-"): str(value) for name, value in options.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "llorch.testing.fake_engine", *words]
    return {"slots": slots, "managed": {"launcher": "command", "command": command, **(managed or {})}}


def tiny(slots: int = 1, **managed: Any) -> dict[str, Any]:
    """A replica that is the genuine llama.cpp with one thread, started by llorch."""
    return {"slots": slots, "managed": {"threads": 1, **managed}}


def pool(pool_id: str, *replicas: Mapping[str, Any], model: str = "fake", **settings: Any) -> dict[str, Any]:
    """A pool of managed replicas, quickly supervised unless it says otherwise."""
    usual = {"engine": "llamacpp", "ctx": 4096, "allow_cpu": True, "supervision": dict(QUICK), "drain_s": 10}
    return {"id": pool_id, "model": model, **usual, "replicas": list(replicas), **settings}


def genuine_pool(pool_id: str, *replicas: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """A pool of llama.cpp with the tiny model."""
    return pool(pool_id, *replicas, **{"model": "tiny", "ctx": 1024, "model_path": str(TINY_MODEL), **settings})


class Operator:
    """What an operator sees and does, over HTTP and by the command line, with the admin's key."""

    def __init__(self, service: LlorchProcess) -> None:
        self.service = service
        self._http = service.client(ADMIN)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        answer = self._http.get(path)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, status: int = 202) -> dict[str, Any]:
        answer = self._http.post(path, json=body) if body is not None else self._http.post(path)
        assert answer.status_code == status, answer.text
        said: dict[str, Any] = answer.json()
        return said

    def health(self, pool_id: str) -> dict[str, Any]:
        return self.get(f"/v1/pools/{pool_id}/health")

    def replicas(self, pool_id: str) -> dict[str, dict[str, Any]]:
        return {each["replica_id"]: each for each in self.health(pool_id)["replicas"]}

    def replica(self, replica_id: str) -> dict[str, Any]:
        return self.replicas(replica_id.partition("/")[0])[replica_id]

    def engine(self, replica_id: str) -> psutil.Process:
        """The process of a replica."""
        return psutil.Process(self.replica(replica_id)["process"]["pid"])

    def set_faults(self, replica_id: str, **faults: Any) -> None:
        """Make a FakeEngine misbehave."""
        with httpx.Client(base_url=url_of(self.engine(replica_id)), verify=NO_TLS, timeout=10) as http:
            assert http.post("/_fake", json={"set": faults}).status_code == 200

    def report(self, replica_id: str) -> dict[str, Any]:
        """What a FakeEngine did."""
        with httpx.Client(base_url=url_of(self.engine(replica_id)), verify=NO_TLS, timeout=10) as http:
            said: dict[str, Any] = http.get("/_fake?requests=1").json()
            return said

    def wait(self, replica_id: str, look: Callable[[dict[str, Any]], bool], what: str, within_s: float = 40.0) -> None:
        """Return when the replica looks like this."""
        wait_for(lambda: look(self.replica(replica_id)), f"{replica_id}: {what}", within_s, every_s=0.05)

    def wait_restarted(self, replica_id: str, cause: Collection[str], failures: int = 1) -> None:
        """Return when the replica failed that often, the last time for one of these causes, and is Ready again."""

        def look(found: dict[str, Any]) -> bool:
            process = found["process"]
            return bool(found["state"] == "ready" and process["restarts"] >= failures and process["cause"] in cause)

        self.wait(replica_id, look, f"failed for {cause} and is Ready again")

    def wait_change(self, pool_id: str, within_s: float = 60.0) -> dict[str, Any]:
        """The change of a pool, once it is over."""

        def look() -> dict[str, Any] | None:
            change: dict[str, Any] | None = self.health(pool_id)["change"]
            return change if change is not None and change["state"] != "running" else None

        return wait_for(look, f"the change of {pool_id} is over", within_s, every_s=0.05)

    def wait_config(self, within_s: float = 60.0) -> dict[str, Any]:
        """The state of the configuration, once its change is over."""

        def look() -> dict[str, Any] | None:
            status = self.get("/v1/config")
            return status if status["change"] is not None and status["change"]["state"] != "running" else None

        return wait_for(look, "the change of the configuration is over", within_s, every_s=0.05)

    def command(self, *words: str, status: int = 0) -> str:
        """What `llorch …` says on stdout."""
        environment = {**os.environ, "LLORCH_URL": self.service.url, "LLORCH_KEY": ADMIN.key, "COLUMNS": "200"}
        ended = subprocess.run(
            [sys.executable, "-m", "llorch", *words], env=environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert ended.returncode == status, (ended.stdout, ended.stderr)
        return ended.stdout + (ended.stderr if status else "")


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def rewrite(service: LlorchProcess, directory: Path, config: Mapping[str, Any], name: str = "llorch") -> None:
    """Put another configuration where the server's is."""
    import yaml

    (directory / f"{name}.yaml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    assert service.status is None
