"""What this machine can do: peak FLOP/s, memory, a name for the log, a C++ compiler."""

import ctypes
import os
import platform
import re
import shutil
import sys
import time

import torch


def keep_memory() -> None:
    """Let the C library keep freed memory, and the kernel back it with huge pages, instead of fetching it anew.

    A step frees and takes megabytes hundreds of times; glibc would give each back to the kernel, which clears every
    page that it hands out again (a tenth of a step: dev/LOG.md). Other C libraries are left as they are.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for it before its first tensor
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt  # malloc.h: M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, M_TOP_PAD -2
        if not mallopt(-3, 1 << 30):
            mallopt(-3, 32 << 20)  # the most that old releases take
        mallopt(-1, 1 << 30)
        mallopt(-2, 64 << 20)


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16); elsewhere it is slower."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    cpu = torch.cpu
    return bool(getattr(cpu, "_is_amx_tile_supported", lambda: False)()) or bool(
        getattr(cpu, "_is_avx512_bf16_supported", lambda: False)()
    )


# Dense bf16 peaks in TFLOP/s without sparsity, from the vendors' data sheets; the first name that matches counts.
GPU_PEAK_TFLOPS = (
    ("GB200", 2500),
    ("B200", 2250),
    ("B100", 1800),
    ("H200", 989),
    ("H100 NVL", 835),
    ("H100 PCIE", 756),
    ("H100", 989),
    ("H800", 989),
    ("GH200", 989),
    ("A100", 312),
    ("A800", 312),
    ("A40", 150),
    ("A30", 165),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("A10", 125),
    ("RTX 6000 ADA", 364),
    ("RTX 5090", 210),
    ("RTX 4090", 165),
    ("RTX 4080", 97),
    ("RTX 3090", 71),
    ("T4", 65),
    ("V100", 125),
)


def gpu_peak_flops(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its marketing name, or None for one that the table does not know."""
    words = f" {re.sub(r'[^A-Z0-9]+', ' ', name.upper())} "  # whole words: an RTX A4000 is no A40
    return next((tflops * 1e12 for key, tflops in GPU_PEAK_TFLOPS if f" {key} " in words), None)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3
) -> float:
    """The best rate of a few square matmuls on this very device, in FLOP/s: the peak that MFU is measured against."""
    size = size or (1024 if device.type == "cpu" else 8192)
    own = torch.Generator(device).manual_seed(0)  # a run's random numbers are not ours to draw
    a = torch.randn(size, size, device=device, dtype=dtype, generator=own)
    best, rounds, deadline = 0.0, 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        rounds += 1
    return best


def peak_flops(compute) -> float:
    """Peak FLOP/s of one rank's device: the table for a known GPU, else a short measurement."""
    known = gpu_peak_flops(torch.cuda.get_device_name(compute.device)) if compute.device_type == "cuda" else None
    return known or measure_matmul_flops(compute.device, compute.dtype)


def device_name(compute) -> str:
    """A name for the log: the GPU's, or the CPU architecture with the number of threads in use."""
    if compute.device_type == "cuda":
        return torch.cuda.get_device_name(compute.device)
    return f"{compute.device_type} {platform.machine()} with {torch.get_num_threads()} threads"


def memory_mb(compute) -> float:
    """Peak memory of this process so far in MiB: allocated on the GPU, else the resident set."""
    if compute.device_type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device) / 2**20

    import resource  # not on Windows; the CPU path of training is Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def compiler_problem() -> str | None:
    """Why torch.compile cannot work here (no C++ compiler for the CPU back end), or None when nothing is known."""

    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) or shutil.which("clang++"):
        return None
    return f"no C++ compiler ({compiler}) on PATH"
