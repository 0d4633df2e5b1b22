"""FakeEngine: a real HTTP server that behaves like an inference engine and fails on demand.

Tokens depend on (prompt, seed) alone, slots queue like llama.cpp's, and everything that clients do is recorded. It
runs inside a test's event loop, or as a process of its own (`python -m llorch.testing.fake_engine`), where
`POST /_fake` does what the methods do and `GET /_fake` tells the record. Wire formats: `llorch.testing.fake_dialects`;
what can go wrong: `llorch.testing.fake_faults`.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import msgspec

from llorch.testing import fake_dialects as dialects
from llorch.testing import fake_process
from llorch.testing.fake_connection import FakeConnection, Request
from llorch.testing.fake_dialects import Encoder, Order, Refused
from llorch.testing.fake_faults import Faults, Frost, Hog
from llorch.testing.fake_generation import Run, Seen

__all__ = ["FakeEngine", "Faults", "Seen"]

_ADMIN: Final = "/_fake"
_RECORDS_MAX: Final = 50_000
_SETTABLE: Final = (
    "token_interval_s",
    "tokens_per_segment",
    "prefill_interval_s",
    "overhead_s",
    "prefill_token_s",
    "decode_token_s",
    "can_erase",
)
_ACCEPT_PASSES: Final = 4
"""Passes of the event loop after which a connection that was accepted has told its protocol so; asyncio forgets one
whose server is closed meanwhile."""


class FakeEngine:
    """A server on 127.0.0.1 with `slots` slots that sends a token every `token_interval_s` seconds (0: at once).

    Use it with `async with`. `tokens_per_segment` tokens are sent together. `prefill_interval_s` is the time per 64
    prompt tokens, `keep_alive_s` how long an idle connection is kept. Or it has the rates of a modelled engine: a
    generation takes `overhead_s + prefill_token_s * prompt tokens + decode_token_s * tokens`, its segments coming when
    their last token is due. A prompt says how long its answer shall be: see `fake_dialects.wanted_tokens`. For `load_s`
    seconds from its start the engine answers that it loads its model.
    """

    def __init__(
        self,
        *,
        slots: int = 1,
        ctx: int = 8192,
        token_interval_s: float = 0.0,
        tokens_per_segment: int = 1,
        prefill_interval_s: float = 0.0,
        overhead_s: float = 0.0,
        prefill_token_s: float = 0.0,
        decode_token_s: float = 0.0,
        keep_alive_s: float = 5.0,
        model: str = "fake",
        api_key: str | None = None,
        can_erase: bool = True,
        load_s: float = 0.0,
        speaks: tuple[str, ...] = ("llamacpp", "openai"),
    ) -> None:
        self.slots = slots
        self.ctx = ctx
        self.token_interval_s = token_interval_s
        self.tokens_per_segment = tokens_per_segment
        self.prefill_interval_s = prefill_interval_s
        self.overhead_s = overhead_s
        self.prefill_token_s = prefill_token_s
        self.decode_token_s = decode_token_s
        self.keep_alive_s = keep_alive_s
        self.model = model
        self.api_key = api_key
        self.speaks = speaks
        self.can_erase = can_erase
        self.load_s = load_s
        self.erased: deque[int] = deque(maxlen=_RECORDS_MAX)
        self.frost = Frost()
        self.seen: deque[Seen] = deque(maxlen=_RECORDS_MAX)
        self.max_running = 0
        self.connections_made = 0
        self.idle_closed = 0
        """Idle connections that this engine closed, because the client had not."""
        self.connections: set[FakeConnection] = set()
        self.port = 0
        self._faults = Faults()
        self._hog = Hog()
        self._loaded_at = 0.0
        self._server: asyncio.Server | None = None
        self._busy: dict[int, Run] = {}
        self._waiting: deque[Run] = deque()
        self._count = 0
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 picks one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: FakeConnection(self), host, port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._loaded_at = loop.time() + self.load_s

    async def aclose(self) -> None:
        """Stop listening and reset every connection, as when the process is killed. Idempotent."""
        server, self._server = self._server, None
        self.frost.forget()
        self.faults = Faults(refuse=True)
        for _ in range(_ACCEPT_PASSES):
            await asyncio.sleep(0)
        if server is not None:
            server.close()
        for connection in list(self.connections):
            connection.abort()
        for run in [*self._busy.values(), *self._waiting]:
            run.stop_timer()
        if server is not None:
            await server.wait_closed()
        await self.wait_until(lambda: not self.connections)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def faults(self) -> Faults:
        """What goes wrong. Assign another to change it: `freeze` and `hog_mib` do not hear of a change in place."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        self._hog.take(faults.hog_mib)
        self.frost.turn(is_frozen=faults.freeze)

    @property
    def is_loading(self) -> bool:
        """Whether it answers everything with 503, because its model is not loaded yet."""
        return self._faults.loading or asyncio.get_running_loop().time() < self._loaded_at

    @property
    def running(self) -> int:
        """Slots that are busy."""
        return len(self._busy)

    @property
    def queued(self) -> int:
        """Generations that wait for a slot."""
        return len(self._waiting)

    @property
    def cancelled(self) -> list[Seen]:
        """Generations whose client closed the connection before the end."""
        return [seen for seen in self.seen if seen.state == "cancelled"]

    @property
    def last(self) -> Seen:
        """The generation that arrived last."""
        return self.seen[-1]

    def expected_tokens(self, prompt: str, seed: int, count: int) -> list[str]:
        """The tokens that a generation has to give, at most `count`."""
        return dialects.expected_tokens(prompt, seed, count)

    def release(self, tokens: int, *, generation: int | None = None) -> None:
        """Let held generations send that many more tokens: all that run, or the one with that id."""
        for run in list(self._busy.values()):
            if generation is None or run.seen.id == generation:
                run.release(tokens)

    def drop_idle(self) -> None:
        """Close every connection on which nothing is under way."""
        for connection in list(self.connections):
            connection.drop_if_idle()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return when the condition on this engine holds; raises TimeoutError. Looked at whenever something changes."""
        if condition():
            return
        future = asyncio.get_running_loop().create_future()
        watcher = (condition, future)
        self._watchers.append(watcher)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        finally:
            self._watchers.remove(watcher)

    def changed(self) -> None:
        """Something happened: look at the conditions that are waited for."""
        for condition, future in self._watchers:
            if not future.done() and condition():
                future.set_result(None)

    # Slots.

    def submit(self, connection: FakeConnection, order: Order) -> Run:
        """Take in a generation: it starts in a free slot, else waits in line."""
        prompt_tokens = len(dialects.tokenize(order.prompt))
        if prompt_tokens >= self.ctx:
            raise dialects.refuse_context(prompt_tokens, self.ctx)
        self._count += 1
        seen = Seen(
            id=self._count,
            path=order.path,
            prompt=order.prompt,
            seed=order.seed,
            max_tokens=order.max_tokens,
            prompt_tokens=prompt_tokens,
            arrived_at=asyncio.get_running_loop().time(),
            body=order.body,
        )
        self.seen.append(seen)
        is_native = order.path == "/completion"
        encoder: Encoder = (
            dialects.LlamaCppEncoder(order, self.model, prompt_tokens)
            if is_native
            else dialects.OpenAIEncoder(order, self.model, prompt_tokens, seen.id)
        )
        run = Run(self, connection, order, seen=seen, encoder=encoder, faults=self._take_faults())
        self._waiting.append(run)
        self._start_waiting()
        return run

    def free(self, run: Run) -> None:
        """The run's slot, or its place in line, is free again."""
        if run.seen.slot is None:
            self._waiting.remove(run)
        else:
            del self._busy[run.seen.slot]
            run.seen.slot_freed_at = asyncio.get_running_loop().time()
        self._start_waiting()
        self.changed()

    def _take_faults(self) -> Faults:
        faults = dataclasses.replace(self.faults)
        if self.faults.times is not None:
            self.faults.times -= 1
            if self.faults.times <= 0:
                self.faults = Faults()
        return faults

    def _start_waiting(self) -> None:
        if self.frost.is_frozen:
            self.frost.hold(self._start_waiting)
            return
        while self._waiting and len(self._busy) < self.slots:
            run = self._waiting.popleft()
            run.seen.slot = next(each for each in range(self.slots) if each not in self._busy)
            run.seen.state = "running"
            self._busy[run.seen.slot] = run
            self.max_running = max(self.max_running, len(self._busy))
            run.start()
        self.changed()

    # Routing.

    def serve(self, connection: FakeConnection, request: Request) -> None:
        """Answer a request, now or later."""
        if self.frost.is_frozen and request.path != _ADMIN:
            self.frost.hold(lambda: self._serve_late(connection, request))
            return
        try:
            self._route(connection, request)
        except Refused as exc:
            connection.answer(exc.status, exc.body)

    def _serve_late(self, connection: FakeConnection, request: Request) -> None:
        if connection in self.connections:
            self.serve(connection, request)

    def _route(self, connection: FakeConnection, request: Request) -> None:
        path = request.path
        if path == _ADMIN:
            if request.method == "POST":
                self.command(msgspec.json.decode(request.body))
            connection.answer(200, self.report(with_requests="requests=1" in request.query))
            return
        if self.is_loading:
            raise Refused(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        key = f"Bearer {self.api_key}".encode()
        if self.api_key is not None and path != "/health" and request.authorization != key:
            raise Refused(401, {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}})
        if request.method == "GET":
            self._get(connection, path)
        elif request.method == "POST" and request.query == "action=erase" and "llamacpp" in self.speaks:
            self._erase(connection, path.removeprefix("/slots/"))
        elif request.method == "POST":
            self._post(connection, path, _decode(request.body))
        else:
            raise _not_found()

    def _get(self, connection: FakeConnection, path: str) -> None:
        is_native = "llamacpp" in self.speaks
        if path == "/health":
            connection.answer(200, {"status": "ok"})
        elif path == "/v1/models":
            entry = {"id": self.model, "object": "model", "owned_by": "llorch", "max_model_len": self.ctx}
            connection.answer(200, {"object": "list", "data": [entry]})
        elif path == "/slots" and is_native and self.faults.slots_status is not None:
            connection.answer(self.faults.slots_status, {"error": {"message": "no metrics", "type": "server_error"}})
        elif path == "/slots" and is_native:
            slots = range(self.slots)
            connection.answer(200, [{"id": i, "n_ctx": self.ctx, "is_processing": i in self._busy} for i in slots])
        elif path == "/props" and is_native:
            connection.answer(200, self._props())
        elif path == "/metrics":
            text = f"llamacpp:requests_processing {self.running}\nllamacpp:requests_deferred {self.queued}\n"
            connection.send(200, text.encode(), "text/plain; version=0.0.4")
            connection.answered()
        else:
            raise _not_found()

    def _props(self) -> dict[str, Any]:
        return {
            "default_generation_settings": {"params": {}, "n_ctx": self.ctx},
            "total_slots": self.slots,
            "model_alias": self.model,
            "chat_template": "chatml",
            "build_info": "b0-unknown",
        }

    def _erase(self, connection: FakeConnection, slot: str) -> None:
        """Forget the KV cache of a slot, as llama.cpp does when it was given a place for saved slots."""
        if not self.can_erase:
            fault = {"message": "This server does not support slots", "type": "not_supported_error", "code": 501}
            raise Refused(501, {"error": fault})
        if not slot.isdecimal() or int(slot) >= self.slots:
            raise dialects.refuse_llamacpp("Invalid slot ID")
        self.erased.append(int(slot))
        connection.answer(200, {"id_slot": int(slot), "n_erased": 0})

    def _post(self, connection: FakeConnection, path: str, body: Mapping[str, Any]) -> None:
        is_native = "llamacpp" in self.speaks
        if path == "/tokenize" and is_native:
            connection.answer(200, {"tokens": dialects.tokenize(str(body.get("content", "")))})
        elif path == "/apply-template" and is_native:
            connection.answer(200, {"prompt": dialects.render_template(body.get("messages") or [])})
        elif path == "/completion" and is_native:
            self._generate(connection, dialects.read_llamacpp(path, body))
        elif path in ("/v1/completions", "/v1/chat/completions") and "openai" in self.speaks:
            self._generate(connection, dialects.read_openai(path, body))
        else:
            raise _not_found()

    def _generate(self, connection: FakeConnection, order: Order) -> None:
        status = self.faults.error_status
        if status is not None:
            default = {"error": {"code": status, "message": "told to fail", "type": "server_error"}}
            raise Refused(status, self._take_faults().error_body or default)
        connection.begin(self.submit(connection, order))

    # What the admin path does.

    def command(self, body: Mapping[str, Any]) -> None:
        """Perform what `POST /_fake` asks: `reset`, `set` (fields of Faults), `release` (tokens), `drop_idle`.

        Fields of the engine, rates above all, are set by their names.
        """
        if body.get("reset"):
            self.seen.clear()
            self.erased.clear()
            self.max_running = self.running
            self.faults = Faults()
        if "set" in body:
            self.faults = msgspec.convert({**dataclasses.asdict(self.faults), **body["set"]}, Faults)
        for name in _SETTABLE:
            if name in body:
                setattr(self, name, body[name])
        if "release" in body:
            self.release(int(body["release"]))
        if body.get("drop_idle"):
            self.drop_idle()

    def report(self, *, with_requests: bool) -> dict[str, Any]:
        """What `GET /_fake` answers; the generations themselves with `?requests=1`."""
        states = [seen.state for seen in self.seen]
        report: dict[str, Any] = {
            "running": self.running,
            "queued": self.queued,
            "max_running": self.max_running,
            "generations": len(states),
            "tokens_sent": sum(seen.tokens_sent for seen in self.seen),
            "states": {state: states.count(state) for state in sorted(set(states))},
            "connections": len(self.connections),
            "connections_made": self.connections_made,
            "idle_closed": self.idle_closed,
            "erased": list(self.erased),
            "now": asyncio.get_running_loop().time(),
        }
        if with_requests:
            report["requests"] = [dataclasses.asdict(seen) for seen in self.seen]
        return report


def _decode(body: bytes) -> Mapping[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise dialects.refuse_llamacpp(f"[json.exception.parse_error.101] {exc}") from exc
    return decoded if isinstance(decoded, dict) else {}


def _not_found() -> Refused:
    return Refused(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}})


if __name__ == "__main__":
    fake_process.main(FakeEngine)
