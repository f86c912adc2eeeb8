"""Measures the cost of work on a device: seconds, peak memory, and the rate of matrix products."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.model import devices

_MATMUL_SIDE = {"cpu": 1536}
_MATMUL_SIDE_ELSEWHERE = 8192


class Cost(NamedTuple):
    """Cost of one call.

    `device_s` is CPU seconds of all threads, or GPU seconds; `peak_bytes` is the process's peak
    memory, on a GPU that of the device.
    """

    device_s: float
    wall_s: float
    peak_bytes: int


def measure(work: Callable[[], object], device: torch.device, *, repeats: int) -> Cost:
    """Return the median cost of `repeats` calls of `work`, and their peak memory.

    The caller has warmed `work` up.
    """
    _reset_peak(device)
    costs = [_measure_once(work, device) for _ in range(repeats)]
    seconds, walls = zip(*costs, strict=True)
    return Cost(statistics.median(seconds), statistics.median(walls), _peak(device))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product: an upper bound for convolutions."""
    side = _MATMUL_SIDE.get(device.type, _MATMUL_SIDE_ELSEWHERE)
    if dtype == torch.bfloat16 and not devices.has_bf16(device):
        side //= 4  # emulated, it takes 20 times as long
    a = torch.rand((side, side), device=device, dtype=dtype)
    a @ a
    return 2.0 * side**3 / measure(lambda: a @ a, device, repeats=3).device_s


def _measure_once(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    started = time.perf_counter()
    if device.type != "cuda":
        cpu = time.process_time()
        work()
        return time.process_time() - cpu, time.perf_counter() - started
    event: Any = torch.cuda.Event  # torch does not annotate it
    begin, end = (event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, time.perf_counter() - started


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
