"""How a command ends: exit codes that scripts can use, and errors as one line that says what to do.

It turns what the rooms below raise into both, in this one place.
"""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, Self

from llorch.client import ApiError, ClientError, ErrorCode, InvalidRequest, Problem, StreamLost, Unreachable
from llorch.errors import ConfigError, LaunchError, LlorchError


class Exit(IntEnum):
    """The exit codes."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    FORBIDDEN = 5
    UNREACHABLE = 6
    CANCELED = 7
    INTERRUPTED = 130
    CUT_OFF = 141


MEANINGS: Final[Mapping[Exit, str]] = {
    Exit.OK: "done",
    Exit.FAILED: "the task failed, or the server or an engine did",
    Exit.USAGE: "wrong usage, configuration or request (HTTP 400, 409, 413, 422)",
    Exit.NOT_FOUND: "no such thing, or no longer (HTTP 404, 410)",
    Exit.REFUSED: "refused for now, worth another try (HTTP 429, 503, a deadline that cannot be met now)",
    Exit.FORBIDDEN: "no valid key, or one that may not do this (HTTP 401, 403)",
    Exit.UNREACHABLE: "no answer from a llorch server",
    Exit.CANCELED: "the task was canceled, not by this command",
    Exit.INTERRUPTED: "interrupted (Ctrl-C); a task that was being followed is canceled",
    Exit.CUT_OFF: "nobody reads the output any more; a task that was being followed is canceled",
}

EPILOG: Final = "\b\nExit codes:\n" + "\n".join(f"  {code.value:>3}  {text}" for code, text in MEANINGS.items())

_BY_STATUS: Final[Mapping[int, Exit]] = {
    401: Exit.FORBIDDEN,
    403: Exit.FORBIDDEN,
    404: Exit.NOT_FOUND,
    410: Exit.NOT_FOUND,
    429: Exit.REFUSED,
    502: Exit.UNREACHABLE,
    503: Exit.REFUSED,
    504: Exit.UNREACHABLE,
}

_HINTS: Final[Mapping[Exit, str]] = {
    Exit.FAILED: "The server's log has more, under the correlation id.",
    Exit.USAGE: "Change the request.",
    Exit.NOT_FOUND: "`llorch status` lists your tasks; `llorch pools` shows what is served.",
    Exit.REFUSED: "Try again later, or wait longer with --patience.",
    Exit.FORBIDDEN: "Give a key that may do this with --key or LLORCH_KEY.",
    Exit.UNREACHABLE: "Is `llorch serve` running there? Name the server with --url or LLORCH_URL.",
}

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class Complaint(Exception):
    """An error for people, and the exit code."""

    def __init__(self, text: str, exit_code: Exit) -> None:
        self.exit_code = exit_code
        super().__init__(text)

    @classmethod
    def line(cls, code: str, message: str, hint: str, exit_code: Exit) -> Self:
        """One line: code, message, what to do. What it quotes cannot steer the terminal or forge a second line."""
        text = " ".join(part for part in (f"llorch: {code}: {_sentence(message)}", hint) if part)
        return cls(_CONTROL.sub(" ", text), exit_code)


def complaint(error: LlorchError | ClientError) -> Complaint:
    """What to tell of `error`, and the exit code."""
    match error:
        case ConfigError():  # a line for each problem, which begins with the file
            return Complaint(error.message, Exit.USAGE)
        case LaunchError():  # the last words of an engine are lines, too
            return Complaint(f"llorch: {error.message}", Exit.FAILED)
        case LlorchError():
            return Complaint.line(error.code, error.message, "", Exit.FAILED)
        case ApiError():
            return _refused(error)
        case InvalidRequest():
            return Complaint.line("INVALID_PARAMS", str(error), _HINTS[Exit.USAGE], Exit.USAGE)
        case StreamLost():
            hint = f"The task may still run: `llorch status {error.task_id}`."
            return Complaint.line("UNREACHABLE", str(error), hint, Exit.UNREACHABLE)
        case Unreachable():
            return Complaint.line("UNREACHABLE", str(error), _HINTS[Exit.UNREACHABLE], Exit.UNREACHABLE)
        case _:
            hint = "Is this the address of a llorch server of this version?"
            return Complaint.line("PROTOCOL", str(error), hint, Exit.UNREACHABLE)


def task_complaint(problem: Problem) -> Complaint:
    """What to tell of a task that ended in an error."""
    if problem.code is ErrorCode.CANCELED:
        return Complaint.line(problem.code.value, problem.message, "", Exit.CANCELED)
    hint = "Submit it again." if problem.retriable else ""
    return Complaint.line(problem.code.value, problem.message, hint, Exit.FAILED)


def _refused(error: ApiError) -> Complaint:
    exit_code = _BY_STATUS.get(error.status, Exit.USAGE if 400 <= error.status < 500 else Exit.FAILED)
    if error.code == ErrorCode.DEADLINE_UNMET.value:
        exit_code = Exit.REFUSED
    if error.problem is None:
        return Complaint.line(
            f"HTTP_{error.status}", "the answer wears no error envelope", _HINTS[exit_code], exit_code
        )
    hint = _hint(error, error.problem, exit_code)
    place = (error.problem.details or {}).get("path")
    message = f"{error.problem.message} (at {place})" if isinstance(place, str) and place else error.problem.message
    return Complaint.line(error.problem.code.value, message, hint, exit_code)


def _hint(error: ApiError, problem: Problem, exit_code: Exit) -> str:
    """What to do about a refusal."""
    if exit_code is Exit.FAILED:
        return f"The server's log has more, under the correlation id {problem.correlation_id}."
    if exit_code is not Exit.REFUSED:
        return _HINTS[exit_code]
    if not problem.retriable:
        return ""
    other = "wait longer with --patience"
    if problem.code is ErrorCode.DEADLINE_UNMET:
        other = "give it a longer --deadline-ms"
    elif problem.code is ErrorCode.BUDGET_EXHAUSTED:
        other = "use another session"
    when = "later" if error.advised_wait_s is None else f"in {error.advised_wait_s:.1f} s"
    return f"Try again {when}, or {other}."


def _sentence(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
