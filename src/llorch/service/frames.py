"""What the frames of a stream say."""

from typing import Any

from llorch.domain.task import Budgets, Estimate, Task, WaitReason
from llorch.errors import LlorchError
from llorch.service.patience import told
from llorch.service.ports import Usage
from llorch.service.records import Record


def started(record: Record, now: float) -> dict[str, Any]:
    """The task has begun: where, and what it was told at acceptance."""
    task, placed, attempt = record.admitted, record.placed, record.admitted.attempt
    affinity = attempt.affinity if attempt is not None else None
    return {
        "queue_position": record.queue_position,
        "predicted_start_ms": predicted_ms(task.predicted_wait),
        "waited_ms": _ms(task.accepted_at, now),
        "pool_id": placed.pool_id,
        "replica_id": placed.replica_id,
        "kv_warmth": attempt.kv_warmth if attempt is not None else None,
        "affinity": affinity.value if affinity is not None else None,
    }


def queued(position: int, reason: WaitReason, wait: Estimate | None) -> dict[str, Any]:
    """The task waits."""
    return {"queue_position": position, "predicted_start_ms": predicted_ms(wait), "reason": reason.value}


def metrics(*, queue_depth: int, on_time: float | None, left: Budgets | None) -> dict[str, Any]:
    """What is measured of a waiting task; what is not known is left out."""
    known: dict[str, Any] = {"queue_depth": queue_depth}
    if on_time is not None:
        known["on_time_probability"] = round(on_time, 4)
    if left is not None:
        known["budgets"] = budgets(left)
    return known


def budgets(left: Budgets) -> dict[str, Any]:
    """What is left of a session's budgets."""
    time_ms = None if left.time_s is None else round(left.time_s * 1000)
    return {"tokens": left.tokens, "time_ms": time_ms, "cost": left.cost}


def predicted_ms(wait: Estimate | None) -> int | None:
    """Milliseconds until the predicted start."""
    return None if wait is None else max(0, round(wait.mean_s * 1000))


def terminal(record: Record) -> tuple[str, dict[str, Any]]:
    """The name and content of the frame that ends the stream of a finished task."""
    task = record.admitted
    if task.fault is None:
        return "end", _end(record, task)
    placed = record.placement
    error = told(task.fault, record.submission.task_id).error(
        engine=record.route.engine, pool_id=placed.pool_id if placed else None
    )
    return "error", problem(error, record.correlation_id)


def problem(error: LlorchError, correlation_id: str) -> dict[str, Any]:
    """The one envelope for errors, on the wire and in streams."""
    return {
        "code": error.code,
        "message": error.message,
        "engine": error.engine,
        "pool_id": error.pool_id,
        "retriable": error.retriable,
        "retry_after_ms": error.retry_after_ms,
        "policy_label": error.policy_label,
        "details": error.details,
        "correlation_id": correlation_id,
    }


def _end(record: Record, task: Task) -> dict[str, Any]:
    completed = record.completed
    assert completed is not None
    assert task.started_at is not None
    assert task.ended_at is not None
    first = task.first_token_at
    return {
        "tokens_out": completed.usage.completion_tokens,
        "decode_ms": None if first is None else _ms(first, task.ended_at),
        "first_token_ms": None if first is None else _ms(task.accepted_at, first),
        "waited_ms": _ms(task.accepted_at, task.started_at),
        "finish_reason": completed.finish_reason,
        "usage": usage(completed.usage),
    }


def usage(used: Usage) -> dict[str, Any]:
    """Token counts on the wire."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "cached_tokens": used.cached_tokens,
    }


def _ms(start: float, end: float) -> int:
    return max(0, round((end - start) * 1000))
