"""Engines for tests, each a process of its own: FakeEngine with its admin path, and the genuine llama.cpp."""

import secrets
from pathlib import Path
from typing import Any

import httpx

from llorch.launch.llamacpp import KEY_VARIABLE
from tests.support.processes import NO_TLS, ROOT, Process, wait_for

TINY_MODEL = ROOT / ".cache" / "models" / "tiny.gguf"


class FakeEngineProcess(Process):
    """FakeEngine as a process. `slots`, `token_interval_ms`, … are its options."""

    def __init__(self, log: Path, *, model: str = "fake", slots: int = 1, **options: float | str) -> None:
        options = {"model": model, "slots": slots, **options}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        super().__init__(["-m", "llorch.testing.fake_engine", *words], log=log)
        self.model = model
        self.slots = slots
        self.url = str(self.announcement("listening")["url"])
        self._http = httpx.Client(base_url=self.url, timeout=10, verify=NO_TLS)

    def command(self, **body: Any) -> dict[str, Any]:
        """Perform what FakeEngine's admin path can: reset, set, release, drop_idle, …; the report after it."""
        return _json(self._http.post("/_fake", json=body))

    def report(self) -> dict[str, Any]:
        """What the engine did, with every generation under `requests`."""
        return _json(self._http.get("/_fake?requests=1"))

    def release(self, tokens: int) -> None:
        """Let held generations send so many more tokens each."""
        self.command(release=tokens)

    def wait_running(self, count: int) -> None:
        """Return when exactly so many slots are busy."""
        wait_for(lambda: self.report()["running"] == count, f"{count} busy slots of {self.model}")

    def end(self, within_s: float = 20.0) -> int:
        self._http.close()
        return super().end(within_s)


class LlamaCppProcess(Process):
    """The genuine llama.cpp server, computing with one thread."""

    def __init__(self, log: Path, model: Path = TINY_MODEL, *, slots: int = 1, ctx: int = 1024) -> None:
        self.api_key = secrets.token_urlsafe(16)
        self.model = "tiny" if model == TINY_MODEL else "smollm2"
        self.slots = slots
        self.ctx = ctx
        words = {"model": model, "port": 0, "slots": slots, "ctx": ctx, "threads": 1, "alias": self.model}
        super().__init__(
            [
                *("-m", "llorch", "engine", "llamacpp"),
                *(word for name, value in words.items() for word in (f"--{name}", str(value))),
            ],
            log=log,
            environment={KEY_VARIABLE: self.api_key},
        )
        self.url = str(self.announcement("listening")["url"])
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=30, verify=NO_TLS
        )
        wait_for(lambda: self._http.get("/health").status_code == 200, f"{self.model} is healthy", 30)

    def count_busy(self) -> int:
        """Slots that compute, as the engine itself tells."""
        slots = self._http.get("/slots")
        assert slots.status_code == 200, slots.text
        return sum(slot["is_processing"] for slot in slots.json())

    def end(self, within_s: float = 20.0) -> int:
        self._http.close()
        return super().end(within_s)


def _json(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body
