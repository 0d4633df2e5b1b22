"""Engine processes that outlived their manager: found by the mark that it left on them, and killed.

A manager that dies takes its engines with it on Linux; what they started themselves may stay, and elsewhere all does.
"""

from llorch.poolmanager.marks import find_managed, is_manager_alive, kill_all


def end_orphans(owner: str) -> list[int]:
    """Kill every process that a manager of this owner left behind, and return their pids when they are gone.

    What a living manager of the same owner runs is left alone, as is what this user may not look into. Blocks for some
    milliseconds, and for as long as the processes take to go; call it in a thread. Never raises.
    """
    return kill_all(lambda: [process for mark, process in find_managed(owner) if not is_manager_alive(mark)])
