"""What the use cases need from the rooms outside: an engine, a journal, a clock.

The rooms outside implement these; nothing here knows how. Values that every task makes are msgspec structs: immutable
and comparable as a frozen dataclass is, and made in 0.5 us, where that takes 0.6 us for each field.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from llorch.domain.events import Event

Post = Callable[[str, Event], None]
"""Takes an event to the scheduler of a route."""


class Sampling(msgspec.Struct, frozen=True):
    """Sampling parameters; None leaves what the profile or the engine has."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None

    def overridden_by(self, own: "Sampling") -> "Sampling":
        """These parameters, with those that `own` names in their place."""
        if own is NO_SAMPLING:
            return self
        named = {name: value for name, value in msgspec.structs.asdict(own).items() if value not in (None, ())}
        return msgspec.structs.replace(self, **named)


NO_SAMPLING = Sampling()
"""Nothing is asked for."""


class Generation(msgspec.Struct, frozen=True):
    """One attempt's order to an engine.

    `prompt` is raw text, the chat template already applied. `slot` (from 0) is the engine's slot that the attempt holds
    the lease of; an engine that lets its client choose works there.
    """

    prompt: str
    max_tokens: int
    seed: int
    strict: bool
    slot: int = 0
    sampling: Sampling = NO_SAMPLING


class Usage(msgspec.Struct, frozen=True):
    """Token counts that the engine reported; None where it told nothing."""

    prompt_tokens: int | None
    completion_tokens: int
    cached_tokens: int | None


class Completed(msgspec.Struct, frozen=True):
    """The engine's last word on a generation. `finish_reason` is `stop`, `length` or `stop_sequence`."""

    finish_reason: str
    usage: Usage


OnTokens = Callable[[Sequence[str]], None]
"""Takes the texts of the tokens that arrived together, in order, at once and within the same turn of the event loop."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a running engine tells about itself; None where it cannot tell."""

    slots: int | None
    ctx_per_slot: int | None
    engine_version: str | None
    model_digest: str | None
    model_name: str | None
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """What the slots of an engine do now. `kv_usage`: part of its KV cache that they fill, 0 to 1, None: not told."""

    busy_slots: int
    kv_usage: float | None = None


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class Engine(Protocol):
    """Client of one replica. It holds connections and no task state; every method raises LlorchErrors only.

    Raises WorkerReset when the replica cannot be reached or breaks off, DecodeTimeout when it falls silent,
    PoolUnready while it loads, InvalidParams when it refuses the request itself.
    """

    @property
    def can_interrupt(self) -> bool:
        """It stops decoding soon after a generation was cancelled, so that running work can make room for other."""
        ...

    async def generate(self, generation: Generation, on_tokens: OnTokens) -> Completed:
        """Run the generation to its end: hand out tokens as they come, and return the engine's last word.

        Tokens are pushed, not iterated over, because each hop to a task costs the token path a third of its CPU time.
        Cancelling this tells the engine at once, by closing the connection; no token follows. What `on_tokens` raises
        ends the generation in the same way, and is raised here.
        """
        ...

    async def check_health(self) -> None:
        """Return when the replica can take work; raise PoolUnready or WorkerReset when it cannot."""
        ...

    async def read_facts(self) -> EngineFacts:
        """Ask the replica what it is."""
        ...

    async def wait_released(self, slot: int) -> None:
        """Return when the engine has let go of a slot whose generation was broken off, or can no longer be asked.

        An engine that is slow to abort (a long prefill) would otherwise be overfilled. Bounded by the adapter.
        """
        ...

    async def read_load(self) -> SlotLoad | None:
        """What the engine itself says its slots do; None where it cannot tell."""
        ...

    async def erase(self, slot: int) -> bool:
        """Forget the KV cache of an idle slot: True when it is gone, False where that cannot be done. Never raises."""
        ...

    async def count_tokens(self, text: str) -> int:
        """Tokens of a raw prompt as the engine will see it, special tokens included."""
        ...

    async def render_messages(self, messages: Sequence[Message]) -> str:
        """The raw prompt that the model's chat template makes of the messages."""
        ...

    async def aclose(self) -> None:
        """Close every connection. Idempotent."""
        ...


class Clock(Protocol):
    """Time as the service sees it."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        ...


class Accepted(msgspec.Struct, frozen=True):
    """The decision to admit a task. `order` sorts the tasks of a route as they were admitted."""

    tenant: str
    task_id: str
    route_id: str
    order: int


class Ended(msgspec.Struct, frozen=True):
    """The decision how a task ended. `code` is None for success."""

    tenant: str
    task_id: str
    code: str | None


Decision = Accepted | Ended


class Journal(Protocol):
    """The durable list of decisions. An implementation may batch: only `commit` promises durability."""

    def append(self, decision: Decision) -> None:
        """Add a decision; it is durable once a later `commit` returned."""
        ...

    async def commit(self) -> None:
        """Return when everything appended before the call is durable."""
        ...
