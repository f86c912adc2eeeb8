"""Helpers of the device check: timing, hardware limits, and results, one line per row."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

OUT = Path(os.environ.get("OUT") or Path(tempfile.gettempdir()) / "device_check")
"""Folder of the results."""

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

_rows: list[dict[str, Any]] = []


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[int], object],
    device: torch.device,
    *,
    budget_s: float = 1.5,
    least: int = 3,
    most: int = 50,
) -> float:
    """Return the median seconds of `work(i)`, by events on a GPU, after two calls to warm it up."""
    work(0)
    work(1)
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            begin, finish = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            work(len(times))
            finish.record()
            finish.synchronize()
            times.append(begin.elapsed_time(finish) / 1e3)
        else:
            started = time.perf_counter()
            work(len(times))
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def hardware_limits(device: torch.device) -> tuple[float, float]:
    """Return FLOP/s of a bf16 matrix product, and bytes/s of a copy, on random data."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2.0 * side**3 / median_seconds(lambda _: a @ b, device)
    source = torch.randn(2**30 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.numel() * source.element_size()
    return flops, copied / median_seconds(lambda _: target.copy_(source), device)


def calibrate(model: nn.Module, device: torch.device) -> None:
    """Set batch statistics so that activations are about 1; a GPU is faster on zeros."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train().to(device)(torch.randn(4, 3, 129, 129, device=device))
    model.eval().cpu()


def add_row(**facts: Any) -> None:
    """Print a row, and keep it for `save_rows`."""
    _rows.append(facts)
    shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())
    print(" ".join(shown), flush=True)


def save_rows(name: str) -> None:
    """Write all rows so far to `name`.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(_rows, indent=1))


def one_word(error: BaseException) -> str:
    """Return an error as a value of a row."""
    message = (str(error).splitlines() or [""])[0][:160]
    return f"{type(error).__name__}:{message}".replace(" ", "_")


def peak_gb(device: torch.device) -> float:
    """Return the peak of the GPU's memory in GB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def busy_seconds(profile: torch.profiler.profile) -> float:
    """Return the seconds in which the GPU ran a kernel or copy: the union of their intervals."""
    events: Any = profile.events()
    spans = sorted(
        (each.time_range.start, each.time_range.end)
        for each in events
        if each.device_type.name == "CUDA"
    )
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def save_kernels(profile: torch.profiler.profile, name: str) -> None:
    """Write the kernels that took the most time to `name`.txt."""
    averages = profile.key_averages()
    table = averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.txt").write_text(table)
