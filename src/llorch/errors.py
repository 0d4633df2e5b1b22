"""The one tree of errors that llorch raises on purpose.

Each class has a stable wire code and says whether trying again can help; the docstring is the default message.
It knows nothing of HTTP: which status an error gets is decided at the edge, in `llorch.api.problems`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

Details = Mapping[str, Any]


class LlorchError(Exception):
    """The service failed in a way that it did not foresee."""

    code: ClassVar[str] = "INTERNAL"
    retriable: ClassVar[bool] = False

    def __init__(
        self,
        message: str | None = None,
        *,
        engine: str | None = None,
        pool_id: str | None = None,
        retry_after_ms: int | None = None,
        policy_label: str | None = None,
        details: Details | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.engine = engine
        self.pool_id = pool_id
        self.retry_after_ms = retry_after_ms
        self.policy_label = policy_label
        self.details = details
        super().__init__(self.message)


class Internal(LlorchError):
    """The service failed in a way that it did not foresee."""

    retriable = True


class SchemaFault(LlorchError):
    """The request does not have the form that the contract asks for."""

    code = "INVALID_PARAMS"


class InvalidParams(LlorchError):
    """The request is well formed, but what it asks for cannot be done."""

    code = "INVALID_PARAMS"


class Unauthenticated(LlorchError):
    """A valid API key is needed."""

    code = "UNAUTHENTICATED"


class Forbidden(LlorchError):
    """This API key may not do that."""

    code = "FORBIDDEN"


class NotFound(LlorchError):
    """There is no such thing, or it belongs to somebody else."""

    code = "NOT_FOUND"


class MethodNotAllowed(LlorchError):
    """This path does not have that method."""

    code = "INVALID_PARAMS"


class UnsupportedMediaType(LlorchError):
    """The body must be application/json."""

    code = "INVALID_PARAMS"


class Conflict(LlorchError):
    """The task_id was used before with another request."""

    code = "CONFLICT"


class PayloadTooLarge(LlorchError):
    """The request is larger than the service accepts."""

    code = "PAYLOAD_TOO_LARGE"


class AdmissionReject(LlorchError):
    """The queue is full."""

    code = "ADMISSION_REJECT"
    retriable = True


class QueueFullDropLru(LlorchError):
    """The queue was full, and a newer task of the same tenant took the place."""

    code = "QUEUE_FULL_DROP_LRU"
    retriable = True


class QuotaExceeded(LlorchError):
    """A limit of this tenant is used up for now."""

    code = "QUOTA_EXCEEDED"
    retriable = True


class BudgetExhausted(LlorchError):
    """The session has used up what it was given."""

    code = "BUDGET_EXHAUSTED"
    retriable = True


class BudgetTooSmall(BudgetExhausted):
    """The whole budget of the session is less than the task may need."""

    retriable = False


class DeadlineUnmet(LlorchError):
    """The deadline passed before the task could end."""

    code = "DEADLINE_UNMET"
    retriable = True


class PoolUnready(LlorchError):
    """No replica of the route is ready yet."""

    code = "POOL_UNREADY"
    retriable = True


class PoolUnavailable(LlorchError):
    """The service or the pool takes no new tasks."""

    code = "POOL_UNAVAILABLE"
    retriable = True


class UntrustedArtifact(LlorchError):
    """A model file is not the one that the configuration names."""

    code = "UNTRUSTED_ARTIFACT"


class ReplicaExhausted(LlorchError):
    """Every attempt ended with a failing replica."""

    code = "REPLICA_EXHAUSTED"
    retriable = True


class DecodeTimeout(LlorchError):
    """The engine took longer than the route allows."""

    code = "DECODE_TIMEOUT"
    retriable = True


class WorkerReset(LlorchError):
    """The replica was lost while it worked on the task."""

    code = "WORKER_RESET"
    retriable = True


class DeterminismViolation(LlorchError):
    """A replay did not give the tokens that were sent before."""

    code = "DETERMINISM_VIOLATION"
    retriable = True


class Canceled(LlorchError):
    """The task was canceled."""

    code = "CANCELED"


class StreamGone(LlorchError):
    """The transcript of this task is no longer kept."""

    code = "STREAM_GONE"


class ConfigError(LlorchError):
    """The configuration cannot be used."""


class LaunchError(LlorchError):
    """An engine process could not be started."""
