"""An engine inside the test's process: a `service.ports.Engine` that does what the test says, token by token.

It speaks no protocol; the FakeEngine of `llorch.testing.fake_engine` is the one over HTTP.
"""

import asyncio
from collections.abc import Callable, Sequence

from llorch.errors import WorkerReset
from llorch.service.ports import Completed, EngineFacts, Generation, Message, OnTokens, SlotLoad, Usage


class Gate:
    """Lets through, or holds back until it is opened again."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.entered = 0

    def shut(self) -> None:
        """Whoever comes now waits."""
        self._open.clear()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()

    async def passage(self) -> None:
        """Return when the gate is open."""
        self.entered += 1
        await self._open.wait()


class FakeGeneration:
    """One generation under way: the test sends what the engine would produce."""

    def __init__(self, order: Generation, on_tokens: OnTokens) -> None:
        self.order = order
        self.is_closed = False
        self.sent: list[str] = []
        self._on_tokens = on_tokens
        self._end: asyncio.Future[Completed] = asyncio.get_running_loop().create_future()

    def send(self, *tokens: str) -> None:
        """Tokens that arrive together. After the end or a cancel a real engine would not; this one obeys the test."""
        self.sent += tokens
        try:
            self._on_tokens(tokens)
        except Exception as error:  # noqa: BLE001 (raised again by run)
            if not self._end.done():
                self.fail(error)

    def finish(self, reason: str = "length") -> None:
        """The engine's last word."""
        usage = Usage(prompt_tokens=len(self.order.prompt), completion_tokens=len(self.sent), cached_tokens=None)
        self._end.set_result(Completed(reason, usage))

    def fail(self, error: Exception) -> None:
        """The engine, or the adapter itself, fails here."""
        self._end.set_exception(error)

    async def run(self) -> Completed:
        """What `generate` does until its end."""
        try:
            return await self._end
        finally:
            self.is_closed = True


class FakeEnginePort:
    """One replica. With `answer` every generation gives these tokens at once; without, it waits for the test.

    `releasing`, `counting` and `probing` are gates before wait_released, the tokenizer and the health check. A fault
    set as `health`, `tokenizer` or `start` is raised there. `count` counts the tokens of a text. `foreign` slots work
    for somebody else, None: it does not tell. `erased` are the slots whose cache was forgotten, unless `can_erase` not.
    """

    can_interrupt = True

    def __init__(self, *, slots: int | None = 1, ctx: int | None = 4096, answer: Sequence[str] | None = None) -> None:
        self.facts = EngineFacts(slots, ctx, engine_version="v1", model_digest="sha256:aa", model_name="m")
        self.answer = answer
        self.generations: list[FakeGeneration] = []
        self.released: list[int] = []
        self.erased: list[int] = []
        self.can_erase = True
        self.foreign: int | None = 0
        self.probes = 0
        self.readings = 0
        self.is_closed = False
        self.count: Callable[[str], int] = lambda text: len(text.split())
        self.health: Exception | None = None
        self.tokenizer: Exception | None = None
        self.start: Exception | None = None
        self.releasing, self.counting, self.probing = Gate(), Gate(), Gate()
        self._news = asyncio.Event()

    async def generate(self, generation: Generation, on_tokens: OnTokens) -> Completed:
        """Begin a generation that the test can reach."""
        begun = FakeGeneration(generation, on_tokens)
        self.generations.append(begun)
        self._news.set()
        if self.start is not None:
            begun.fail(self.start)
        elif self.answer is not None:
            begun.send(*self.answer)
            begun.finish()
        return await begun.run()

    async def generation(self, number: int) -> FakeGeneration:
        """The generation with this number (from 0), once it has begun."""
        while len(self.generations) <= number:
            self._news.clear()
            await self._news.wait()
        return self.generations[number]

    async def check_health(self) -> None:
        """Healthy unless `health` says otherwise."""
        self.probes += 1
        await self.probing.passage()
        if self.health is not None:
            raise self.health

    async def read_facts(self) -> EngineFacts:
        """Whatever `facts` is."""
        self.readings += 1
        return self.facts

    async def wait_released(self, slot: int) -> None:
        """Wait at the gate `releasing`, then note the slot."""
        await self.releasing.passage()
        self.released.append(slot)

    async def read_load(self) -> SlotLoad | None:
        """Generations that are not closed, and foreign ones."""
        if self.foreign is None:
            return None
        return SlotLoad(self.foreign + sum(not generation.is_closed for generation in self.generations))

    async def erase(self, slot: int) -> bool:
        """Note the slot, if it can."""
        if self.can_erase:
            self.erased.append(slot)
        return self.can_erase

    async def count_tokens(self, text: str) -> int:
        """As `count` says, behind the gate `counting`."""
        await self.counting.passage()
        if self.tokenizer is not None:
            raise self.tokenizer
        return self.count(text)

    async def render_messages(self, messages: Sequence[Message]) -> str:
        """A line for each message; behind the gate `counting`."""
        await self.counting.passage()
        if self.tokenizer is not None:
            raise self.tokenizer
        return "".join(f"<{message.role}> {message.content}\n" for message in messages)

    async def aclose(self) -> None:
        """Remember it."""
        self.is_closed = True


class PacedEnginePort(FakeEnginePort):
    """One replica that gives a token each `token_s` seconds until it has given all; `mute`: none, and it never ends.

    The n-th token of a prompt is always the same. `orders` are what was asked for, `sent` how many tokens of each came.
    """

    def __init__(
        self, *, slots: int | None = 1, ctx: int | None = 4096, token_s: float = 0.01, mute: bool = False
    ) -> None:
        super().__init__(slots=slots, ctx=ctx)
        self.token_s = token_s
        self.mute = mute
        self.orders: list[Generation] = []
        self.sent: list[int] = []
        self.running = 0
        self._closing = asyncio.Event()

    async def generate(self, generation: Generation, on_tokens: OnTokens) -> Completed:
        """Token by token; broken off when the client of the engine is closed, as a connection would be."""
        number = len(self.orders)
        self.orders.append(generation)
        self.sent.append(0)
        if self.start is not None:
            raise self.start
        self.running += 1
        try:
            while self.mute or self.sent[number] < generation.max_tokens:
                await self._pass_time()
                if not self.mute:
                    on_tokens([f"{self.sent[number]} "])
                    self.sent[number] += 1
        finally:
            self.running -= 1
        return Completed("length", Usage(len(generation.prompt), generation.max_tokens, 0))

    async def read_load(self) -> SlotLoad | None:
        """Generations that are under way, and foreign ones."""
        return None if self.foreign is None else SlotLoad(self.foreign + self.running, kv_usage=self.running / 10)

    async def aclose(self) -> None:
        """Break off what is under way."""
        await super().aclose()
        self._closing.set()

    async def _pass_time(self) -> None:
        try:
            async with asyncio.timeout(self.token_s):
                await self._closing.wait()
        except TimeoutError:
            return
        raise WorkerReset("The connection to the engine was closed.")
