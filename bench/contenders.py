"""Who takes part: fake engine, llorch, vllm-router, LiteLLM; how each is started and what a client asks of it."""

import hashlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import msgspec
import yaml

from bench.client import Dialect, Order
from bench.processes import LOAD_CORE, OUT, ROOT, SERVER_CORE, ServerProcess, find_free_port

MODEL: Final = "fake"
PROMPT: Final = "Say in one sentence why a queue that is fair to everybody is also the fastest one for most of them."
KEY: Final = "llk_this-key-opens-nothing-but-the-benchmark"
SLOTS: Final = 1024

_PEERS: Final = ROOT / ".cache" / "bench"
_SECONDS_MAX: Final = 3600

OPENAI: Final = Dialect(token=b'"text":', end=b"data: [DONE]\n\n")
LLORCH: Final = Dialect(token=b"event: token\n", end=b"event: end\n")
LLAMACPP: Final = Dialect(token=b'"stop":false', end=b'"stop":true')


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that streams tokens. `order(tokens)` is one stream of that many."""

    name: str
    process: ServerProcess
    dialect: Dialect
    order: Callable[[int], Order]


class Engine:
    """The fake engine, of which every contender relays the tokens."""

    def __init__(self, name: str = "engine", *, slots: int = SLOTS) -> None:
        port = find_free_port()
        command = [sys.executable, "-m", "llorch.testing.fake_engine", "--port", str(port), "--slots", str(slots)]
        self.process = ServerProcess(name, [*command, "--model", MODEL], port, LOAD_CORE, "/health")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.process.port}"

    async def command(self, **what: Any) -> None:
        """Have it do as `POST /_fake` says."""
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.post(f"{self.url}/_fake", json=what)).raise_for_status()

    async def report(self) -> Mapping[str, Any]:
        """What it has seen since the last reset."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer: Mapping[str, Any] = (await client.get(f"{self.url}/_fake")).raise_for_status().json()
            return answer


def direct(engine: Engine) -> Contender:
    """The engine itself, without anything in between."""
    return Contender("engine, direct", engine.process, OPENAI, _openai_order)


def llorch(
    engine: Engine, name: str = "llorch", *, slots: int = SLOTS, streams: Mapping[str, Any] | None = None
) -> Contender:
    """The service with a key, and a pool of one replica. `streams`: that section of its configuration."""
    port = find_free_port()
    pool = {
        "id": "bench",
        "engine": "llamacpp",
        "model": MODEL,
        "queue": {"capacity": 1_000_000},
        "timeouts": {"first_byte_s": _SECONDS_MAX, "idle_s": _SECONDS_MAX, "wall_s": _SECONDS_MAX},
        "replicas": [{"url": engine.url, "slots": slots}],
    }
    key = {"id": "bench", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "tenant": "bench", "scopes": ["admin"]}
    config = {"server": {"port": port}, "keys": [key], "pools": [pool], "streams": streams or {}}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "llorch", "serve", "--config", str(path)]
    return Contender(name, ServerProcess(name, command, port, SERVER_CORE, "/readyz"), LLORCH, _llorch_order)


def vllm_router(engine: Engine) -> Contender:
    """vllm-router with its default policies, logging nothing but warnings."""
    port = find_free_port()
    command = [str(_PEERS / "vllm-router/bin/vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", engine.url, "--policy", "round_robin", "--log-level", "warning"]
    command += ["--prometheus-port", str(find_free_port())]
    process = ServerProcess("vllm-router", command, port, SERVER_CORE, "/health")
    return Contender("vllm-router", process, OPENAI, _openai_order)


def litellm(engine: Engine) -> Contender:
    """LiteLLM's proxy, one worker."""
    port = find_free_port()
    command = [str(_PEERS / "litellm/bin/litellm"), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = {
        "BENCH_ENGINE_URL": f"{engine.url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_MODE": "PRODUCTION",
    }
    command += ["--config", str(ROOT / "bench/litellm.yaml")]
    process = ServerProcess("litellm", command, port, SERVER_CORE, "/health/liveliness", environment)
    return Contender("litellm", process, OPENAI, _openai_order)


def encode_request(method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """An HTTP/1.1 request with the benchmark's key, as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    data = msgspec.json.encode(body)
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _openai_order(tokens: int) -> Order:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0.7, "seed": 7, "stream": True}
    return Order((encode_request("POST", "/v1/completions", body),), (200,))


def _llorch_order(tokens: int) -> Order:
    task_id = str(uuid.uuid4())
    asked = {"model_ref": MODEL, "prompt": PROMPT, "max_tokens": tokens, "seed": 7}
    body = {"task_id": task_id, **asked, "sampling": {"temperature": 0.7}}
    requests = (encode_request("POST", "/v1/tasks", body), encode_request("GET", f"/v1/tasks/{task_id}/stream"))
    return Order(requests, (202, 200))


def make_orders(contender: Contender, streams: int, tokens: int) -> Sequence[Order]:
    """So many streams of so many tokens."""
    return [contender.order(tokens) for _ in range(streams)]
