"""What one journey knows: its deployment, the tasks it named, the streams it reads, the latest answer."""

import uuid
from typing import Any

import httpx

from tests.support.deployment import Deployment
from tests.support.driver import Follower, accepted

GENUINE = ("tiny", "smollm2")
"""Models that a real engine serves."""


class World:
    """The state of one scenario."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.ids: dict[str, str] = {}
        """task_id or session_id by the name that the scenario uses."""
        self.owners: dict[str, str] = {}
        """Who submitted a task."""
        self.bodies: dict[str, dict[str, Any]] = {}
        self.acceptances: dict[str, dict[str, Any]] = {}
        self.streams: dict[str, Follower] = {}
        self.facts: dict[str, Any] = {}
        self.answers: list[httpx.Response] = []

    @property
    def answer(self) -> httpx.Response:
        """The latest answer."""
        return self.answers[-1]

    def id_of(self, name: str) -> str:
        """The id behind a name; a new one for a new name."""
        return self.ids.setdefault(name, str(uuid.uuid4()))

    def submit(self, who: str, name: str, model: str, **fields: Any) -> httpx.Response:
        """Submit a task under a name. The answer is kept, whatever it is."""
        body = {"task_id": self.id_of(name), "model_ref": model, "prompt": f"say {name}", "max_tokens": 4, **fields}
        if model in GENUINE:
            # A random model may say at any token that it is done; greedily it was seen not to.
            body.setdefault("sampling", {"temperature": 0})
        self.bodies[name] = body
        response = self.deployment.caller(who).http.post("/v1/tasks", json=body)
        self.answers.append(response)
        if response.status_code == 202:
            self.owners[name] = who
            self.acceptances[name] = accepted(response)
        return response

    def follow(self, who: str, name: str, after: int | None = None, label: str = "") -> Follower:
        """Open a stream of a named task; it is closed with the scenario at the latest."""
        stream = self.deployment.caller(who).follow(self.id_of(name), after)
        self.answers.append(stream.response)
        key = f"{who}/{name}/{label}"
        if key in self.streams:
            self.streams[key].close()
        self.streams[key] = stream
        return stream

    def stream(self, who: str, name: str, label: str = "") -> Follower:
        return self.streams[f"{who}/{name}/{label}"]

    def look(self, name: str) -> dict[str, Any]:
        """The task, as its owner sees it."""
        return self.deployment.caller(self.owners[name]).look(self.ids[name])

    def wait_state(self, name: str, *states: str) -> dict[str, Any]:
        return self.deployment.caller(self.owners[name]).wait_state(self.ids[name], *states)

    def leave(self) -> None:
        """End what the scenario began, and see that nothing is left of it."""
        for stream in self.streams.values():
            stream.close()
        if self.deployment.service.status is not None:
            return
        for name, who in self.owners.items():
            status = self.deployment.caller(who).cancel(self.ids[name]).status_code
            assert status in (204, 404), status
        self.deployment.reset()
        self.deployment.check_idle()
