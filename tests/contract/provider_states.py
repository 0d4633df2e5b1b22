"""Brings a live service into the states that the pact names, over the public API and the engines' admin path alone."""

import copy
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from llorch import __version__
from tests.contract.interactions import (
    ADMIN_KEY,
    KEY,
    MODEL,
    NODE_TOKEN,
    PACED_MODEL,
    QUOTA_KEYS,
    RIVAL_KEY,
    WIDE_MODEL,
)
from tests.support.driver import FINAL
from tests.support.engines import FakeEngineProcess
from tests.support.processes import NO_TLS, wait_for
from tests.support.service import LlorchProcess

CAPACITY = 4
PACED_CAPACITY = 2
TURNS = 8
SLOTS = {MODEL: 1, PACED_MODEL: 1, WIDE_MODEL: 2}
LEARNED_FROM = 40
"""Tasks after which a route's rates are known well."""

Parameters = dict[str, Any]


class States:
    """One service with its engines by model. Every state begins with nothing waiting and nothing running.

    `file` is the configuration that the service was started with.
    """

    def __init__(self, service: LlorchProcess, engines: Mapping[str, FakeEngineProcess], file: Path) -> None:
        self._engines = engines
        self._file = file
        self._text = file.read_text(encoding="utf-8")
        self._ends = ExitStack()
        self._https = {
            key: self._ends.enter_context(
                httpx.Client(
                    base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=20, verify=NO_TLS
                )
            )
            for key in (KEY, ADMIN_KEY, RIVAL_KEY, *QUOTA_KEYS.values(), NODE_TOKEN)
        }
        self._http = self._https[KEY]
        self._admin = self._https[ADMIN_KEY]
        self._node = self._https.pop(NODE_TOKEN)
        self._knows_rates = False
        self._helper: threading.Thread | None = None
        self._failures: list[Exception] = []

    def handlers(self) -> dict[str, Callable[..., None]]:
        return {
            "the server serves a model": self.serves,
            "a task that succeeded": self.succeeded,
            "a task that waits in the queue": self.waits,
            "a route whose queue is full": self.full,
            "a session that has had all its turns": self.had_turns,
            "a task runs that has long to go, at known rates": self.busy,
            "a session with budgets": self.succeeded,
            "a task that waits for its tenant's quota until its deadline": self.waits_for_quota,
            "a task with budgets that waits until its deadline, at known rates": self.patient,
            "the second task of a session, which succeeded": self.returned,
            "a batch task that is preempted once somebody follows it": self.preempted,
            "a batch task that newer ones of its tenant dropped": self.dropped,
            "a task whose place went to another tenant": self.unfair,
            "a batch task that was shed for an interactive one": self.shed,
            "a tenant that has reached a limit": self.limited,
            "a session that has spent its tokens": self.succeeded_with_most,
            "a session that has spent its cost": self.succeeded_with_most,
            "a session that has spent its time": self.overrun,
            "a session whose tokens a running task has reserved": self.reserved,
            "a full queue without a batch task, at known rates": self.nothing_to_shed,
            "a pool that nobody changes": self.whole,
            "a pool whose drain waits for a task": self.changing,
            "the configuration of the start, and none before it": self.unchanged,
            "a configuration that was changed": self.changed,
            "a configuration file that cannot be used": self.broken,
            "a configuration file that changes what needs a restart": self.restart_needed,
            "a node that nobody holds": self.free,
            "a node that another pool manager holds": self.held,
        }

    def serves(self, parameters: Parameters | None = None) -> None:
        """Nothing holds a slot or a place in the queue."""
        if self._helper is not None:
            self._helper.join()
        for engine in self._engines.values():
            engine.command(release=1_000_000)
            engine.command(reset=True)
        for http in self._https.values():
            for state in ("queued", "running"):
                for task in http.get("/v1/tasks", params={"state": state}).json()["tasks"]:
                    assert http.post(f"/v1/tasks/{task['task_id']}/cancel").status_code == 204
        wait_for(lambda: self._busy() == 0, "every slot is free")

    def succeeded(self, parameters: Parameters) -> None:
        self.serves()
        self._run_to_end(parameters, max_tokens=parameters.get("token_frames", 2))

    def succeeded_with_most(self, parameters: Parameters) -> None:
        """Half of what its budget covers is spent."""
        self.serves()
        self._run_to_end(parameters, max_tokens=50)

    def waits(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters)
        self._submit(parameters)

    def full(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters)
        self._fill(parameters, CAPACITY)

    def had_turns(self, parameters: Parameters) -> None:
        self.serves()
        for _ in range(TURNS):
            self._run_to_end({**parameters, "task_id": str(uuid.uuid4())})

    # Rates and deadlines

    def busy(self, parameters: Parameters) -> None:
        self.serves()
        self._learn_rates()
        self._occupy(parameters, max_tokens=400)

    def patient(self, parameters: Parameters) -> None:
        self.serves()
        self._learn_rates()
        self._occupy(parameters, max_tokens=60)
        self._submit(parameters)

    def waits_for_quota(self, parameters: Parameters) -> None:
        """Its tenant runs one task, and another slot is free."""
        self.serves()
        self._occupy(parameters)
        self._submit(parameters)

    def overrun(self, parameters: Parameters) -> None:
        self.serves()
        self._engines[parameters["model_ref"]].command(set={"hold": True})
        self._submit(parameters)
        self._wait_end(parameters, "failed")

    # Places in the queue

    def dropped(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters)
        self._submit(parameters, priority="batch")
        self._fill(parameters, CAPACITY, priority="batch")
        self._wait_end(parameters, "failed")

    def unfair(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters)
        self._fill(parameters, CAPACITY - 1)
        self._submit(parameters)
        self._fill({**parameters, "key": RIVAL_KEY}, 1)
        self._wait_end(parameters, "failed")

    def shed(self, parameters: Parameters) -> None:
        self.serves()
        self._occupy(parameters)
        self._submit(parameters, priority="batch")
        self._fill(parameters, PACED_CAPACITY + 1)
        self._wait_end(parameters, "failed")

    def nothing_to_shed(self, parameters: Parameters) -> None:
        self.serves()
        self._learn_rates()
        self._occupy(parameters)
        self._fill(parameters, PACED_CAPACITY)

    # Limits

    def limited(self, parameters: Parameters) -> None:
        self.serves()
        match parameters["limit"]:
            case "max-queued":
                self._occupy(parameters)
                self._fill(parameters, 1)
            case "rate":
                self._fill(parameters, 1)
            case "tokens-per-minute":
                self._fill(parameters, 1, max_tokens=50)

    def reserved(self, parameters: Parameters) -> None:
        self.serves()
        self._engines[parameters["model_ref"]].command(set={"hold": True})
        self._submit(parameters, max_tokens=50)

    # Replicas

    def returned(self, parameters: Parameters) -> None:
        self.serves()
        self._run_to_end({**parameters, "task_id": str(uuid.uuid4())})
        self._run_to_end(parameters)

    def preempted(self, parameters: Parameters) -> None:
        """It has sent something; once it has a reader an urgent task comes, and then everything goes on."""
        self.serves()
        engine = self._engines[parameters["model_ref"]]
        engine.command(set={"hold": True})
        self._submit(parameters, priority="batch", max_tokens=parameters["max_tokens"])
        engine.wait_running(1)
        engine.release(3)
        path = f"/v1/tasks/{parameters['task_id']}"
        wait_for(lambda: self._http.get(path).json()["timeline"]["first_token_at"], "it has sent a token")
        self._helper = threading.Thread(target=self._make_room, args=(parameters, path))
        self._helper.start()

    def _make_room(self, parameters: Parameters, path: str) -> None:
        try:
            wait_for(lambda: self._metric("open_streams") > 0, "somebody follows it")
            self._fill(parameters, 1)
            wait_for(lambda: self._http.get(path).json()["timeline"]["preemptions"] == 1, "it was preempted")
        except Exception as exc:  # noqa: BLE001 - told to the test when it closes the states
            self._failures.append(exc)
        engine = self._engines[parameters["model_ref"]]
        engine.command(set={"hold": False})
        engine.release(1_000_000)

    # Pools

    def whole(self, parameters: Parameters) -> None:
        """It is Ready, and no change of it is under way."""
        self.serves()
        path = f"/v1/pools/{parameters['pool_id']}"
        wait_for(lambda: not self._is_changing(path), "its change is over")
        if not self._admin.get(f"{path}/health").json()["ready"]:
            assert self._admin.post(f"{path}/reload").status_code == 202
            wait_for(lambda: not self._is_changing(path), "it was reloaded")
            wait_for(lambda: self._admin.get(f"{path}/health").json()["ready"], "it is ready again")

    def changing(self, parameters: Parameters) -> None:
        self.whole(parameters)
        self._occupy(parameters)
        self._engines[parameters["model_ref"]].wait_running(1)
        response = self._admin.post(f"/v1/pools/{parameters['pool_id']}/drain", json={"deadline_ms": 600_000})
        assert response.status_code == 202, response.text

    def _is_changing(self, path: str) -> bool:
        change = self._admin.get(f"{path}/health").json()["change"]
        return change is not None and change["state"] == "running"

    # The configuration

    def unchanged(self, parameters: Parameters) -> None:
        """The verifier goes by the names of interactions: only the last changes it."""
        self._file.write_text(self._text, encoding="utf-8")
        assert not self._admin.get("/v1/config").json()["can_revert"]

    def changed(self, parameters: Parameters) -> None:
        self.whole(parameters)
        document = copy.deepcopy(yaml.safe_load(self._text))
        spare = next(pool for pool in document["pools"] if pool["id"] == parameters["pool_id"])
        spare["queue"] = {"capacity": 3}
        self._file.write_text(yaml.safe_dump(document), encoding="utf-8")
        response = self._admin.post("/v1/config/reload")
        assert response.status_code == 202, response.text
        wait_for(lambda: self._admin.get("/v1/config").json()["change"]["state"] != "running", "it is in force")
        assert self._admin.get("/v1/config").json()["can_revert"]
        self._file.write_text(self._text, encoding="utf-8")

    def broken(self, parameters: Parameters) -> None:
        self._file.write_text(self._text + "\nno_such_setting: 1\n", encoding="utf-8")

    def restart_needed(self, parameters: Parameters) -> None:
        document = yaml.safe_load(self._text)
        self._file.write_text(yaml.safe_dump({**document, "streams": {"heartbeat_s": 7}}), encoding="utf-8")

    # Nodes

    def free(self, parameters: Parameters) -> None:
        """Whoever held it has left; both managers that join here are the only ones that there are."""
        for boot_id in ("pact-boot", "another-boot"):
            joined = self._join(parameters["node_id"], boot_id)
            if joined.status_code == 200:
                left = self._node.delete(
                    f"/v1/nodes/{parameters['node_id']}", params={"lease_id": joined.json()["lease_id"]}
                )
                assert left.status_code == 204, left.text

    def held(self, parameters: Parameters) -> None:
        self.free(parameters)
        joined = self._join(parameters["node_id"], "another-boot")
        assert joined.status_code == 200, joined.text

    def _join(self, node_id: str, boot_id: str) -> httpx.Response:
        host = {"gpus": [], "ram_total_bytes": 0, "ram_available_bytes": 0, "driver_resets": 0}
        body = {
            "boot_id": boot_id,
            "manager_version": __version__,
            "address": "127.0.0.1",
            "host": host,
            "replicas": [],
        }
        return self._node.put(f"/v1/nodes/{node_id}", json=body)

    def close(self) -> None:
        """Raises what went wrong beside the verification."""
        self.serves()
        self._file.write_text(self._text, encoding="utf-8")
        self._ends.close()
        for failure in self._failures:
            raise failure

    def _learn_rates(self) -> None:
        if not self._knows_rates:
            for _ in range(LEARNED_FROM):
                self._run_to_end({"model_ref": PACED_MODEL, "task_id": str(uuid.uuid4())}, max_tokens=4)
            self._knows_rates = True

    def _occupy(self, parameters: Parameters, max_tokens: int = 2) -> None:
        """A task of nobody's interest runs and never ends."""
        self._engines[parameters["model_ref"]].command(set={"hold": True})
        stranger: Parameters = {name: parameters[name] for name in ("model_ref", "key") if name in parameters}
        self._fill(stranger, 1, max_tokens=max_tokens)

    def _fill(self, parameters: Parameters, tasks: int, **fields: Any) -> None:
        """So many tasks like it, of nobody's interest."""
        for _ in range(tasks):
            self._submit({**parameters, "task_id": str(uuid.uuid4())}, **fields)

    def _run_to_end(self, parameters: Parameters, **fields: Any) -> None:
        self._submit(parameters, **fields)
        self._wait_end(parameters, "succeeded")

    def _wait_end(self, parameters: Parameters, expected: str) -> None:
        path = f"/v1/tasks/{parameters['task_id']}"
        state = wait_for(lambda: self._final_state(path), "the task has ended")
        assert state == expected, self._http.get(path).text

    def _submit(self, parameters: Parameters, **fields: Any) -> None:
        wishes = ("model_ref", "task_id", "session_id", "session_budgets", "deadline_ms")
        wanted = {name: parameters[name] for name in wishes if name in parameters}
        response = self._https[parameters.get("key", KEY)].post(
            "/v1/tasks", json={"prompt": "a", "max_tokens": 2, **wanted, **fields}
        )
        assert response.status_code == 202, response.text

    def _final_state(self, path: str) -> str | None:
        state: str = self._http.get(path).json()["state"]
        return state if state in FINAL else None

    def _busy(self) -> int:
        pools = self._http.get("/v1/pools").json()["pools"]
        healths = [self._http.get(f"/v1/pools/{pool['id']}/health").json() for pool in pools]
        return sum(replica["slots_busy"] for health in healths for replica in health["replicas"])

    def _metric(self, name: str) -> float:
        families = text_string_to_metric_families(self._http.get("/metrics").text)
        return next(sample.value for family in families for sample in family.samples if sample.name == name)
