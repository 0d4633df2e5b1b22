"""What several commands say in the same words. Knows neither terminals nor servers."""

from llorch.client import BudgetsRemaining


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
