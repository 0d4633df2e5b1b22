"""Load that runs beside a test while it breaks things: clients in a thread of their own, who check all that they get.

Every status, every frame and every text is checked; what is wrong is a finding, and `stop` raises AssertionError for
it. What a test may expect of the service meanwhile (refusals, failures) it says beforehand.
"""

import asyncio
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, Self

import httpx

from llorch.testing.fake_dialects import expected_tokens
from tests.support.identities import ALICE, BOB, Identity
from tests.support.processes import wait_for
from tests.support.raw_http import exchange, request
from tests.support.wire import Frame, FrameSplitter, check_response, check_whole, durable, schema

FINAL: Final = ("succeeded", "failed", "canceled")
KEEPING: Final[Mapping[str, Any]] = {"transcript_ttl_s": 3600, "record_ttl_s": 7200, "records_per_tenant": 100_000}
"""Section `streams` of a server that a load can audit at its end: nothing is forgotten meanwhile."""

STEP_S: Final = 30.0
"""Bound for an answer that is not a stream."""
_FINDINGS_MAX: Final = 50
_FINDING_CHARS: Final = 1000

Oracle = Callable[[str, int, int], str | None]
"""The text of the answer to (prompt, seed, max_tokens), all of it; None where it is not known."""


def fake_answer(prompt: str, seed: int, max_tokens: int) -> str:
    """The oracle of FakeEngine."""
    return "".join(expected_tokens(prompt, seed, max_tokens))


@dataclass(frozen=True, slots=True)
class Want:
    """One sort of task, drawn as often as its `share` of all says.

    `max_tokens` are the least and the most. Without `prompts` each task has one of its own, that FakeEngine answers
    with `max_tokens` tokens (and goes on with after a break: see `fake_dialects.wanted_tokens`); without `seeds` it has
    a random one. `fields` are added to the body.
    """

    model: str
    priority: str = "interactive"
    is_strict: bool = False
    max_tokens: tuple[int, int] = (4, 32)
    share: float = 1.0
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, draw: random.Random) -> dict[str, Any]:
        """The body of one task: the same for the same draws, but for its task_id."""
        count = draw.randint(*self.max_tokens)
        return {
            "task_id": str(uuid.uuid4()),
            "model_ref": self.model,
            "prompt": draw.choice(self.prompts) if self.prompts else f"load {draw.getrandbits(64):x} <out:{count}>",
            "max_tokens": count,
            "seed": draw.choice(self.seeds) if self.seeds else draw.randrange(2**31),
            "priority": self.priority,
            "determinism": "strict" if self.is_strict else "best_effort",
            "on_disconnect": "continue",
            **self.fields,
        }


@dataclass(slots=True)
class Ticket:
    """One accepted task, as its client knows it. `outcome` is `succeeded` or the code of its error, once it ended."""

    who: Identity
    body: Mapping[str, Any]
    frames: list[Frame] = field(default_factory=list)
    """Durable ones in order, each once."""
    outcome: str | None = None
    ended_at: float | None = None

    @property
    def task_id(self) -> str:
        return str(self.body["task_id"])

    @property
    def path(self) -> str:
        return f"/v1/tasks/{self.task_id}"

    @property
    def text(self) -> str:
        return "".join(frame.data["t"] for frame in self.frames if frame.event == "token")


@dataclass(frozen=True, slots=True)
class Report:
    """What a load saw."""

    statuses: Mapping[tuple[str, int], int]
    """By step (`submit`, `stream`, `look`) and status."""
    refused: Mapping[str, int]
    """Submits that were not accepted, by code."""
    outcomes: Mapping[str, int]
    """Accepted tasks that ended: `succeeded`, or the code of their error."""
    failures: Mapping[str, str]
    """By task_id: code, policy label and detail."""
    accepted: int
    open: int
    """Accepted tasks without a terminal frame."""
    resumes: int
    longest_gap_s: float
    """The longest time in which no task ended, from the start until the load was told to stop."""
    findings: tuple[str, ...]
    """What must not be."""

    def check(self) -> None:
        """Raise AssertionError with every finding."""
        assert not self.findings, "\n".join([f"{len(self.findings)} findings:", *self.findings])


class Load:
    """`clients` clients, each with one task at a time: it submits it, follows it to its end, and looks at the result.

    `allowed` are statuses that a submit may have beside 202, `may_fail` the codes with which an accepted task may end
    (ADMISSION_REJECT among them: in a full queue a tenant with less than its share takes another one's place).
    A share `resumes` of the streams is broken off by the client and resumed, up to three times. `task_s` bounds a task
    from its acceptance to its end, `most_s` the time in which tasks are submitted. A refused client waits as long as
    it was told, but not over `retry_most_s`.
    """

    def __init__(
        self,
        url: str,
        wants: Sequence[Want],
        *,
        clients: int = 8,
        people: Sequence[Identity] = (ALICE, BOB),
        allowed: Collection[int] = (),
        may_fail: Collection[str] = (),
        oracle: Oracle | None = None,
        resumes: float = 0.3,
        seed: int = 1,
        task_s: float = 120.0,
        most_s: float = 600.0,
        retry_most_s: float = 0.25,
    ) -> None:
        self.tickets: list[Ticket] = []
        self._url = url
        self._wants = wants
        self._people = people
        self._clients = [random.Random(f"{seed}/{number}") for number in range(clients)]
        self._allowed = {202, *allowed}
        self._may_fail = set(may_fail)
        self._oracle = oracle
        self._resume_share = resumes
        self._task_s = task_s
        self._most_s = most_s
        self._retry_most_s = retry_most_s
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._refused: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._findings: list[str] = []
        self._resumes = 0
        self._open_streams = 0
        self._found = 0
        self._begun_at = 0.0
        self._told_at: float | None = None
        self._drain_s = 0.0
        self._told: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    # What a test does.

    def start(self) -> Self:
        """Begin, and return as soon as the clients are there."""
        self._thread.start()
        assert self._has_begun.wait(STEP_S)
        return self

    def stop(self, within_s: float = 60.0) -> Report:
        """Submit nothing more, let what is open end within so many seconds, and look at every task once more.

        Raises AssertionError with all that is wrong.
        """
        self._drain_s = within_s
        self._tell()
        self._thread.join(within_s + 2 * STEP_S)
        report = self.report()
        report.check()
        assert not self._thread.is_alive(), f"the load did not end: {report}"
        return report

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Stop and judge, unless the test has done so; after a failure of the test leave at once."""
        if kind is not None:
            self._drain_s = 0.0
            self._tell()
            self._thread.join(2 * STEP_S)
        elif self._thread.is_alive():
            self.stop()

    def report(self) -> Report:
        """What was seen until now."""
        tickets = list(self.tickets)
        return Report(
            statuses=dict(self._statuses),
            refused=dict(self._refused),
            outcomes=dict(self._outcomes),
            failures={each.task_id: _tell_failure(each) for each in tickets if each.outcome not in (None, "succeeded")},
            accepted=len(tickets),
            open=sum(each.outcome is None for each in tickets),
            resumes=self._resumes,
            longest_gap_s=_longest_gap_s(self._begun_at, tickets, self._told_at or time.monotonic()),
            findings=tuple(self._findings),
        )

    @property
    def is_running(self) -> bool:
        """Whether its clients, or its audit, are at work."""
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise AssertionError for what is wrong already."""
        self.report().check()

    def wait_succeeded(self, count: int, within_s: float = 30.0) -> None:
        """Return when so many more tasks have succeeded. Raises AssertionError when they do not, or for a finding."""
        before = self._outcomes["succeeded"]

        def look() -> bool:
            self.check()
            return self._outcomes["succeeded"] >= before + count

        wait_for(look, f"{count} more tasks succeed (until now: {dict(self._outcomes)})", within_s, every_s=0.02)

    def wait_open(self, count: int, within_s: float = 30.0) -> None:
        """Return when so many streams are open at once."""
        wait_for(lambda: self._open_streams >= count, f"{count} streams are open", within_s, every_s=0.005)

    # In the thread.

    def _tell(self) -> None:
        loop, told = self._loop, self._told
        if loop is not None and told is not None and self._thread.is_alive():
            try:
                loop.call_soon_threadsafe(told.set)
            except RuntimeError:  # it has just ended
                return

    async def _run(self) -> None:
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Event()
        self._begun_at = time.monotonic()
        self._has_begun.set()
        clients = [asyncio.create_task(self._live(draw)) for draw in self._clients]
        try:
            await asyncio.wait_for(self._told.wait(), self._most_s)
        except TimeoutError:
            self._told.set()
            self._find(f"nobody stopped the load within {self._most_s:g} s")
        self._told_at = time.monotonic()
        _, late = await asyncio.wait(clients, timeout=self._drain_s)
        for client in late:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if self._drain_s > 0:
            await self._audit()

    async def _live(self, draw: random.Random) -> None:
        """One client: one task after the other."""
        assert self._told is not None
        while not self._told.is_set():
            want = draw.choices(self._wants, [each.share for each in self._wants])[0]
            body, who = want.draw(draw), draw.choice(self._people)
            found = self._found
            with self._finding(f"{body['task_id']}"):
                ticket = await self._submit(who, body)
                if ticket is not None:
                    async with asyncio.timeout(self._task_s):
                        await self._follow(ticket, draw)
                        self._judge(ticket, await self._look(ticket))
            if self._found > found:
                await self._pause(STEP_S)

    async def _submit(self, who: Identity, body: Mapping[str, Any]) -> Ticket | None:
        """The accepted task, or None when it was refused as it may be."""
        response = await self._call("submit", "POST", "/v1/tasks", who, body)
        assert response.status_code in self._allowed, f"submit: {response.status_code} {response.text}"
        if response.status_code == 202:
            schema("TaskAccepted").validate(response.json())
            ticket = Ticket(who, body)
            self.tickets.append(ticket)
            return ticket
        problem = response.json()
        self._refused[problem["code"]] += 1
        await self._pause((problem["retry_after_ms"] or 0) / 1000)
        return None

    async def _follow(self, ticket: Ticket, draw: random.Random) -> None:
        """Read the stream to its end; now and then break it off and resume it before."""
        breaks = draw.randint(1, 3) if draw.random() < self._resume_share else 0
        for _ in range(breaks):
            if await self._read(ticket, ticket.frames, most=draw.randint(1, 8)):
                break
            self._resumes += 1
        else:
            await self._read(ticket, ticket.frames)
        ticket.ended_at = time.monotonic()
        check_whole(ticket.frames)

    async def _read(self, ticket: Ticket, kept: list[Frame], most: int | None = None) -> bool:
        """Append the frames behind those that are kept, at most so many. True when the last is terminal."""
        wanted = None if most is None else len(kept) + most
        headers = {**ticket.who.headers, **({"Last-Event-ID": str(len(kept))} if kept else {})}
        async with exchange(self._url, "GET", f"{ticket.path}/stream", headers) as response:
            self._statuses["stream", response.status] += 1
            assert response.status == 200, f"stream: {response.status} {(await response.read()).text}"
            splitter = FrameSplitter()
            with self._open_stream():
                async for chunk in response.chunks():
                    for frame in durable(splitter.feed(chunk)):
                        assert frame.id == len(kept) + 1, f"{frame} after {len(kept)} frames"
                        kept.append(frame)
                        if len(kept) == wanted:
                            return frame.is_terminal
        assert splitter.rest == b"", f"the stream ended within {splitter.rest!r}"
        assert kept, "the stream ended without a frame"
        assert kept[-1].is_terminal, f"the stream ended after {kept[-1]}"
        return True

    async def _look(self, ticket: Ticket) -> dict[str, Any]:
        response = await self._call("look", "GET", ticket.path, ticket.who)
        assert response.status_code == 200, f"look: {response.status_code} {response.text}"
        task: dict[str, Any] = response.json()
        schema("Task").validate(task)
        return task

    def _judge(self, ticket: Ticket, task: Mapping[str, Any]) -> None:
        """The task has ended as its stream said, with the text that its stream had and that it has to have."""
        last, outcome = ticket.frames[-1], _outcome(ticket.frames[-1])
        ticket.outcome = outcome
        self._outcomes[outcome] += 1
        _check_agrees(ticket, task)
        if last.event == "error":
            assert outcome in self._may_fail, f"failed: {_tell_failure(ticket)}"
        body = ticket.body
        text = self._oracle(body["prompt"], body["seed"], body["max_tokens"]) if self._oracle else None
        if text is not None:
            said = ticket.text
            is_right = said == text if last.event == "end" else text.startswith(said)
            assert is_right, f"{outcome} with {said!r}, which should be {text!r}"

    async def _audit(self) -> None:
        """Every accepted task has one end, the one that its client was told, and its stream has not changed."""
        gate = asyncio.Semaphore(len(self._clients))

        async def audit(ticket: Ticket) -> None:
            async with gate:
                with self._finding(f"{ticket.task_id}, at the end"):
                    async with asyncio.timeout(STEP_S):
                        await self._audit_one(ticket)

        await asyncio.gather(*(audit(ticket) for ticket in list(self.tickets)))

    async def _audit_one(self, ticket: Ticket) -> None:
        task = await self._look(ticket)
        assert task["state"] in FINAL, f"still {task['state']}"
        again: list[Frame] = []
        await self._read(ticket, again)
        raws = [frame.raw for frame in check_whole(again)]
        assert raws[: len(ticket.frames)] == [frame.raw for frame in ticket.frames], "its stream has changed"
        if ticket.outcome is None:  # nobody read it to its end
            ticket.frames = again
            self._judge(ticket, task)
        assert len(raws) == len(ticket.frames), "its stream went on behind its last frame"
        _check_agrees(ticket, task)

    async def _call(
        self, step: str, method: str, path: str, who: Identity, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        async with asyncio.timeout(STEP_S):
            response = check_response(await request(self._url, method, path, who.headers, body))
        self._statuses[step, response.status_code] += 1
        return response

    async def _pause(self, asked_s: float) -> None:
        """What a refused client was told to wait, or less; not when the load ends."""
        assert self._told is not None
        try:
            await asyncio.wait_for(self._told.wait(), min(max(asked_s, 0.01), self._retry_most_s))
        except TimeoutError:
            return

    @contextmanager
    def _open_stream(self) -> Iterator[None]:
        self._open_streams += 1
        try:
            yield
        finally:
            self._open_streams -= 1

    @contextmanager
    def _finding(self, where: str) -> Iterator[None]:
        """Whatever goes wrong within is a finding."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001 (a broken connection as well as a lie)
            self._find(f"{where}: {type(exc).__name__}: {exc}")

    def _find(self, text: str) -> None:
        self._found += 1
        if len(self._findings) < _FINDINGS_MAX:
            self._findings.append(text[:_FINDING_CHARS])


class StreamSet(Load):
    """So many streams, open all the time: as one ends, its client submits the next task at once and follows it.

    Nothing may be refused, fail, or be broken off.
    """

    def __init__(self, url: str, want: Want, count: int, *, oracle: Oracle | None = None, **bounds: float) -> None:
        super().__init__(url, [want], clients=count, oracle=oracle, resumes=0, **bounds)  # type: ignore[arg-type]
        self.count = count

    def start(self) -> Self:
        """Begin, and return when all streams are open."""
        super().start()
        self.wait_open(self.count)
        return self


def _outcome(last: Frame) -> str:
    return "succeeded" if last.event == "end" else str(last.data["code"])


def _check_agrees(ticket: Ticket, task: Mapping[str, Any]) -> None:
    """What GET says of the task is what its stream said."""
    last, error = ticket.frames[-1], task["error"]
    said = "succeeded" if last.event == "end" else "canceled" if last.data["code"] == "CANCELED" else "failed"
    assert task["state"] == said, f"{task['state']}, and its stream ended with {last}"
    assert (error["code"] if error else "succeeded") == _outcome(last), f"{error}, and its stream ended with {last}"
    kept = task["output"]["text"] if task["output"] else ""
    assert kept == ticket.text, f"its output is {kept!r}, its stream had {ticket.text!r}"


def _tell_failure(ticket: Ticket) -> str:
    problem = ticket.frames[-1].data
    return f"{problem['code']} ({problem['policy_label']}): {problem['message']}"


def _longest_gap_s(begun_at: float, tickets: Iterable[Ticket], now: float) -> float:
    ends = sorted(ticket.ended_at for ticket in tickets if ticket.ended_at is not None)
    times = [begun_at, *ends, max([now, *ends])]
    return max(after - before for before, after in pairwise(times))
