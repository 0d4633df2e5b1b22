"""Many clients at once that submit, follow, leave, resume, cancel and delete at random, and check whatever they get.

The interleavings come from a seed. A client keeps the books of its tasks: what it was told, every frame it got, and
what it asked for; `audit` compares them with what the server says at the end.
"""

import asyncio
import random
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.identities import Identity
from tests.support.raw_http import exchange, request
from tests.support.wire import Frame, FrameSplitter, check_response, check_whole, durable

FINAL = ("succeeded", "failed", "canceled")
STEP_S = 60.0
"""Bound for a single answer or frame, so that a hang is a failure and not a hang."""


@dataclass
class Book:
    """One task, as its client knows it."""

    task_id: str
    session_id: str
    body: dict[str, Any]
    frames: list[Frame] = field(default_factory=list)
    """Durable frames in order, each once."""
    may_be_canceled: bool = False
    """The client canceled it, deleted its session, or left its stream for longer than the grace may be."""
    accepted: bytes = b""


class ChaosClient:
    """One client: a tenant's key and a seeded will of its own."""

    def __init__(self, url: str, who: Identity, models: list[str], seed: int) -> None:
        self.url = url
        self.headers = who.headers
        self.random = random.Random(seed)
        self.models = models
        self.books: list[Book] = []
        self.refused: Counter[str] = Counter()
        self.statuses: Counter[tuple[str, int]] = Counter()

    async def call(self, method: str, path: str, expected: set[int], body: Any = None) -> httpx.Response:
        """Send, and check that the status is one that may be."""
        async with asyncio.timeout(STEP_S):
            response = check_response(await request(self.url, method, path, self.headers, body))
        name = path.rsplit("/", 1)[1] if path.endswith(("/cancel", "/stream")) else path.split("/")[2]
        self.statuses[f"{method} {name}", response.status_code] += 1
        assert response.status_code in expected, f"{method} {path}: {response.status_code} {response.text}"
        return response

    async def live(self, interleavings: int) -> None:
        """So many tasks, one after the other, each in its own random way."""
        for _ in range(interleavings):
            await self._interleaving()

    async def _interleaving(self) -> None:
        book = await self._submit()
        if book is None:
            return
        way = self.random.choices(
            [
                self._read_whole,
                self._cancel_now,
                self._read_and_cancel,
                self._break_and_resume,
                self._leave,
                self._delete,
            ],
            weights=[3, 3, 4, 5, 2, 2],
        )[0]
        await way(book)

    async def _submit(self) -> Book | None:
        draw = self.random
        reuse = draw.random() < 0.3 and self.books
        session_id = draw.choice(self.books).session_id if reuse else str(uuid.UUID(int=draw.getrandbits(128)))
        task_id = str(uuid.UUID(int=draw.getrandbits(128)))
        body = {
            "task_id": task_id,
            "session_id": session_id,
            "model_ref": draw.choice(self.models),
            "prompt": f"task {task_id}",
            "max_tokens": draw.randint(1, 16),
            "priority": draw.choice(["interactive", "interactive", "batch"]),
            "on_disconnect": draw.choice(["cancel", "continue"]),
        }
        response = await self.call("POST", "/v1/tasks", {202, 429}, body)
        if response.status_code == 429:
            problem = response.json()
            assert problem["code"] in ("ADMISSION_REJECT", "BUDGET_EXHAUSTED"), problem
            self.refused[problem["code"]] += 1
            await self.call("GET", f"/v1/tasks/{task_id}", {404})
            return None
        book = Book(task_id, session_id, body, accepted=response.content)
        self.books.append(book)
        if draw.random() < 0.1:
            again = await self.call("POST", "/v1/tasks", {202}, body)
            assert again.content == book.accepted
        return book

    async def _read_whole(self, book: Book) -> None:
        await self._follow(book, None)
        check_whole(book.frames)

    async def _cancel_now(self, book: Book) -> None:
        await self._cancel(book)
        await self._follow(book, None)
        check_whole(book.frames)

    async def _read_and_cancel(self, book: Book) -> None:
        """Cancel while reading on: what comes after the answer of the cancel is at most what was on its way."""
        reading = asyncio.create_task(self._follow(book, None))
        await self._pause(0.03)
        await self._cancel(book)
        await reading
        check_whole(book.frames)
        again: list[Frame] = []
        await self._follow_into(book.task_id, again, None, 0)
        assert [frame.raw for frame in again] == [frame.raw for frame in book.frames]

    async def _break_and_resume(self, book: Book) -> None:
        for _ in range(self.random.randint(1, 4)):
            if await self._follow(book, self.random.randint(0, 5)):
                break
        await self._follow(book, None)
        check_whole(book.frames)

    async def _leave(self, book: Book) -> None:
        await self._follow(book, self.random.randint(0, 3))

    async def _delete(self, book: Book) -> None:
        await self._follow(book, self.random.randint(0, 2))
        for other in self.books:
            if other.session_id == book.session_id:
                other.may_be_canceled = True
        await self.call("DELETE", f"/v1/sessions/{book.session_id}", {204, 404})

    async def _cancel(self, book: Book) -> None:
        book.may_be_canceled = True
        await self.call("POST", f"/v1/tasks/{book.task_id}/cancel", {204})
        task = (await self.call("GET", f"/v1/tasks/{book.task_id}", {200})).json()
        assert task["state"] in FINAL, f"{task['state']} after its cancel was answered: {task}"

    async def _follow(self, book: Book, frames: int | None) -> bool:
        """Go on after the last durable frame and take so many more, or all. True at the end of the stream."""
        is_whole = await self._follow_into(book.task_id, book.frames, frames, len(book.frames))
        if not is_whole and book.body["on_disconnect"] == "cancel":
            book.may_be_canceled = True
        return is_whole

    async def _follow_into(self, task_id: str, kept: list[Frame], frames: int | None, after: int) -> bool:
        headers = {**self.headers, "Last-Event-ID": str(after)} if after else self.headers
        wanted = None if frames is None else len(kept) + frames
        path = f"/v1/tasks/{task_id}/stream"
        async with asyncio.timeout(STEP_S), exchange(self.url, "GET", path, headers) as response:
            self.statuses["GET stream", response.status] += 1
            if response.status == 204:
                assert kept, "204 although nothing was read"
                assert kept[-1].is_terminal, "204 although the terminal frame was not read"
                return True
            assert response.status == 200, (response.status, (await response.read()).text)
            if len(kept) == wanted:
                return False
            splitter = FrameSplitter()
            async for chunk in response.chunks():
                for frame in durable(splitter.feed(chunk)):
                    assert frame.id == len(kept) + 1, f"{task_id}: {frame} after {len(kept)} frames"
                    kept.append(frame)
                    if len(kept) == wanted:
                        return frame.is_terminal
            assert splitter.rest == b"", splitter.rest
            assert kept, f"{task_id}: the stream ended without a frame"
            assert kept[-1].is_terminal, f"{task_id}: the stream ended after {kept[-1]}"
            return True

    async def _pause(self, most_s: float) -> None:
        """Not a wait for anything: it spreads the steps of the clients over time."""
        await asyncio.sleep(self.random.random() * most_s)


async def audit(client: ChaosClient) -> Counter[str]:
    """Every accepted task has ended once, in the way that its client has a part in. How often each outcome was."""
    outcomes: Counter[str] = Counter()
    for book in client.books:
        task = (await client.call("GET", f"/v1/tasks/{book.task_id}", {200})).json()
        stream = await request(client.url, "GET", f"/v1/tasks/{book.task_id}/stream", client.headers)
        assert stream.status_code == 200, stream.text
        frames = check_whole(FrameSplitter().feed(stream.content))
        assert [frame.raw for frame in frames][: len(book.frames)] == [frame.raw for frame in book.frames]
        _check_outcome(book, task, frames)
        outcomes[task["error"]["code"] if task["error"] else task["state"]] += 1
    return outcomes


LOST_PLACE = ("fair-share", "drop-lru")
"""Policies by which a waiting task gives its place in a full queue to another one."""


def _check_outcome(book: Book, task: dict[str, Any], frames: list[Frame]) -> None:
    tokens = [frame.data["t"] for frame in frames if frame.event == "token"]
    last = frames[-1]
    match task["state"]:
        case "succeeded":
            assert last.event == "end", last
            assert len(tokens) == book.body["max_tokens"], (task, frames)
            assert task["output"]["text"] == "".join(tokens)
        case "canceled":
            assert book.may_be_canceled, f"canceled, and nobody asked for it: {task}"
            assert (last.event, last.data["code"]) == ("error", "CANCELED"), last
        case "failed":
            assert last.event == "error", last
            if last.data["policy_label"] in LOST_PLACE:
                assert [frame.event for frame in frames] == ["error"], (
                    "lost its place in the queue after it had started"
                )
                return
            assert last.data["code"] in ("WORKER_RESET", "REPLICA_EXHAUSTED"), last
        case state:
            raise AssertionError(f"{state} is no final state: {task}")
