"""What one node is to run and what became of it, through its joining, its silence and its leaving.

Owns the orders of a node and the newest report of each. It knows no lease and no address; who may join, and for how
long, is decided in `nodes`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from llorch.errors import Forbidden, LlorchError, PoolUnready, WorkerReset
from llorch.service.launching import Cause, LastError, LaunchOrder, LaunchReport, Phase

_RUNNING = (Phase.STARTING, Phase.LOADING, Phase.UP)
"""Phases of a process that can be ended and started anew."""


class NodeState(StrEnum):
    """JOINED while its manager renews its lease, SILENT when it did not, ABSENT when it never came or has left."""

    JOINED = "joined"
    SILENT = "silent"
    ABSENT = "absent"


class RestartOrder(NamedTuple):
    """A process that the node is to end and start anew. `incarnation` as the node itself counts."""

    replica_id: str
    incarnation: int
    cause: Cause


class NodeProcess(NamedTuple):
    """What is known of one replica of a node."""

    replica_id: str
    phase: Phase
    incarnation: int


@dataclass(slots=True)
class _Held:
    """A replica of the node. `order` is None once it is released and its process may not be gone yet.

    `generation` is that of the newest order, which the service listens for; `may_run`: the node was told to run it, and
    has not told that it does not; `restart` is an incarnation to be ended.
    """

    order: LaunchOrder | None
    generation: int
    last: LaunchReport
    may_run: bool = False
    restart: tuple[int, Cause] | None = None


class NodeOrders:
    """The replicas of one node. News of them goes to `tell`, which must not call back.

    Incarnations are told as if one manager had counted them all: what a manager counts that starts anew is added to
    what its predecessors had counted, so that no two processes of a replica have the same incarnation.
    """

    def __init__(
        self,
        node_id: str,
        pools: frozenset[str],
        *,
        tell: Callable[[LaunchReport], None],
        wall: Callable[[], float],
    ) -> None:
        self.state = NodeState.ABSENT
        self._pools = pools
        self.node_id = node_id
        self._tell = tell
        self._wall = wall
        self._why_not = f"node {node_id} has not joined"
        """Why nothing is told of what it is to run."""
        self._held: dict[str, _Held] = {}
        self._newest: dict[str, int] = {}
        """The highest incarnation of each replica that was ever told."""
        self._bases: dict[str, int] = {}
        """What is added to the incarnations that the present manager counts."""

    # What the service wants

    def want(self, order: LaunchOrder) -> None:
        """Hand the order out from now on, for as long as the node may run its pool."""
        held = self._held.get(order.replica_id)
        if held is None:
            blank = LaunchReport(order.replica_id, order.generation, Phase.WAITING)
            held = self._held[order.replica_id] = _Held(order, order.generation, blank)
            held.last = self._pending(held)
            self._tell(held.last)
            return
        was_withheld = self._is_withheld(held)
        held.order, held.generation, held.restart = order, order.generation, None
        if was_withheld or self._is_withheld(held) or self.state is NodeState.ABSENT:
            self._note(held, self._pending(held))
        elif self.state is NodeState.SILENT:
            self._note(held, replace(held.last, generation=held.generation))

    def release(self, replica_id: str) -> None:
        """Hand the order out no more. STOPPED follows once the process is gone: at once where there can be none."""
        held = self._held.get(replica_id)
        if held is None:
            return
        held.order = held.restart = None
        if self.state is NodeState.ABSENT or (self.state is NodeState.SILENT and not held.may_run):
            self._stop(held)

    def restart(self, replica_id: str, incarnation: int, cause: Cause) -> None:
        """Have the node end this incarnation, unless it is known to have ended."""
        held = self._held.get(replica_id)
        if held is None or held.order is None or held.last.incarnation != incarnation:
            return
        if held.last.phase in (*_RUNNING, Phase.LOST):
            held.restart = incarnation, cause

    def permit(self, pools: frozenset[str]) -> None:
        """It may run the replicas of these pools, and of no other, from now on."""
        withheld = {replica_id for replica_id, held in self._held.items() if self._is_withheld(held)}
        self._pools = pools
        for replica_id, held in self._held.items():
            if self._is_withheld(held) != (replica_id in withheld):
                self._note(held, self._pending(held))

    # What becomes of the node

    def expect(self) -> None:
        """It may come."""
        self.state, self._why_not = NodeState.ABSENT, f"node {self.node_id} has not joined"
        for held in self._held.values():
            self._note(held, self._pending(held))

    def join(self, reports: Sequence[LaunchReport], *, is_anew: bool) -> None:
        """Its manager is there, with these processes; `is_anew`: it is another one than before, and counts from 1."""
        self.state = NodeState.JOINED
        if is_anew:
            self._bases = dict(self._newest)
        self.take(reports)
        told = {report.replica_id for report in reports}
        for replica_id, held in self._held.items():
            held.may_run = replica_id in told
            if replica_id not in told and not self._is_withheld(held):
                held.restart = None
                self._note(held, self._pending(held))

    def take(self, reports: Sequence[LaunchReport]) -> None:
        """Its manager tells of every replica that it has a process or an order of; of no other there is a process."""
        told = {report.replica_id: report for report in reports}
        for replica_id, held in list(self._held.items()):
            report = told.get(replica_id)
            if report is not None and not self._is_withheld(held):
                self._take(held, self._counted(report))
            elif report is None and held.order is None:
                self._stop(held)

    def fall_silent(self, why: str) -> None:
        """Nobody knows what became of its processes."""
        self.state, self._why_not = NodeState.SILENT, why
        self._lose(why)

    def leave(self) -> None:
        """Its manager has ended its processes and goes."""
        self.state, self._why_not = NodeState.ABSENT, f"node {self.node_id} has left"
        for held in list(self._held.values()):
            self._stop(held)

    def dismiss(self, why: str) -> None:
        """It is a node no more, and nothing will be heard of it."""
        self.state, self._why_not = NodeState.ABSENT, why
        for held in [held for held in self._held.values() if held.order is None]:
            self._stop(held)
        self._lose(why)

    # What the node is told, and what is known of it

    def hand_out(self) -> tuple[LaunchOrder, ...]:
        """Everything that it is to run; from now on it may be running that."""
        orders: list[LaunchOrder] = []
        for held in self._held.values():
            if held.order is not None and not self._is_withheld(held):
                held.may_run = True
                orders.append(held.order)
        return tuple(orders)

    def restarts(self) -> tuple[RestartOrder, ...]:
        """Everything that it is to end and start anew."""
        return tuple(
            RestartOrder(replica_id, held.restart[0] - self._bases.get(replica_id, 0), held.restart[1])
            for replica_id, held in self._held.items()
            if held.restart is not None and not self._is_withheld(held)
        )

    def may_report(self, report: LaunchReport) -> bool:
        """Whether the replica is, or lately was, one that this node may run."""
        pool_id = report.replica_id.partition("/")[0]
        return pool_id in self._pools or report.replica_id in self._held

    def processes(self) -> tuple[NodeProcess, ...]:
        """Every replica that it is to run or may still be running."""
        lasts = [held.last for held in self._held.values()]
        return tuple(NodeProcess(last.replica_id, last.phase, last.incarnation) for last in lasts)

    # Within

    def _is_withheld(self, held: _Held) -> bool:
        return held.order is not None and held.order.pool_id not in self._pools

    def _pending(self, held: _Held) -> LaunchReport:
        """No process that is known of, and why; without an error when the node will soon tell."""
        replica_id = held.last.replica_id
        error = None
        if held.order is not None and self._is_withheld(held):
            error = self._error(Forbidden, f"node {self.node_id} may not run replicas of pool {held.order.pool_id}")
        elif self.state is not NodeState.JOINED:
            error = self._error(PoolUnready, self._why_not)
        incarnation = self._newest.get(replica_id, 0)
        return LaunchReport(replica_id, held.generation, Phase.WAITING, incarnation, error=error)

    def _take(self, held: _Held, report: LaunchReport) -> None:
        if held.restart is not None and (report.incarnation != held.restart[0] or report.phase not in _RUNNING):
            held.restart = None
        if held.order is None and report.phase is Phase.STOPPED:
            self._stop(held, report)
        else:
            self._note(held, report)

    def _lose(self, why: str) -> None:
        error = self._error(WorkerReset, why)
        for held in self._held.values():
            if not self._is_withheld(held):
                lost = replace(held.last, phase=Phase.LOST, generation=held.generation, error=error, next_start_s=None)
                self._note(held, lost)

    def _stop(self, held: _Held, told: LaunchReport | None = None) -> None:
        """Its process is gone; a released replica is forgotten with it."""
        last = replace(told or held.last, phase=Phase.STOPPED, generation=held.generation)
        gone = replace(last, pid=None, url=None, api_key=None, next_start_s=None)
        held.may_run, held.restart = False, None
        self._note(held, gone, is_news=held.order is None)
        if held.order is None:
            del self._held[gone.replica_id]

    def _note(self, held: _Held, report: LaunchReport, *, is_news: bool = False) -> None:
        """Tell it, if it is news."""
        newest = self._newest.get(report.replica_id, 0)
        self._newest[report.replica_id] = max(newest, report.incarnation)
        if is_news or report != held.last:
            held.last = report
            self._tell(report)

    def _counted(self, report: LaunchReport) -> LaunchReport:
        base = self._bases.get(report.replica_id, 0)
        return replace(report, incarnation=base + report.incarnation) if base else report

    def _error(self, kind: type[LlorchError], message: str) -> LastError:
        return LastError(kind.code, message, self._wall())
