"""What a piece of work costs a device: its seconds, its peak of memory, its matrix-product rate."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.model import devices

_PRODUCT_SIDE = {"cpu": 1536}
_PRODUCT_SIDE_ELSEWHERE = 8192


class Cost(NamedTuple):
    """`device_s` are CPU seconds of all threads, or GPU seconds; `peak_bytes` of the process."""

    device_s: float
    wall_s: float
    peak_bytes: int


def measure(work: Callable[[], object], device: torch.device, *, repeats: int) -> Cost:
    """The medians of `repeats` calls of `work`, which the caller has warmed up, and their peak."""
    _reset_peak(device)
    costs = [_once(work, device) for _ in range(repeats)]
    seconds, walls = zip(*costs, strict=True)
    return Cost(statistics.median(seconds), statistics.median(walls), _peak(device))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what a convolution could reach at most."""
    side = _PRODUCT_SIDE.get(device.type, _PRODUCT_SIDE_ELSEWHERE)
    if dtype == torch.bfloat16 and not devices.has_bf16(device):
        side //= 4  # computed by hand, it takes 20 times as long
    a = torch.rand((side, side), device=device, dtype=dtype)
    a @ a
    return 2.0 * side**3 / measure(lambda: a @ a, device, repeats=3).device_s


def _once(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    started = time.perf_counter()
    if device.type != "cuda":
        cpu = time.process_time()
        work()
        return time.process_time() - cpu, time.perf_counter() - started
    event: Any = torch.cuda.Event  # torch gives it no types
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
