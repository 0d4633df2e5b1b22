"""ORCH-2001 … 2014: the live service keeps what `llorch.client` relies on, by the committed pact.

Every provider state is made over the public API and the engine's admin path; the service has no door for tests.
"""

import gc
import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

os.environ["PACT_DO_NOT_TRACK"] = "true"

from pact import Verifier

from tests.conftest import Processes
from tests.contract.test_client_pact import DATA_KEY, KEY, MODEL, POOL
from tests.support.driver import FINAL
from tests.support.engines import FakeEngineProcess
from tests.support.processes import NO_TLS, wait_for
from tests.support.service import LlorchProcess, make_config, make_pool

PACTS = Path(__file__).parent / "pacts"
CAPACITY = 4
TURNS = 8

Parameters = dict[str, Any]


def key_entry(name: str, key: str, scopes: list[str]) -> dict[str, Any]:
    return {"id": name, "tenant": "pact", "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": scopes}


class States:
    """Brings the service into the states that the pact names."""

    def __init__(self, service: LlorchProcess, engine: FakeEngineProcess) -> None:
        self._engine = engine
        self._http = httpx.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=20, verify=NO_TLS
        )

    def handlers(self) -> dict[str, Callable[..., None]]:
        return {
            "the server serves a model": self.serves,
            "a task that succeeded": self.succeeded,
            "a task that waits in the queue": self.waits,
            "a route whose queue is full": self.full,
            "a session that has had all its turns": self.spent,
        }

    def serves(self, parameters: Parameters | None = None) -> None:
        """Nothing holds a slot or a place in the queue."""
        self._engine.command(release=1_000_000)
        self._engine.command(reset=True)
        for state in ("queued", "running"):
            for task in self._list(state):
                assert self._http.post(f"/v1/tasks/{task['task_id']}/cancel").status_code == 204
        wait_for(lambda: self._busy() == 0, "every slot is free")

    def succeeded(self, parameters: Parameters) -> None:
        self.serves()
        self._submit(parameters, session_id=parameters["session_id"], max_tokens=parameters["token_frames"])
        path = f"/v1/tasks/{parameters['task_id']}"
        state = wait_for(lambda: self._final_state(path), "the task has ended")
        assert state == "succeeded", state

    def waits(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters, 1)
        self._submit(parameters)

    def full(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters, 1 + CAPACITY)

    def spent(self, parameters: Parameters) -> None:
        self.serves()
        path = f"/v1/sessions/{parameters['session_id']}"
        if self._http.get(path).status_code == 404:
            for _ in range(TURNS):
                self._submit({**parameters, "task_id": str(uuid.uuid4())}, session_id=parameters["session_id"])
        assert self._http.get(path).json()["turns"] == TURNS

    def close(self) -> None:
        self._http.close()

    def _occupy(self, parameters: Parameters, tasks: int) -> None:
        """So many tasks, of which the first runs without an end."""
        self._engine.command(set={"hold": True})
        for _ in range(tasks):
            self._submit({**parameters, "task_id": str(uuid.uuid4())})

    def _submit(self, parameters: Parameters, **fields: Any) -> None:
        body = {"model_ref": parameters["model_ref"], "task_id": parameters["task_id"], "prompt": "a", **fields}
        response = self._http.post("/v1/tasks", json={"max_tokens": 2, **body})
        assert response.status_code == 202, response.text

    def _final_state(self, path: str) -> str | None:
        state: str = self._http.get(path).json()["state"]
        return state if state in FINAL else None

    def _list(self, state: str) -> list[dict[str, Any]]:
        tasks: list[dict[str, Any]] = self._http.get("/v1/tasks", params={"state": state}).json()["tasks"]
        return tasks

    def _busy(self) -> int:
        replicas = self._http.get(f"/v1/pools/{POOL}/health").json()["replicas"]
        return sum(replica["slots_busy"] for replica in replicas)


@pytest.fixture
def service_and_states(processes: Processes) -> Iterator[tuple[LlorchProcess, States]]:
    engine = processes.fake(MODEL)
    pool = make_pool(engine, pool_id=POOL, queue={"capacity": CAPACITY})
    config = make_config([pool], keys=[], sessions={"turns": TURNS})
    config["keys"] = [key_entry("both", KEY, ["data", "control"]), key_entry("data", DATA_KEY, ["data"])]
    service = processes.serve(config)
    states = States(service, engine)
    yield service, states
    states.serves()
    states.close()
    service.stop()


def verify(service: LlorchProcess, states: States) -> None:
    """Raises AssertionError with the verifier's report when the service breaks the pact."""
    verifier = Verifier("llorch", host="127.0.0.1").add_source(PACTS).add_transport(url=service.url)
    verifier.state_handler(states.handlers(), teardown=False)
    verifier.set_error_on_empty_pact(enabled=True)
    try:
        verifier.verify()
    except RuntimeError:
        raise AssertionError(verifier.output(strip_ansi=True)[-8000:]) from None


def test_live_service_keeps_the_pact(service_and_states: tuple[LlorchProcess, States]) -> None:
    with warnings.catch_warnings():
        # pact-python does not close the socket on which it takes calls for states.
        warnings.simplefilter("ignore", ResourceWarning)
        verify(*service_and_states)
        gc.collect()
