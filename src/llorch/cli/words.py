"""What several commands say in the same words. Knows neither terminals nor servers."""

from llorch.client import BudgetsRemaining, ChangeState, ConfigStatus, PoolChange


def budgets_left(budgets: BudgetsRemaining | None) -> str:
    """What is left of a session's budgets, as the end of a line; nothing when it has none."""
    if budgets is None:
        return ""
    words = [
        None if budgets.tokens is None else f"{budgets.tokens} tokens",
        None if budgets.time_ms is None else f"{budgets.time_ms / 1000:.1f} s",
        None if budgets.cost is None else f"cost {budgets.cost:g}",
    ]
    return f" · budget left: {', '.join(word for word in words if word)}"


def seconds(milliseconds: int) -> str:
    """A time for people: `0.4 s`, `12 s`."""
    value = milliseconds / 1000
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def change_line(change: PoolChange) -> str:
    """How far a drain or reload of a pool is."""
    parts = [f"{change.kind.value} {_STATES[change.state]}", f"{change.replicas_done}/{change.replicas_total} replicas"]
    if change.state is ChangeState.running:
        parts += [f"{change.running} running", f"{change.queued} queued"]
    if change.moved:
        parts.append(f"{change.moved} moved")
    if change.ready_ms is not None:
        parts.append(f"ready after {seconds(change.ready_ms)}")
    if change.message is not None:
        parts.append(change.message)
    return " · ".join(parts)


def config_line(status: ConfigStatus) -> str:
    """How far a change of the configuration is."""
    change = status.change
    if change is None:
        return f"configuration {status.revision}: as loaded"
    changed = ", ".join(change.changed) if change.changed else "nothing differs"
    parts = [f"configuration {status.revision}: {_STATES[change.state]}", changed]
    if change.message is not None:
        parts.append(change.message)
    return " · ".join(parts)


_STATES = {
    ChangeState.running: "under way",
    ChangeState.done: "done",
    ChangeState.failed: "failed",
    ChangeState.rolled_back: "rolled back",
}
