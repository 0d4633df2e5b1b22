"""One generation of FakeEngine: its record, and the timing of its frames.

It sends what the dialect encodes when it is due, and goes wrong when it was told to; slots are the engine's business,
sockets the connection's.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llorch.testing import fake_dialects as dialects
from llorch.testing.fake_dialects import Encoder, Order
from llorch.testing.fake_faults import Faults, Frost


@dataclass(slots=True)
class Seen:
    """The record of one generation. Times are the event loop's, in seconds; `state` is `queued`, `running`,
    `finished`, `cancelled` (the client closed the connection before the end) or `failed` (by a fault).
    """

    id: int
    path: str
    prompt: str
    seed: int
    max_tokens: int
    prompt_tokens: int
    arrived_at: float
    body: Mapping[str, Any]
    state: str = "queued"
    slot: int | None = None
    tokens_sent: int = 0
    ended_at: float | None = None
    slot_freed_at: float | None = None


class Host(Protocol):
    """The engine, as a generation sees it."""

    ctx: int
    token_interval_s: float
    tokens_per_segment: int
    prefill_interval_s: float
    overhead_s: float
    prefill_token_s: float
    decode_token_s: float
    frost: Frost

    def free(self, run: "Run") -> None:
        """The run's slot, or its place in line, is free again."""
        ...

    def changed(self) -> None:
        """Something happened."""
        ...


class Wire(Protocol):
    """The connection, as a generation sees it."""

    is_full: bool

    def send_head(self, status: int, content_type: str, *, length: int = 0, chunked: bool = False) -> None:
        """Send status and headers."""
        ...

    def send(self, status: int, body: bytes) -> None:
        """Send a whole answer."""
        ...

    def write(self, data: bytes, faults: Faults) -> None:
        """Send part of a body, in the pieces that the faults ask for."""
        ...

    def answered(self) -> None:
        """The answer is complete."""
        ...

    def close(self) -> None:
        """Close after what was written."""
        ...


class Run:
    """One generation: sends its frames when they are due."""

    __slots__ = (
        "_connection",
        "_credit",
        "_due",
        "_encoder",
        "_engine",
        "_faults",
        "_finish",
        "_is_held",
        "_loop",
        "_order",
        "_prompt_tokens",
        "_timer",
        "_tokens",
        "seen",
    )

    def __init__(
        self,
        engine: Host,
        connection: Wire,
        order: Order,
        *,
        seen: Seen,
        encoder: Encoder,
        faults: Faults,
    ) -> None:
        self._engine = engine
        self._connection: Wire | None = connection
        self._order = order
        self._encoder = encoder
        self._prompt_tokens = seen.prompt_tokens
        self._faults = faults
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._credit = 0
        self._is_held = False
        self.seen = seen
        self._tokens, self._finish = self._plan()

    def start(self) -> None:
        """The slot is there."""
        if self._faults.stall:
            return
        if self._order.stream and self._connection is not None:
            self._connection.send_head(200, "text/event-stream", chunked=True)
        engine = self._engine
        self._due = self._loop.time()
        work_s = engine.overhead_s + engine.prefill_token_s * self._prompt_tokens
        if work_s > 0:
            self._report_prefill(0)
            self._due += work_s
            self._timer = self._loop.call_at(self._due, self._prefill, self._prompt_tokens)
        else:
            self._prefill(0)

    def release(self, tokens: int) -> None:
        """Send that many tokens of a held generation."""
        if not self._faults.hold:
            return
        self._credit += tokens
        if self._timer is None:
            self._step()

    def client_gone(self) -> None:
        """The connection is closed. What is not streamed runs on, as it does in llama.cpp."""
        self._connection = None
        if self._engine.frost.is_frozen:
            self._engine.frost.hold(self.client_gone)
            return
        if self.seen.state not in ("queued", "running"):
            return
        if self._order.path == "/completion" and not self._order.stream and self.seen.slot is not None:
            return
        self.stop_timer()
        self._end("cancelled", free_after_s=self._faults.slow_abort_s if self.seen.slot is not None else 0.0)

    def writable(self) -> None:
        """The socket takes data again."""
        if self._timer is None and self.seen.state == "running" and not self._faults.hold and not self._faults.stall:
            self._step()

    def stop_timer(self) -> None:
        """Do nothing more on its own."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _plan(self) -> tuple[list[str], str]:
        """The tokens and how they end: `limit`, `word`, `eos`, or `none` for an empty prompt."""
        order = self._order
        if not self._prompt_tokens:
            return [], "none"
        prompt, done, wanted = dialects.wanted_tokens(order.prompt)
        count = min(order.max_tokens, max(self._engine.ctx - self._prompt_tokens, 1))
        tokens = dialects.make_tokens(prompt, order.seed, done + count)[done:]
        finish = "limit"
        eos = self._faults.eos_after
        if eos is None and wanted is not None:
            eos = max(0, wanted - done)
        if eos is not None and eos < len(tokens):
            tokens, finish = tokens[:eos], "eos"
        if order.stop:
            tokens, is_cut = dialects.cut_at_stop(tokens, order.stop)
            finish = "word" if is_cut else finish
        return tokens, finish

    def _prefill(self, processed: int) -> None:
        """Report progress per 64 prompt tokens, then go on to the first token."""
        self._timer = None
        if self._engine.frost.is_frozen:
            self._hold(lambda: self._prefill(processed))
            return
        total = self._prompt_tokens
        while True:
            self._report_prefill(min(processed, total))
            if processed >= total:
                break
            processed += dialects.BATCH_TOKENS
            if self._engine.prefill_interval_s > 0:
                self._due += self._engine.prefill_interval_s
                self._timer = self._loop.call_at(self._due, self._prefill, processed)
                return
        self._due += self._segment_s()
        self._schedule()

    def _report_prefill(self, processed: int) -> None:
        if self._order.return_progress and self._order.stream:
            self._write(self._encoder.progress(self._prompt_tokens, processed))

    def _segment_s(self) -> float:
        """How long the tokens that are sent together next take."""
        engine = self._engine
        count = min(engine.tokens_per_segment, len(self._tokens) - self.seen.tokens_sent)
        return engine.token_interval_s + engine.decode_token_s * count

    def _schedule(self) -> None:
        """Set the timer for the next token, if it may be sent."""
        if self._faults.hold:
            if self._credit <= 0 and self.seen.tokens_sent < len(self._tokens):
                return
            self._timer = self._loop.call_soon(self._step)
        elif self._engine.token_interval_s > 0 or self._engine.decode_token_s > 0:
            self._timer = self._loop.call_at(self._due, self._step)
        elif self._connection is None or not self._connection.is_full:
            self._timer = self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Send what is due now, and arrange for what follows."""
        self._timer = None
        seen, engine = self.seen, self._engine
        if engine.frost.is_frozen:
            self._hold(self._step)
            return
        if self._faults.hold and self._credit <= 0:
            return
        frames = []
        for _ in range(engine.tokens_per_segment):
            if seen.tokens_sent >= len(self._tokens) or self._is_struck():
                break
            frames.append(self._next_frame())
        if self._order.stream:
            self._write(b"".join(frames))
        if self._strike():
            return
        if seen.tokens_sent >= len(self._tokens):
            self._complete()
            return
        self._due += self._segment_s()
        self._schedule()
        engine.changed()

    def _hold(self, action: Callable[[], None]) -> None:
        """This comes next, when the frost is over: once, however often it was due."""
        if not self._is_held:
            self._is_held = True
            self._engine.frost.hold(lambda: self._thaw(action))

    def _thaw(self, action: Callable[[], None]) -> None:
        self._is_held = False
        if self.seen.state == "running":
            self._due = max(self._due, self._loop.time())
            action()

    def _next_frame(self) -> bytes:
        seen = self.seen
        text = self._tokens[seen.tokens_sent]
        seen.tokens_sent += 1
        self._credit -= 1
        is_last = seen.tokens_sent == len(self._tokens)
        return self._encoder.token(text, seen.tokens_sent, self._finish if is_last else None)

    def _is_struck(self) -> bool:
        sent, faults = self.seen.tokens_sent, self._faults
        return sent in (faults.close_after, faults.silent_after, faults.error_after)

    def _strike(self) -> bool:
        """Let the fault happen whose time has come."""
        sent, faults = self.seen.tokens_sent, self._faults
        if not self._is_struck():
            return False
        connection = self._connection
        if sent == faults.close_after and connection is not None:
            self._connection = None
            self._end("failed")
            connection.close()
        elif sent == faults.error_after and connection is not None:
            connection.write(self._encoder.fault("the fake engine was told to fail"), faults)
            self._end("failed")
            connection.answered()
        self._engine.changed()
        return True

    def _complete(self) -> None:
        count = len(self._tokens)
        connection = self._connection
        if connection is not None:
            if self._order.stream:
                connection.write(self._encoder.end(self._finish, count), self._faults)
            else:
                connection.send(200, self._encoder.whole("".join(self._tokens), self._finish, count))
        self._end("finished")
        if connection is not None:
            connection.answered()

    def _write(self, data: bytes) -> None:
        if data and self._connection is not None:
            self._connection.write(data, self._faults)

    def _end(self, state: str, *, free_after_s: float = 0.0) -> None:
        self.seen.state = state
        self.seen.ended_at = self._loop.time()
        if free_after_s > 0:
            self._timer = self._loop.call_later(free_after_s, self._engine.free, self)
            self._engine.changed()
        else:
            self._engine.free(self)
