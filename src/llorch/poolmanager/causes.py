"""Why a process ended: from its exit status, its last words, and what else is known of its end.

Pure. Memory of GPUs and of the host are told apart by what engines and their libraries are known to write: llama.cpp
(ggml), PyTorch, vLLM, TGI, Triton, and the C++, Rust and Python runtimes below them.
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llorch.service.launching import Cause

WORDS_CHARS: Final = 1500
"""How much of the engine's own words a message holds."""
_EVIDENCE_CHARS: Final = 300

_GPU_BACKENDS: Final = "CUDA|ROCm|HIP|Vulkan|SYCL|Metal|MTL|MUSA|CANN|OpenCL|GPUOpenCL|Kompute|RPC"

_VRAM: Final = (
    rf"(?:failed|unable) to allocate (?:{_GPU_BACKENDS})\d*(?:_Private|_Mapped|_Split)? buffer",
    r"(?:CUDA|HIP|ROCm|MUSA|XPU|NPU)(?: error(?: \d+ at [^:]*:\d+)?:)? out of memory",
    r"(?:cuda|hip|musa)Malloc(?:Async|Managed)? failed: out of memory",
    r"\btorch(?:\.cuda)?\.OutOfMemoryError",
    r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED",
    r"ErrorOutOfDeviceMemory|OUT_OF_DEVICE_MEMORY|ggml_vulkan: Device memory allocation of size \d+ failed",
    r"kIOGPUCommandBufferCallbackErrorOutOfMemory",
    r"No available memory for the cache blocks|larger than the available KV cache memory",
    r"Free memory on device .*is less than desired GPU memory utilization",
)
_RAM: Final = (
    r"std::bad_alloc|Cannot allocate memory|\bENOMEM\b",
    r"(?<!\w)(?:numpy\.\S*)?(?:Array)?MemoryError\b",
    r"(?:failed|unable) to allocate (?:CPU\w*|\w+_Host) buffer",
    r"ggml_aligned_malloc: insufficient memory|ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate",
    r"DefaultCPUAllocator: (?:can't|not enough memory)",
    r"ErrorOutOfHostMemory|OUT_OF_HOST_MEMORY",
    r"memory allocation of \d+ bytes failed",
)
_DRIVER: Final = (r"ErrorDeviceLost|DeviceLostError|DEVICE_LOST|GPU is lost|fallen off the bus",)

_SIGNS: Final = (
    (Cause.VRAM_OOM, re.compile("|".join(_VRAM))),
    (Cause.HOST_OOM, re.compile("|".join(_RAM))),
    (Cause.DRIVER_RESET, re.compile("|".join(_DRIVER))),
)
_HEADLINES: Final = {
    Cause.VRAM_OOM: "The engine ran out of GPU memory",
    Cause.HOST_OOM: "The engine ran out of the host's memory",
    Cause.DRIVER_RESET: "The engine lost its GPU",
}


@dataclass(frozen=True, slots=True)
class Killed:
    """That we ended a process, and why, in one sentence without its full stop."""

    cause: Cause
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """What is known of a process that ended.

    `status` as of `asyncio.subprocess`: negative for a signal. `oom_kills`: how often the kernel killed something here
    for memory about when it ended. `lost_gpus` are GPUs that it ran on and that the driver has given up.
    """

    status: int
    killed: Killed | None = None
    lines: Sequence[str] = ()
    oom_kills: int = 0
    lost_gpus: Sequence[int] = ()


def explain(end: End) -> tuple[Cause, str]:
    """The cause, and a message for people with the last words of the engine.

    1. We ended it: for our reason. 2. SIGKILL that was not ours, when the kernel has killed for memory: the host's
    memory. 3. GPUs that were given up. 4. The first line that tells of memory or a lost GPU. 5. Any other end when the
    kernel has killed for memory, which may have hit a child. 6. What the exit status tells.
    """
    cause, headline = _judge(end)
    return cause, f"{headline}.{_quote(end.lines)}"


def _judge(end: End) -> tuple[Cause, str]:
    how = describe_status(end.status)
    if end.killed is not None:  # 1
        return end.killed.cause, end.killed.why
    if end.status == -signal.SIGKILL and end.oom_kills:  # 2
        return Cause.HOST_OOM, f"{_HEADLINES[Cause.HOST_OOM]}: the kernel killed it"
    if end.lost_gpus:  # 3
        indices = ", ".join(map(str, end.lost_gpus))
        return Cause.DRIVER_RESET, f"{_HEADLINES[Cause.DRIVER_RESET]}: the driver gave up GPU {indices} ({how})"
    sign = _find_sign(end.lines)
    if sign is not None:  # 4
        return sign[0], f"{_HEADLINES[sign[0]]} ({how}): {sign[1][:_EVIDENCE_CHARS].strip().rstrip('.')}"
    if end.status != 0 and end.oom_kills:  # 5
        return Cause.HOST_OOM, f"{_HEADLINES[Cause.HOST_OOM]}: the kernel killed a process, and it ended ({how})"
    cause = Cause.SIGNAL if end.status < 0 else Cause.EXIT  # 6
    return cause, f"The engine ended: {how}"


def describe_status(status: int) -> str:
    """An exit status in words: `exit status 1`, `killed by SIGSEGV`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def _find_sign(lines: Sequence[str]) -> tuple[Cause, str] | None:
    """The first line that tells: what follows it is most often its consequence."""
    for line in lines:
        for cause, pattern in _SIGNS:
            if pattern.search(line):
                return cause, line
    return None


def _quote(lines: Sequence[str]) -> str:
    """The last words, as many as there is room for; the newest come last."""
    text = "\n".join(lines)
    if not text:
        return ""
    return f" Its last words:\n{text if len(text) <= WORDS_CHARS else '…' + text[1 - WORDS_CHARS :]}"
