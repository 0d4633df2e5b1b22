"""The success replies that an operation may give. Failures are raised, never returned."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Status_co = TypeVar("Status_co", bound=int, covariant=True)
Body_co = TypeVar("Body_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Reply(Generic[Status_co, Body_co]):
    """A JSON body under a status that the contract declares for the operation."""

    status: Status_co
    body: Body_co
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NoContent:
    """204 with an empty body."""

    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EventStream:
    """200 as text/event-stream. `frames` are encoded whole; each chunk may hold several. Closed by whoever sends it."""

    frames: AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlainText:
    """200 with a text body of the media type that the contract declares."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
