"""A whole simulation: one workload, played once for each policy."""

from collections.abc import Callable, Sequence
from functools import partial

from llorch.simulator.baselines import QueueDesk
from llorch.simulator.generators import mean_service_s, offered_load
from llorch.simulator.ours import SchedulerDesk
from llorch.simulator.report import Heading
from llorch.simulator.results import Results, Setting, results_of
from llorch.simulator.run import DeskFactory, Progress, simulate
from llorch.simulator.spec import Spec
from llorch.simulator.workload import Workload

POLICIES: dict[str, DeskFactory] = {
    "ours": SchedulerDesk,
    "fcfs": partial(QueueDesk, order="fcfs"),
    "priority": partial(QueueDesk, order="priority"),
    "edf": partial(QueueDesk, order="edf"),
    "rr": partial(QueueDesk, order="rr"),
    "fcfs-unbounded": partial(QueueDesk, order="fcfs-unbounded"),
}
"""`fcfs-unbounded` has no bound and lets nothing expire; the other simple queues have the bounds of the route."""


def compare(
    spec: Spec, workload: Workload, policies: Sequence[str], watch: Callable[[str], Progress] | None = None
) -> list[Results]:
    """Results of each policy, in this order. `watch` gives what is told of the progress of a policy."""
    queue = spec.route_policy().queue
    setting = Setting(
        weights=queue.weights,
        level_weights=queue.level_weights,
        slots=sum(group.count * group.slots for group in spec.replicas),
        mean_service_s=mean_service_s(spec, workload),
    )
    results: list[Results] = []
    for policy in policies:
        outcome = simulate(spec, workload, POLICIES[policy], watch(policy) if watch is not None else None)
        results.append(results_of(policy, outcome, setting))
    return results


def heading_of(spec: Spec, workload: Workload) -> Heading:
    """What is being simulated, for a report."""
    return Heading(
        title=spec.title,
        seed=spec.seed,
        tasks=len(workload),
        tenants=len(workload.tenants),
        replicas=sum(group.count for group in spec.replicas),
        slots=sum(group.count * group.slots for group in spec.replicas),
        load=offered_load(spec, workload),
        mean_service_s=mean_service_s(spec, workload),
    )
