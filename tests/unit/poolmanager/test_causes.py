"""Causes of ends, from lines that engines have really written: sources are issues of the projects named at each row."""

import signal

import pytest

from llorch.poolmanager.causes import WORDS_CHARS, End, Killed, explain
from llorch.service.launching import Cause

VRAM = [
    # llama.cpp 20431
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: out of memory",  # noqa: E501
    "alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624",
    "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
    # llama.cpp 11476
    "ggml_gallocr_reserve_n: failed to allocate CUDA1 buffer of size 10345253120",
    # llama.cpp 26297
    "1.06.520.084 E ggml_gallocr_reserve_n_impl: failed to allocate CUDA1 buffer of size 54262464512",
    # ollama 9782
    "Error: llama runner process has terminated: CUDA error: out of memory",
    # llama.cpp 4680, before the present form
    "CUDA error 2 at ggml-cuda.cu:6600: out of memory",
    # llama.cpp 8766, 11337
    "ROCm error: out of memory",
    "alloc_tensor_range: failed to allocate ROCm0 buffer of size 17179869184",
    # llama.cpp 15256, 18160
    "ggml_vulkan: Device memory allocation of size 118497280 failed.",
    "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    "ggml_gallocr_reserve_n_impl: failed to allocate Vulkan0 buffer of size 8753520640",
    # llama.cpp 9701, 7010
    "error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    # vllm 16343, 12030, 15039
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 350.00 MiB. GPU 0 has a total capacity of 23.68 GiB",
    "ERROR 03-19 10:55:18 [engine.py:158] OutOfMemoryError('CUDA out of memory. Tried to allocate 128.00 MiB.')",
    "torch.cuda.OutOfMemoryError: HIP out of memory. Tried to allocate 2.00 GiB",
    # vllm 10439, kvcached 110
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing",
    "ValueError: Free memory on device (67.24/79.25 GiB) on startup is less than desired GPU memory utilization (0.9,",
]

RAM = [
    # llama.cpp 10956
    "ggml_aligned_malloc: insufficient memory (attempted to allocate 655521.35 MB)",
    "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 687363958272",
    "ggml_gallocr_reserve_n: failed to allocate CPU buffer of size 687363958272",
    # koboldcpp 2207
    "alloc_tensor_range: failed to allocate CPU_REPACK buffer of size 108000000000",
    "llama_model_load: error loading model: unable to allocate CPU_REPACK buffer",
    # pinned memory is the host's
    "alloc_tensor_range: failed to allocate CUDA_Host buffer of size 1992294400",
    "  what():  std::bad_alloc",
    "llama_model_load: error loading model: mmap failed: Cannot allocate memory",
    "OSError: [Errno 12] Cannot allocate memory",
    "MemoryError",
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory",
    "memory allocation of 4294967296 bytes failed",
    "vk::SystemError: vk::Device::createFence: ErrorOutOfHostMemory",
]

LOST = [
    # llama.cpp 13248, 11812; NVIDIA/open-gpu-kernel-modules 1342
    "terminate called after throwing an instance of 'vk::DeviceLostError'",
    "Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "NVRM: GPU lost from the bus; GPU is lost",
]

HARMLESS = [
    # llama.cpp 9629, 9271: it goes on without pinned memory
    "ggml_cuda_host_malloc: failed to allocate 1900,00 MiB of pinned memory: invalid argument",
    "ggml_vulkan: Failed to allocate pinned memory.",
    "load_tensors:        CUDA0 model buffer size = 48928.09 MiB",
    "model has unused tensor blk.28.attn_norm.weight -- ignoring",
    "Exception: OutOfMemory is a model of mine",
]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        *((line, Cause.VRAM_OOM) for line in VRAM),
        *((line, Cause.HOST_OOM) for line in RAM),
        *((line, Cause.DRIVER_RESET) for line in LOST),
        *((line, Cause.EXIT) for line in HARMLESS),
    ],
)
def test_memory_of_gpu_and_host_is_told_apart_by_the_engines_words(line: str, cause: Cause) -> None:
    """ORCH-3039."""
    found, message = explain(End(1, lines=("loading", line, "exiting")))
    assert found is cause
    assert "exit status 1" in message
    assert line in message


@pytest.mark.parametrize(
    ("end", "cause", "words"),
    [
        (End(0), Cause.EXIT, "exit status 0"),
        (End(3), Cause.EXIT, "exit status 3"),
        (End(-signal.SIGSEGV), Cause.SIGNAL, "killed by SIGSEGV"),
        (End(-signal.SIGKILL), Cause.SIGNAL, "killed by SIGKILL"),
        (End(-250), Cause.SIGNAL, "killed by signal 250"),
        (End(-signal.SIGKILL, oom_kills=1), Cause.HOST_OOM, "the kernel killed it"),
        (End(1, oom_kills=1), Cause.HOST_OOM, "the kernel killed a process"),
        (End(0, oom_kills=1), Cause.EXIT, "exit status 0"),
        (End(-signal.SIGABRT, lines=("std::bad_alloc",)), Cause.HOST_OOM, "killed by SIGABRT"),
        (End(-signal.SIGABRT, lost_gpus=(0, 2)), Cause.DRIVER_RESET, "gave up GPU 0, 2"),
        (End(-9, Killed(Cause.UNRESPONSIVE, "It did not answer")), Cause.UNRESPONSIVE, "It did not answer."),
    ],
)
def test_cause_follows_the_hardest_evidence(end: End, cause: Cause, words: str) -> None:
    """ORCH-3039."""
    found, message = explain(end)
    assert found is cause
    assert words in message


def test_what_we_did_ourselves_outweighs_everything_else() -> None:
    end = End(-9, Killed(Cause.START_TIMEOUT, "It was late"), VRAM, oom_kills=3, lost_gpus=(1,))
    assert explain(end)[0] is Cause.START_TIMEOUT


def test_kill_by_the_kernel_outweighs_words_and_words_outweigh_its_other_kills() -> None:
    """ORCH-3039."""
    assert explain(End(-9, lines=(VRAM[0],), oom_kills=1))[0] is Cause.HOST_OOM
    assert explain(End(1, lines=(VRAM[0],), oom_kills=1))[0] is Cause.VRAM_OOM


def test_first_line_that_tells_counts_because_others_follow_from_it() -> None:
    """ORCH-3039."""
    assert explain(End(-6, lines=(VRAM[0], "terminate called", "  what():  std::bad_alloc")))[0] is Cause.VRAM_OOM
    assert explain(End(-6, lines=("std::bad_alloc", VRAM[0])))[0] is Cause.HOST_OOM


def test_message_is_bounded_and_keeps_the_newest_words_and_the_evidence() -> None:
    lines = (VRAM[0], *(f"line {index} " + "x" * 200 for index in range(19)))
    cause, message = explain(End(1, lines=lines))
    assert cause is Cause.VRAM_OOM
    assert VRAM[0] in message
    assert message.endswith(lines[-1])
    assert len(message) < WORDS_CHARS + 600
