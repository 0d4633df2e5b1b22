"""One form for every log line of the process, and nothing in it that must stay secret.

Lines are JSON objects, or text for people. Only fields with a known name appear; a prompt, a token's text or a key has
none. Lines of other libraries take the same way, without what they may quote.
"""

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger, Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

FIELDS = frozenset(
    """
    ts level event correlation_id tenant task_id session_id priority state code policy route engine engine_version model
    model_digest pool_id replica_id attempt attempts slots exact allow_cpu was took_ms waited_ms first_token_ms
    tokens_in tokens_out grace_s key_id operation method status host port url path pid version signal setting notice
    count logger source where exception stack incarnation stream line load_s cause error restarts next_start_s pids node
    lease_s retry_s reason kind replicas running queued moved ready_s outcome changed dropped
    """.split()  # noqa: SIM905 (a list of fifty words reads better so)
)
"""The fields that a line may have. Another one is shown as withheld: what it holds is not known to be harmless."""

WITHHELD = "[withheld]"
REDACTED = "[redacted]"

PLAIN_SPOKEN = ("llorch", "uvicorn")
"""Loggers whose whole messages are shown: they quote no content of requests."""

_CREDENTIAL = r"llk_[\w-]+|\b(?:bearer|basic)\s+[\w.~+/=-]+"
_CREDENTIAL_MARKS = ("llk_", "bearer", "basic")
"""What a line has when the expression can match."""

Line = MutableMapping[str, Any]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def set_up(
    level: str, form: str, *, stream: BinaryIO | None = None, secrets: Iterable[str] = ()
) -> FilteringBoundLogger:
    """Send every log line of the process to `stream` (default: standard error) and return a logger for them.

    `level` is one of LEVELS, `form` is `json` or `console`; `secrets` are texts that are blacked out wherever they
    appear, besides llorch's own keys and credentials of HTTP. May be called again; the last call holds.
    """
    stream = stream if stream is not None else sys.stderr.buffer
    structlog.configure(
        processors=_processors(form, stream, secrets),
        wrapper_class=_logger_class(LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(stream),
        cache_logger_on_first_use=False,  # a later call must reach the loggers that modules got before it
    )
    log: FilteringBoundLogger = structlog.get_logger().bind()
    _take_over(logging.getLogger(), log, LEVELS[level])
    return log


def make_logger(level: str, form: str, *, stream: BinaryIO, secrets: Iterable[str] = ()) -> FilteringBoundLogger:
    """A logger that writes to `stream` as that of `set_up` does, and touches nothing else in the process."""
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.BytesLogger(stream),
        processors=_processors(form, stream, secrets),
        wrapper_class=_logger_class(LEVELS[level]),
    ).bind()
    return log


Write = Callable[[str, str, dict[str, Any]], None]
"""Writes a line, given its level's name, its event and its fields, which it takes over; filters no level."""


def writer_of(log: FilteringBoundLogger) -> Write:
    """The short way to the lines of a logger of `set_up` or `make_logger`, for those that every task writes.

    Twenty fields as keywords are copied at each of structlog's three calls: 40 us a line, and 20 by this way.
    """
    write: Write = log.write_fields  # type: ignore[attr-defined]
    return write


def _logger_class(level: int) -> type[FilteringBoundLogger]:
    """The filtering logger of structlog for a level and up, with a way for fields that come as a dictionary."""

    def write_fields(self: Any, method: str, event: str, fields: dict[str, Any]) -> None:
        line: Any = {**self._context, **fields} if self._context else fields
        line["event"] = event
        for process in self._processors:
            line = process(self._logger, method, line)
        self._logger.msg(line)

    base = structlog.make_filtering_bound_logger(level)
    return type("Logger", (base,), {"write_fields": write_fields})


def _processors(form: str, stream: BinaryIO, secrets: Iterable[str]) -> list[Processor]:
    encode = msgspec.json.Encoder(enc_hook=str).encode if form == "json" else _console(stream)
    renderer = _Renderer(encode, secrets)
    return [describe_exception, only_known_fields, renderer]


# Processors


def describe_exception(_logger: object, _method: str, line: Line) -> Line:
    """Name the exception and where it came from. Its message is left out: it may quote the request."""
    exc_info = line.pop("exc_info", None)
    if exc_info is True:
        exc_info = sys.exc_info()
    error = exc_info if isinstance(exc_info, BaseException) else exc_info[1] if exc_info else None
    if error is not None:
        line["exception"] = _name(error)
        line["stack"] = _frames(error)
    return line


def only_known_fields(_logger: object, _method: str, line: Line) -> Line:
    """Withhold the value of every field that is not in FIELDS."""
    if not line.keys() <= FIELDS:
        for name in line.keys() - FIELDS:
            line[name] = WITHHELD
    return line


class _Renderer:
    """The last processor: puts ts, level, event and correlation_id first, encodes, and blacks out secrets."""

    def __init__(self, encode: Callable[[Line], bytes], secrets: Iterable[str]) -> None:
        self._encode = encode
        known = {spelling for secret in secrets if secret for spelling in _spellings(secret)}
        self._secret = re.compile("|".join([*map(re.escape, sorted(known)), _CREDENTIAL]).encode(), re.IGNORECASE)
        self._marks = [mark.encode().lower() for mark in (*_CREDENTIAL_MARKS, *known)]
        self._stamp = _Stamp()

    def __call__(self, _logger: object, method: str, line: Line) -> bytes:
        correlation_id = line.get("correlation_id")
        head = {"ts": self._stamp(), "level": method, "event": line.get("event"), "correlation_id": correlation_id}
        encoded = self._encode({**head, **line})
        lowered = encoded.lower()
        for mark in self._marks:  # the expression alone would cost more than the rest of the line
            if mark in lowered:
                return self._secret.sub(REDACTED.encode(), encoded)
        return encoded


def _spellings(secret: str) -> tuple[str, ...]:
    """As it is, inside JSON, and inside a quoted text of a line for people."""
    return secret, msgspec.json.encode(secret).decode()[1:-1], repr(secret)[1:-1]


class _Stamp:
    """The time as RFC 3339 in UTC with milliseconds; the date is spelled out once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self) -> str:
        second, nanos = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{nanos // 1_000_000:03d}Z"


def _console(stream: BinaryIO) -> Callable[[Line], bytes]:
    """Lines for people, coloured on a terminal."""
    is_terminal = isinstance(stream, io.IOBase) and stream.isatty()
    render = structlog.dev.ConsoleRenderer(colors=is_terminal, timestamp_key="ts", pad_event_to=24)

    def encode(line: Line) -> bytes:
        shown = {name: value for name, value in line.items() if value is not None}
        if "stack" in shown:
            shown["stack"] = "\n".join(map(str, shown["stack"]))
        return str(render(None, "", shown)).encode()

    return encode


def _name(error: BaseException) -> str:
    """The class, and what the operating system said where it was that."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{name}: {error.strerror}"
    return name


def _frames(error: BaseException) -> list[str]:
    """The innermost frames of the error, then those of what caused it."""
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return frames[-12:] + ([f"caused by {_name(cause)}", *_frames(cause)] if cause is not None else [])


# Other libraries


def _take_over(root: logging.Logger, log: FilteringBoundLogger, level: int) -> None:
    """Let the standard library's loggers write here, those of libraries from warnings up."""
    root.handlers[:] = [_Bridge(log)]
    root.setLevel(max(level, logging.WARNING))
    for name in PLAIN_SPOKEN:
        logging.getLogger(name).setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)


class _Bridge(logging.Handler):
    """Hands records of the standard library's loggers on."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name, "source": f"{record.pathname}:{record.lineno}"}
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["exc_info"] = record.exc_info
        level = max(logging.DEBUG, min(record.levelno, logging.ERROR))
        self._log.log(level, _text(record), **fields)


def _text(record: logging.LogRecord) -> str:
    """The message; of loggers that may quote a request only the part that is written in their source, if any."""
    if record.name.split(".")[0] in PLAIN_SPOKEN:
        return record.getMessage().split("\n")[0]
    return str(record.msg) if record.args else "a library logged a message"
