"""Benchmark inference with variants of the network, as a table and as JSON.

    python jobs/benchmark.py --quick
    python jobs/benchmark.py --device cuda --json benchmark.json
    python jobs/benchmark.py --bulk-images s3://images/2024 --bulk-checkpoint FILE

A row that does not fit into --minutes is marked as left out. The forms: `plain` is nn.Conv2d with
dilation in fp32, NCHW, eager; `channels_last` and `bf16` (channels last) are the usual first
attempts; `compiled` is torch.compile of the plain form, for this one size; `torchvision` is its own
network, if installed; `fast` is ours, as `jobs/segment.py` runs it.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from pipeline.checks import check_at_least, flag
from pipeline.cli.arguments import parse
from pipeline.cli.benchmark_bulk import Throughput, measure_throughput
from pipeline.cli.benchmark_forms import PLAIN_FORMS, Form, build, form_of
from pipeline.model import flops, timing
from pipeline.model.config import Backbone
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.predict import predict, scaled_size

SCALES = {"single": (1.0,), "multi": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}
Protocol = Literal["single", "multi"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Measure inference: seconds per image, FLOP/s compared with the device, peak memory."""

    backbones: tuple[Backbone, ...] = ("mobilenet_v2", "resnet50", "resnet101")
    """Backbones of the networks."""
    output_strides: tuple[int, ...] = (16, 8)
    """Output strides of the networks."""
    protocols: tuple[Protocol, ...] = ("single", "multi")
    """single is one scale; multi is the paper's six scales, each flipped too."""
    forms: tuple[Form, ...] = ("plain", "channels_last", "bf16", "compiled", "torchvision", "fast")
    """Variants to measure; fast is the one that `jobs/segment.py` uses."""
    size: int = 513
    """Height and width of the image, px."""
    device: str = "cpu"
    """cpu, or cuda."""
    threads: int = 1
    """CPU threads of the network."""
    repeats: int = 3
    """Measurements per row; the median counts."""
    minutes: float = 10.0
    """Time limit; rows that would exceed it are left out."""
    quick: bool = False
    """Measure only MobileNetV2 and ResNet-50 at output stride 16, single scale, uncompiled."""
    json: str | None = None
    """File to write all results to."""
    bulk_images: str | None = None
    """Also compare segmentation through Ray with a plain loop, on the images below this URI."""
    bulk_checkpoint: str | None = None
    """Checkpoint for --bulk-images."""
    bulk_limit: int = 64
    """Number of images for --bulk-images."""

    def __post_init__(self) -> None:
        for name in ("size", "threads", "repeats"):
            check_at_least(flag(name), getattr(self, name), 1)
        if (self.bulk_images is None) != (self.bulk_checkpoint is None):
            raise ValueError("--bulk-images and --bulk-checkpoint belong together; give both")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result for one form of one network; values not measured are None, `left_out` says why."""

    backbone: str
    output_stride: int
    protocol: str
    form: str
    dtype: str | None = None
    device_s: float | None = None
    images_per_second: float | None = None
    executed_flops: float | None = None
    nominal_flops: float | None = None
    share_of_products: float | None = None
    peak_bytes: int | None = None
    left_out: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with the command line `argv` and return its exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        settings = parse(BenchmarkSettings, argv, description=__doc__)
    except ValueError as error:
        print(f"benchmark failed exit=2 reason={error}")
        return 2
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    rates = {
        str(dtype): timing.matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    print(_headline(device, settings, rates), flush=True)
    rows = _Benchmark(settings, device, rates).rows()
    bulk = None
    if settings.bulk_images is not None and settings.bulk_checkpoint is not None:
        bulk = measure_throughput(
            settings.bulk_images,
            settings.bulk_checkpoint,
            limit=settings.bulk_limit,
            gpu=device.type == "cuda",
        )
        print(_bulk_line(bulk))
    if settings.json is not None:
        content = {
            "device": _device_name(device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "settings": asdict(settings),
            "product_flops": rates,
            "rows": [asdict(row) for row in rows],
            "bulk": None if bulk is None else asdict(bulk),
        }
        Path(settings.json).write_text(json.dumps(content, indent=1))
    measured = sum(row.left_out is None for row in rows)
    print(f"benchmark finished rows={measured} left_out={len(rows) - measured}")
    return 0


class _Benchmark:
    """A benchmark of networks and forms, until the time is over."""

    def __init__(
        self, settings: BenchmarkSettings, device: torch.device, rates: dict[str, float]
    ) -> None:
        self._settings = settings
        self._device = device
        self._rates = rates
        self._deadline = time.monotonic() + 60 * settings.minutes

    def rows(self) -> list[Row]:
        """Measure all forms; print and return a row for each."""
        quick, settings = self._settings.quick, self._settings
        backbones = settings.backbones[:2] if quick else settings.backbones
        strides = settings.output_strides[:1] if quick else settings.output_strides
        print(_TITLES)
        rows = []
        for backbone in backbones:
            for stride in strides:
                for row in self._of_network(build(backbone, stride)):
                    print(_line(row), flush=True)
                    rows.append(row)
        return rows

    def _of_network(self, model: DeepLabV3) -> list[Row]:
        quick = self._settings.quick
        rows = []
        for form in self._settings.forms:
            if quick and form not in PLAIN_FORMS and form != "fast":
                continue
            single: timing.Cost | None = None
            for protocol in ("single",) if quick else self._settings.protocols:
                row, single = self._row(model, form, protocol, single)
                rows.append(row)
        return rows

    def _row(
        self, model: DeepLabV3, form: Form, protocol: Protocol, single: timing.Cost | None
    ) -> tuple[Row, timing.Cost | None]:
        config, scales = model.config, SCALES[protocol]
        flip = protocol == "multi"
        about = {"backbone": config.backbone, "output_stride": config.output_stride}
        size = (self._settings.size, self._settings.size)
        work = [flops.count(model, scaled_size(model, size, scale)) for scale in scales]
        executed = sum(each.executed for each in work) * (1 + flip)
        nominal = sum(each.nominal for each in work) * (1 + flip)
        passes = sum(scale**2 for scale in scales) * (1 + flip)
        guess = 2 * executed / self._rates[str(torch.float32)]
        if single is not None:
            guess = single.wall_s * passes
        left = self._deadline - time.monotonic()
        left_out = f"takes about {guess:.0f} s" if guess > left else None
        fast = None
        if left_out is None:
            fast, left_out = form_of(model, form, self._device, size, multi=flip)
        if fast is None:
            row = Row(**about, protocol=protocol, form=form, left_out=left_out)  # type: ignore[arg-type]
            return row, single
        image = torch.zeros((1, 3, *size), device=self._device)
        if fast.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)

        def run() -> object:
            return predict(fast.model, image, scales=scales, flip=flip)

        if single is None or self._device.type == "cuda":  # CUDA chooses kernels for each size
            run()
        cost = timing.measure(run, self._device, repeats=1 if flip else self._settings.repeats)
        row = Row(
            **about,  # type: ignore[arg-type]
            protocol=protocol,
            form=form,
            dtype=str(fast.dtype),
            device_s=cost.device_s,
            images_per_second=1 / cost.wall_s,
            executed_flops=executed / cost.device_s,
            nominal_flops=nominal / cost.device_s,
            share_of_products=executed / cost.device_s / self._rates[str(fast.dtype)],
            peak_bytes=cost.peak_bytes,
        )
        return row, cost if single is None else single


_TITLES = (
    "| network | output stride | protocol | form | s per image | images/s | GFLOP/s (nominal) "
    "| of peak matmul | peak MB |\n|---|---|---|---|---|---|---|---|---|"
)


def _line(row: Row) -> str:
    start = f"| {row.backbone} | {row.output_stride} | {row.protocol} | {row.form} |"
    if row.device_s is None:
        return f"{start} not measured: {row.left_out} | | | | |"
    assert row.images_per_second is not None
    assert row.executed_flops is not None
    assert row.nominal_flops is not None
    assert row.share_of_products is not None
    assert row.peak_bytes is not None
    return (
        f"{start} {row.device_s:.3g} | {row.images_per_second:.2f} | "
        f"{row.executed_flops / 1e9:.0f} ({row.nominal_flops / 1e9:.0f}) | "
        f"{row.share_of_products:.0%} | {row.peak_bytes / 1e6:.0f} |"
    )


def _headline(device: torch.device, settings: BenchmarkSettings, rates: dict[str, float]) -> str:
    products = ", ".join(f"{name[6:]} {rate / 1e9:.1f}" for name, rate in rates.items())
    return (
        f"{_device_name(device)}, {settings.threads} threads, torch {torch.__version__}, "
        f"{settings.size} x {settings.size}; matrix products GFLOP/s: {products}"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {capability}"


def _bulk_line(bulk: Throughput) -> str:
    return (
        f"bulk, {bulk.images} images: {bulk.ray_images_per_second:.2f} images/s through Ray after "
        f"{bulk.ray_start_s:.1f} s of start-up, {bulk.loop_images_per_second:.2f} in a plain loop "
        f"after {bulk.loop_start_s:.1f} s: {bulk.ratio:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
