"""What can go wrong for a caller of the client.

A tree of its own beside `llorch.errors`: those are raised inside the service, these tell what came, or did not come,
over the wire. A failed task is no exception: it is the terminal event of its stream.
"""

from llorch_contract.models import ErrorCode, Problem


class ClientError(Exception):
    """The call did not succeed."""


class ApiError(ClientError):
    """The server answered with an error.

    `problem` is the error envelope; None when the answer wore none, as that of a proxy in between. `advised_wait_s` is
    what the answer said about when to come back, in seconds; None when it said nothing.
    """

    def __init__(self, status: int, problem: Problem | None, advised_wait_s: float | None = None) -> None:
        self.status = status
        self.problem = problem
        self.advised_wait_s = advised_wait_s
        super().__init__(
            f"{problem.code}: {problem.message}" if problem else f"HTTP {status}, without an error envelope"
        )

    @property
    def code(self) -> str | None:
        """The stable error code of the envelope."""
        return self.problem.code.value if self.problem else None

    @property
    def is_refusal(self) -> bool:
        """Whether waiting and sending the same request again makes sense without asking the caller (429, 503).

        A deadline that cannot be met (422) is not waited for: it counts from acceptance, and the wait would be outside
        of it. Nor is a budget that nobody knows when to have again.
        """
        if self.status not in {429, 503} or (self.problem is not None and not self.problem.retriable):
            return False
        return self.advised_wait_s is not None or self.code != ErrorCode.BUDGET_EXHAUSTED.value


class Unreachable(ClientError):
    """No answer came. `dropped` says that a connection was there and broke, so that the request may have arrived."""

    def __init__(self, message: str, *, dropped: bool = False) -> None:
        self.dropped = dropped
        super().__init__(message)


class StreamLost(Unreachable):
    """The stream broke and could not be resumed. `cursor` is the id of the last durable frame that was handed out."""

    def __init__(self, task_id: str, cursor: int, cause: ClientError) -> None:
        self.task_id = task_id
        self.cursor = cursor
        super().__init__(f"the stream of task {task_id} broke after frame {cursor}: {cause}", dropped=True)


class ProtocolFault(ClientError):
    """What answered does not keep the contract."""


class InvalidRequest(ClientError, ValueError):
    """The request does not fit the contract; nothing was sent."""
