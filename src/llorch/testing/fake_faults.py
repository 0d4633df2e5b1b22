"""What goes wrong in FakeEngine on demand, and the two faults that need a memory: being frozen, and hogging memory.

When a fault strikes is the engine's business and that of its generations.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_MIB: Final = 1024 * 1024
_PAGE: Final = 4096


@dataclass(slots=True)
class Faults:
    """What goes wrong. Those of a generation are taken when it arrives; `times` says for how many, None for all."""

    loading: bool = False
    """Everything answers 503, as while the model is loaded."""
    refuse: bool = False
    """Connections are reset as soon as they stand."""
    freeze: bool = False
    """Connections are accepted, nothing is answered and nothing is sent: as a process that hangs. Its admin path goes
    on. What came meanwhile is dealt with once this ends, as a process does that is woken up."""
    drop_reused: bool = False
    """A second request on a connection is answered by closing it, as when the idle timeout strikes just then."""
    error_status: int | None = None
    """Generations are refused with this status."""
    error_body: dict[str, Any] | None = None
    slots_status: int | None = None
    """What is asked of the slots is answered with this status."""
    stall: bool = False
    """Generations are accepted and never answered."""
    close_after: int | None = None
    """The connection is closed after that many tokens, without an end."""
    silent_after: int | None = None
    """Nothing more is sent after that many tokens."""
    error_after: int | None = None
    """An error event is sent after that many tokens."""
    eos_after: int | None = None
    """The model ends by itself after that many tokens."""
    slow_abort_s: float = 0.0
    """How long a slot stays busy after its client went away."""
    split_at: tuple[int, ...] = ()
    """Every frame is sent in pieces, cut at these byte offsets, each piece a segment of its own."""
    split_pause_s: float = 0.001
    hold: bool = False
    """Tokens are sent only when `release` says so."""
    hog_mib: int = 0
    """Memory that is allocated and touched at once, in MiB, and given back when this is 0 again."""
    times: int | None = None


class Frost:
    """Holds back what a frozen engine would do, and lets it happen in order when it thaws."""

    __slots__ = ("_held", "is_frozen")

    def __init__(self) -> None:
        self.is_frozen = False
        self._held: deque[Callable[[], None]] = deque()

    def hold(self, action: Callable[[], None]) -> None:
        """Do this when the frost is over."""
        self._held.append(action)

    def turn(self, *, is_frozen: bool) -> None:
        """Freeze, or thaw."""
        self.is_frozen = is_frozen
        while self._held and not self.is_frozen:
            self._held.popleft()()

    def forget(self) -> None:
        """Nothing of what is held back will happen."""
        self._held.clear()


class Hog:
    """Memory that is in use and serves nothing."""

    __slots__ = ("_memory",)

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, mib: int) -> None:
        """Have so many MiB from now on, every page of them touched. Raises MemoryError."""
        size = mib * _MIB
        if size == len(self._memory):
            return
        self._memory = bytearray()
        self._memory = bytearray(size)
        self._memory[::_PAGE] = b"\1" * len(range(0, size, _PAGE))
