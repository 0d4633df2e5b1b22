"""What a task's stream says, as typed values: the frames of the contract, each with its place in the stream.

Durable events carry the id that a resume continues after. Advice (Queued, Metrics) is of the moment and has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

from pydantic import MISSING, ValidationError

from llorch.client.errors import ProtocolFault
from llorch.client.sse import Frame
from llorch_contract.base import Model
from llorch_contract.models import (
    EndFrame,
    ErrorFrame,
    MetricsFrame,
    QueuedFrame,
    ResultFrame,
    StartedFrame,
    TaskAccepted,
    TokenFrame,
)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server took the task. `AsyncClient.generate` hands it out before the stream; it is no frame of the stream."""

    name: ClassVar[str] = "accepted"
    frame: TaskAccepted


@dataclass(frozen=True, slots=True)
class Started:
    """The task runs on a replica."""

    name: ClassVar[str] = "started"
    id: int
    frame: StartedFrame


@dataclass(frozen=True, slots=True)
class Token:
    """One piece of output."""

    name: ClassVar[str] = "token"
    id: int
    frame: TokenFrame

    @property
    def text(self) -> str:
        return self.frame.t


@dataclass(frozen=True, slots=True)
class Result:
    """The result for one input of an embedding or rerank task."""

    name: ClassVar[str] = "result"
    id: int
    frame: ResultFrame


@dataclass(frozen=True, slots=True)
class End:
    """The task succeeded. Terminal."""

    name: ClassVar[str] = "end"
    id: int
    frame: EndFrame


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The task failed or was canceled. Terminal."""

    name: ClassVar[str] = "error"
    id: int
    frame: ErrorFrame


@dataclass(frozen=True, slots=True)
class Queued:
    """The task waits. Advice."""

    name: ClassVar[str] = "queued"
    frame: QueuedFrame


@dataclass(frozen=True, slots=True)
class Metrics:
    """Measurements of the moment. Advice."""

    name: ClassVar[str] = "metrics"
    frame: MetricsFrame


DurableEvent = Started | Token | Result | End | ErrorEvent
Event = DurableEvent | Queued | Metrics

F = TypeVar("F", bound=Model)
V = TypeVar("V")
D = TypeVar("D", Started, Token, Result, End, ErrorEvent)


def known(value: V | MISSING) -> V | None:
    """The value of a field that a server may leave out; None when it did."""
    return None if value is MISSING else value


def read(model: type[F], data: str | bytes) -> F:
    """`data` as a body of the contract. A field that this client does not know yet is left out, not an error.

    Raises ProtocolFault.
    """
    try:
        return model.model_validate_json(data, extra="ignore")
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise ProtocolFault(
            f"the server sent a {model.__name__} that breaks the contract: {place}: {first['msg']}"
        ) from exc


def _durable(event: Callable[[int, F], D], model: type[F]) -> Callable[[int, str], D]:
    return lambda number, data: event(number, read(model, data))


_DURABLE: Final[Mapping[str, Callable[[int, str], DurableEvent]]] = {
    Started.name: _durable(Started, StartedFrame),
    Token.name: _durable(Token, TokenFrame),
    Result.name: _durable(Result, ResultFrame),
    End.name: _durable(End, EndFrame),
    ErrorEvent.name: _durable(ErrorEvent, ErrorFrame),
}


def decode(frame: Frame, expected_id: int) -> Event | None:
    """The event of `frame`; None for one of a kind that this client does not know, which is left out.

    Raises ProtocolFault when a durable frame does not have the id `expected_id`, or a frame breaks the contract.
    """
    if frame.id is not None:
        if frame.id != str(expected_id):
            raise ProtocolFault(f"frame {frame.id[:20]!r} came where frame {expected_id} was due")
        durable = _DURABLE.get(frame.event)
        return durable(expected_id, frame.data) if durable else None
    if frame.event in _DURABLE:
        raise ProtocolFault(f"a {frame.event} frame came without an id")
    if frame.event == Queued.name:
        return Queued(read(QueuedFrame, frame.data))
    if frame.event == Metrics.name:
        return Metrics(read(MetricsFrame, frame.data))
    return None
