"""Load on a live server: flows that keep so many tasks open, and the books of what became of each task.

Everything in the books is what the server told its clients: answers, `started`, `end` and `error` frames.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec

from tests.prove.wire import Http
from tests.support.identities import Identity

PROMPT_COST, OUTPUT_COST = 1.0, 2.0
"""Of a token, as in the configuration's default."""


class InvalidRun(Exception):
    """The server or the load did not do what the measurement rests on."""


@dataclass(slots=True)
class Ran:
    """One accepted task, as its client saw it. Times are the client's monotonic seconds."""

    flow: str
    submitted_at: float
    accepted: Mapping[str, Any]
    started: Mapping[str, Any] | None = None
    started_at: float | None = None
    end: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    ended_at: float | None = None
    tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return int(self.end["usage"]["prompt_tokens"]) if self.end else 0

    @property
    def output_tokens(self) -> int:
        return int(self.end["usage"]["completion_tokens"]) if self.end else 0

    def cost_within(self, begun: float, ended: float) -> float:
        """Weighted tokens that it was served between two times: the prompt at its start, the output evenly after it."""
        if self.end is None or self.started_at is None or self.ended_at is None:
            return 0.0
        prompt = PROMPT_COST * self.prompt_tokens if begun <= self.started_at < ended else 0.0
        lasted = self.ended_at - self.started_at
        overlap = max(0.0, min(ended, self.ended_at) - max(begun, self.started_at))
        return prompt + OUTPUT_COST * self.output_tokens * (overlap / lasted if lasted > 0 else 0.0)


@dataclass(slots=True)
class Books:
    """What became of every task, and how many of each flow wait right now."""

    ran: list[Ran] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)
    least_waiting: dict[str, int] = field(default_factory=dict)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By flow and policy label."""
    tokens: int = 0

    def waits(self, flow: str, change: int) -> None:
        self.waiting[flow] += change
        now = self.waiting[flow]
        if now < self.least_waiting.get(flow, now + 1):
            self.least_waiting[flow] = now


@dataclass(frozen=True, slots=True)
class Flow:
    """A tenant's clients at one priority. They keep `outstanding` tasks open; after one that was refused or lost its
    place they wait `retry_s` seconds. `make` gives what the next task asks.
    """

    name: str
    who: Identity
    make: Callable[[], Mapping[str, Any]]
    outstanding: int
    priority: str = "interactive"
    retry_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time, in monotonic seconds. `tokens` came in it over all flows."""

    begun: float
    ended: float
    tokens: int
    least_waiting: Mapping[str, int]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.ended - self.begun)

    def served(self, books: Books) -> Counter[str]:
        """Weighted tokens by flow."""
        served: Counter[str] = Counter()
        for ran in books.ran:
            served[ran.flow] += ran.cost_within(self.begun, self.ended)  # type: ignore[assignment]
        return served

    def starts(self, books: Books) -> Counter[str]:
        """Tasks that started, by flow."""
        return Counter(
            ran.flow for ran in books.ran if ran.started_at is not None and self.begun <= ran.started_at < self.ended
        )


class Load:
    """All flows of one measurement, from entering to leaving; what is open then is canceled by its reader's leaving."""

    def __init__(self, port: int, model: str, flows: Sequence[Flow]) -> None:
        self.books = Books()
        self._model = model
        self._flows = flows
        self._http = Http(port)
        self._clients: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._clients = [
            asyncio.create_task(self._keep(flow), name=f"{flow.name}/{number}")
            for flow in self._flows
            for number in range(flow.outstanding)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._http.close()

    async def window(self, is_enough: Callable[[Counter[str]], bool], *, least_s: float, most_s: float) -> Window:
        """Watch from now until enough was served by flow, and for `least_s` seconds at least.

        Tasks that run at its end are waited for, so that they count. Raises InvalidRun when it is not enough after
        `most_s` seconds.
        """
        books = self.books
        books.least_waiting = dict(books.waiting)
        begun, before = time.monotonic(), books.tokens
        while True:
            await self.pause(0.25)
            ended = time.monotonic()
            window = Window(begun, ended, books.tokens - before, dict(books.least_waiting))
            if ended - begun >= least_s and is_enough(window.served(books)):
                break
            if ended - begun > most_s:
                raise InvalidRun(f"after {most_s:g} s only {dict(window.served(books))} weighted tokens were served")
        running = [ran for ran in books.ran if ran.started_at is not None and ran.ended_at is None]
        while any(ran.ended_at is None for ran in running):
            await self.pause(0.05)
        return window

    async def until(self, condition: Callable[[Books], bool], within_s: float = 30.0) -> None:
        """Return once the books say so. Raises InvalidRun when they do not in time."""
        late = time.monotonic() + within_s
        while not condition(self.books):
            if time.monotonic() > late:
                raise InvalidRun(f"not within {within_s:g} s; waiting {dict(self.books.waiting)}, {self.books.refused}")
            await self.pause(0.02)

    async def pause(self, seconds: float) -> None:
        """Let the flows go on for a while; what one of them stumbled on is raised here."""
        await asyncio.sleep(seconds)
        for client in self._clients:
            if client.done():
                client.result()

    async def _keep(self, flow: Flow) -> None:
        while True:
            body = {"model_ref": self._model, "priority": flow.priority, "on_disconnect": "cancel", **flow.make()}
            ran = await follow(self._http, flow.name, flow.who, body, self.books)
            if ran is None or ran.error is not None:
                await asyncio.sleep(flow.retry_s)


async def follow(http: Http, flow: str, who: Identity, body: Mapping[str, Any], books: Books) -> Ran | None:
    """Submit a task and read its stream to the end, with everything in the books. None when it was refused with 429 or
    422; InvalidRun for what should not be.
    """
    task_id = str(uuid.uuid4())
    submitted_at = time.monotonic()
    answer = await http.ask("POST", "/v1/tasks", who, {"task_id": task_id, **body})
    if answer.status in (422, 429):
        problem = answer.json()
        books.refused[flow, problem["policy_label"] or problem["code"]] += 1
        return None
    if answer.status != 202:
        raise InvalidRun(f"{answer.status} for a task of {flow}: {answer.body[:300]!r}")
    ran = Ran(flow, submitted_at, answer.json())
    books.ran.append(ran)
    books.waits(flow, 1)
    reader = _Reader(ran, books)
    try:
        answer = await http.ask("GET", f"/v1/tasks/{task_id}/stream", who, on_frame=reader.take)
    except asyncio.CancelledError:
        reader.leave()
        raise
    if answer.status != 200 or ran.ended_at is None:
        raise InvalidRun(f"the stream of a task of {flow} ended without its end: {answer.status} {answer.body[:300]!r}")
    return ran


class _Reader:
    """One stream: what its frames say goes to the books."""

    __slots__ = ("_books", "_ran")

    def __init__(self, ran: Ran, books: Books) -> None:
        self._ran = ran
        self._books = books

    def take(self, frame: bytes) -> None:
        """Token frames are counted; of the others the data is kept."""
        if b"event: token\n" in frame:
            self._ran.tokens += 1
            self._books.tokens += 1
            return
        event, _, data = frame.partition(b"\ndata: ")
        ran = self._ran
        if event.endswith(b"event: started"):
            ran.started, ran.started_at = msgspec.json.decode(data), time.monotonic()
            self._books.waits(ran.flow, -1)
        elif event.endswith(b"event: end"):
            ran.end, ran.ended_at = msgspec.json.decode(data), time.monotonic()
            self._check()
        elif event.endswith(b"event: error"):
            self.leave()
            ran.error, ran.ended_at = msgspec.json.decode(data), time.monotonic()

    def leave(self) -> None:
        if self._ran.started is None and self._ran.ended_at is None:
            self._books.waits(self._ran.flow, -1)

    def _check(self) -> None:
        if self._ran.tokens != self._ran.output_tokens:
            raise InvalidRun(f"{self._ran.tokens} token frames, and the end says {self._ran.output_tokens}")
