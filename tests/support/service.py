"""`llorch serve` as a process of its own, on a free port, with its log judged when it ends."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.engines import FakeEngineProcess, LlamaCppProcess
from tests.support.identities import EVERYBODY, Identity
from tests.support.processes import NO_TLS, ROOT, START_S, Process, free_port
from tests.support.wire import check_response

QUIET = ("info", "debug")


class LlorchProcess(Process):
    """A server. Without `config` it is the demonstration. `expected` are the events that its log may warn of."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any] | None,
        *,
        name: str = "llorch",
        log_name: str | None = None,
        expected: Collection[str] = (),
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "llorch"),
        cwd: Path = ROOT,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._expected = set(expected)
        arguments = [*program, "serve"]
        if config is not None:
            file = directory / f"{name}.yaml"
            file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
            arguments += ["--config", str(file)]
        port = {"LLORCH_SERVER__PORT": str(self.port)}
        super().__init__(
            arguments, log=directory / f"{log_name or name}.log", environment={**port, **(environment or {})}, cwd=cwd
        )

    def wait_ready(self, replicas: int = 1) -> None:
        """Return when that many replicas are Ready (0: when it answers). Raises AssertionError with the log."""
        until = time.monotonic() + START_S
        with httpx.Client(base_url=self.url, timeout=10, verify=NO_TLS) as http:
            while not _is_ready(http, replicas):
                assert self.status is None, f"the server ended with status {self.status}:\n{self.text}"
                assert time.monotonic() < until, f"not ready within {START_S:g} s:\n{self.text}"
                time.sleep(0.05)

    def client(self, who: Identity | None = None, timeout_s: float = 20.0) -> httpx.Client:
        """A client of this server; its responses, other than streams, are checked against the contract."""
        headers = {} if who is None else who.headers
        return httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            verify=NO_TLS,
            event_hooks={"response": [_check_unless_stream]},
        )

    def stop(self, within_s: float = 30.0) -> None:
        """SIGTERM, an exit status of 0, and nothing in the log that was not expected."""
        status = self.end(within_s)
        assert status == 0, f"exit status {status}:\n{self.text[-4000:]}"
        self.check_log()

    def check_log(self) -> None:
        """Raise AssertionError for a traceback, or a warning that nobody expected."""
        assert "Traceback" not in self.text, self.text[-4000:]
        strange = [line for line in self.lines() if not self._is_expected(line)]
        assert not strange, f"unexpected in {self.log}: {strange[:5]}"

    def _is_expected(self, line: Mapping[str, Any]) -> bool:
        return line.get("level") in QUIET or line.get("event") in self._expected


def make_config(
    pools: Sequence[Mapping[str, Any]], *, keys: Sequence[Identity] = EVERYBODY, **sections: Any
) -> dict[str, Any]:
    """A configuration with these pools and keys."""
    return {"keys": [who.entry for who in keys], "pools": list(pools), **sections}


def make_pool(*engines: FakeEngineProcess | LlamaCppProcess, pool_id: str = "", **settings: Any) -> dict[str, Any]:
    """A pool of these engines, which run the same model."""
    model = engines[0].model
    replicas = [
        {"url": engine.url, "slots": engine.slots}
        | ({"api_key": engine.api_key} if isinstance(engine, LlamaCppProcess) else {})
        for engine in engines
    ]
    return {"id": pool_id or model, "engine": "llamacpp", "model": model, "replicas": replicas, **settings}


def _is_ready(http: httpx.Client, replicas: int) -> bool:
    try:
        response = http.get("/readyz" if replicas else "/healthz")
    except httpx.TransportError:
        return False
    if not replicas:
        return response.status_code == 200
    return response.status_code == 200 and response.json()["replicas_ready"] >= replicas


def _check_unless_stream(response: httpx.Response) -> None:
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        response.read()
        check_response(response)
