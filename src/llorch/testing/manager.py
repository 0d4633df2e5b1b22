"""A pool manager inside the test's process: a `service.launching.Manager` whose processes do what the test says."""

from collections.abc import Callable
from dataclasses import replace

from llorch.service.launching import Cause, HostFacts, LastError, LaunchOrder, LaunchReport, Phase


class FakeManager:
    """Keeps orders and reports by them. What an order becomes is said by `up`, `fail`, `lose` and `end`.

    With `answers` each new order comes up at once, unless the test put its replica into `broken` with a cause.
    """

    def __init__(self, report: Callable[[LaunchReport], None], *, answers: bool = True) -> None:
        self.orders: dict[str, LaunchOrder] = {}
        self.broken: dict[str, Cause] = {}
        self.restarts: list[tuple[str, int, Cause]] = []
        self.released: list[str] = []
        self.answers = answers
        self.host = HostFacts()
        self._report = report
        self._reports: dict[str, LaunchReport] = {}

    def want(self, order: LaunchOrder) -> None:
        """See Manager.want."""
        if self.orders.get(order.replica_id) == order:
            return
        self.orders[order.replica_id] = order
        before = self._reports.get(order.replica_id)
        incarnation = 0 if before is None else before.incarnation
        self._tell(LaunchReport(order.replica_id, order.generation, Phase.STARTING, incarnation=incarnation))
        if self.answers and order.replica_id not in self.broken:
            self.up(order.replica_id)
        elif order.replica_id in self.broken:
            self.fail(order.replica_id, self.broken[order.replica_id])

    def up(self, replica_id: str) -> None:
        """A new process answers."""
        before = self._reports[replica_id]
        number = before.incarnation + 1
        url = f"http://{replica_id.replace('/', '-')}.test:{number}"
        self._tell(replace(before, phase=Phase.UP, incarnation=number, pid=number, url=url, api_key="k", load_s=0.5))

    def fail(self, replica_id: str, cause: Cause, *, message: str = "it failed") -> None:
        """The process ended, or could not be started; the next start is due later."""
        before = self._reports[replica_id]
        restarts = {**before.restarts, cause: before.restarts.get(cause, 0) + 1}
        code = "POOL_UNAVAILABLE" if cause.is_refusal else "WORKER_RESET"
        error = LastError(code, message, float(sum(restarts.values())))
        self._tell(
            replace(
                before, phase=Phase.WAITING, cause=cause, error=error, restarts=restarts, url=None, next_start_s=1.0
            )
        )

    def lose(self, replica_id: str) -> None:
        """Its host is silent."""
        error = LastError("WORKER_RESET", "its node is silent", 1.0)
        self._tell(replace(self._reports[replica_id], phase=Phase.LOST, error=error))

    def find_again(self, replica_id: str) -> None:
        """Its host speaks again, and the process ran on."""
        self._tell(replace(self._reports[replica_id], phase=Phase.UP))

    def release(self, replica_id: str) -> None:
        """See Manager.release: it ends at once."""
        if self.orders.pop(replica_id, None) is not None:
            self.released.append(replica_id)
            self._tell(replace(self._reports[replica_id], phase=Phase.STOPPED, url=None))

    def restart(self, replica_id: str, incarnation: int, cause: Cause) -> None:
        """See Manager.restart."""
        self.restarts.append((replica_id, incarnation, cause))

    def _tell(self, report: LaunchReport) -> None:
        self._reports[report.replica_id] = report
        self._report(report)
