"""What is wrong with a request, in few words: where it is and what was expected, never what was sent."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llorch.errors import SchemaFault

MALFORMED: Mapping[str, str] = {"path": "", "reason": "not valid JSON"}

_MANY = 64
"""With more faults than this none is told: listing them would cost more than the request is worth."""

_MAX_PATH = 128
_MAX_REASON = 256

_REASONS = {
    "missing": "is required",
    "extra_forbidden": "is not known here",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
    "too_short": "must have at least {min_length} element(s)",
    "too_long": "must have at most {max_length} element(s)",
    "string_pattern_mismatch": "must match {pattern}",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}


def fault_at(name: str, reason: str) -> SchemaFault:
    """A fault in the parameter with this name."""
    return SchemaFault(f"{name} {reason}", details={"path": f"/{name}", "reason": reason})


def schema_fault(exc: ValidationError) -> SchemaFault:
    """The first fault that the model found in a body."""
    if exc.error_count() > _MANY:
        return SchemaFault(
            "the body has too many faults to name them", details={"path": "", "reason": "too many faults"}
        )
    first = exc.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return SchemaFault("the body is not valid JSON", details=MALFORMED)
    path = "".join(f"/{_escape(part)}" for part in first["loc"])[:_MAX_PATH]
    reason = _reason(first["type"], first["msg"], first.get("ctx", {}))
    subject = ".".join(str(part) for part in first["loc"])[:_MAX_PATH] or "the body"
    return SchemaFault(f"{subject} {reason}", details={"path": path, "reason": reason})


def _reason(kind: str, message: str, context: Mapping[str, Any]) -> str:
    template = _REASONS.get(kind)
    reason = template.format(**context) if template else message[:1].lower() + message[1:]
    return reason[:_MAX_REASON]


def _escape(part: int | str) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")
