"""A bulk run on one GPU against the network alone: images per second, and how busy the GPU is.

For each case: the network alone on decoded images; the segmenter without Ray, shard by shard; and
`jobs/segment.py` through Ray, timed between its first and last shard.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.bulk.driver.preflight import build_pool, build_worker_context, preflight
from pipeline.bulk.planning import plan
from pipeline.bulk.settings import BulkSettings, Inference
from pipeline.bulk.worker.segmenter import Segmenter
from pipeline.bulk.worker.shard_worker import images_of
from pipeline.data import images, labels, storage
from pipeline.model import predict, weights
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.optimize import optimize_for_inference
from pipeline.results.layout import RunLayout
from tests.gpu.device_check.measurement import (
    OUT,
    PAPER_SCALES,
    add_row,
    busy_seconds,
    calibrate,
    one_word,
    save_kernels,
    save_rows,
    synchronize,
)

ROOT = Path(__file__).parents[3]
JOB_TIMEOUT_S = 150


class Case:
    """A network and a protocol, such as resnet101/multi."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self._arguments = name, arguments
        network, protocol = name.split("/")
        self._device = torch.device(arguments.device)
        self._gpu = self._device.type == "cuda"
        self._scales: Sequence[float] = PAPER_SCALES if protocol == "multi" else (1.0,)
        self._flip = protocol == "multi"
        self._checkpoint = self._write_checkpoint(network)

    @property
    def _file_name(self) -> str:
        return self.name.replace("/", "-")

    def network_alone(self, pixels: list[np.ndarray]) -> dict[str, Any]:
        """Segment the images in the batches of a bulk run: of one size, in order, per shard."""
        model = optimize_for_inference(weights.load(self._checkpoint)[0], self._device)
        shard = self._arguments.shard
        batches = [
            batch
            for start in range(0, len(pixels), shard)
            for batch in _batches(pixels[start : start + shard], 8 if self._gpu else 1)
        ]

        def segment_all() -> None:
            for batch in batches:
                predict.segment(model, batch, scales=self._scales, flip=self._flip)

        if self._gpu:
            segment_all()
        synchronize(self._device)
        started = time.perf_counter()
        segment_all()
        return {
            "alone_images_per_s": len(pixels) / (time.perf_counter() - started),
            "mean_batch": len(pixels) / len(batches),
            "shapes": len({batch.shape for batch in batches}),
        }

    def without_ray(self) -> dict[str, Any]:
        """Run the segmenter shard by shard; report how busy the GPU is."""
        arguments = self._arguments
        settings = BulkSettings(
            images=str(Path(arguments.images, "JPEGImages")),
            results=tempfile.mkdtemp(),
            checkpoint=self._checkpoint,
            limit=arguments.limit,
            run_id=self._file_name,
            shard_images=arguments.shard,
            gpus_per_actor=1.0 if self._gpu else 0.0,
            cpus_per_actor=arguments.cpus,
            inference=Inference(scales=tuple(self._scales), flip=self._flip),
        )
        layout = RunLayout(results=settings.results, run_id=self._file_name)
        identity = settings.identity(model=preflight(settings).fingerprint)
        known = plan.make(settings, layout, identity)
        context = build_worker_context(settings, layout, known, build_pool(settings))
        shards = [row for part in known.parts for row in plan.read_part(layout, part).to_pylist()]
        with contextlib.closing(Segmenter(context)) as segmenter:
            segmenter.rows_of(shards[0]["shard"], images_of(shards[0]["images"]))
            synchronize(self._device)
            with contextlib.ExitStack() as stack:
                profile = None
                if self._gpu:
                    cuda = [torch.profiler.ProfilerActivity.CUDA]
                    profile = stack.enter_context(torch.profiler.profile(activities=cuda))
                started, done, infer_s = time.perf_counter(), 0, 0.0
                for row in shards[1:]:
                    _, summary = segmenter.rows_of(row["shard"], images_of(row["images"]))
                    done += summary.images
                    infer_s += summary.infer_s
                seconds = time.perf_counter() - started
        if profile is not None:
            save_kernels(profile, f"kernels-{self._file_name}")
        return {
            "loop_images_per_s": done / seconds,
            "gpu_busy": busy_seconds(profile) / seconds if profile is not None else 0.0,
            "in_network": infer_s / seconds,
        }

    def through_ray(self) -> dict[str, Any]:
        """Run `jobs/segment.py` as a user would; report the rate after the first shard."""
        arguments, results = self._arguments, tempfile.mkdtemp()
        command = [sys.executable, "-m", "jobs.segment"]
        command += ["--images", str(Path(arguments.images, "JPEGImages")), "--results", results]
        command += ["--checkpoint", self._checkpoint, "--limit", str(arguments.limit)]
        command += ["--run-id", "ray", "--shard-images", str(arguments.shard)]
        command += ["--actors", "1", "1", "--gpus-per-actor", "1" if self._gpu else "0"]
        command += ["--cpus-per-actor", str(arguments.cpus)]
        command += ["--scales", *map(str, self._scales), *(["--flip"] if self._flip else [])]
        started = time.time()
        with self._gpu_monitor():
            job = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=JOB_TIMEOUT_S
            )
        wall_s = time.time() - started
        log = OUT / f"segment-{self._file_name}.log"
        log.write_text(job.stdout[-6000:] + job.stderr[-6000:])
        if job.returncode:
            return {"failed": f"exit_code_{job.returncode}", "log": log}
        shards = sorted(
            (file.stat().st_mtime, pq.read_metadata(file).num_rows)
            for file in Path(results, "images").rglob("*.parquet")
        )
        seconds = max(1e-9, shards[-1][0] - shards[0][0])
        return {
            "ray_images_per_s": sum(rows for _, rows in shards[1:]) / seconds,
            "first_shard_s": shards[0][0] - started,
            "wall_s": wall_s,
        }

    @contextlib.contextmanager
    def _gpu_monitor(self) -> Any:
        """Log the GPU's utilization each second."""
        if not self._gpu:
            yield
            return
        with (OUT / f"dmon-{self._file_name}.txt").open("w") as out:
            monitor = subprocess.Popen(["nvidia-smi", "dmon", "-s", "u", "-d", "1"], stdout=out)
            try:
                yield
            finally:
                monitor.terminate()
                monitor.wait()

    def _write_checkpoint(self, network: str) -> str:
        if network == "mobilenet":
            return str(ROOT / "jobs" / "demo" / "tfzoo-voc-mobilenetv2.safetensors")
        torch.manual_seed(0)
        config = ModelConfig(
            backbone="resnet101", output_stride=8, style="torchvision", multi_grid=(1, 1, 1)
        )
        model = DeepLabV3(config)
        calibrate(model, self._device)
        path = Path(tempfile.mkdtemp()) / "resnet101.safetensors"
        storage.write(str(path), weights.to_bytes(model, labels.get_classes("voc")))
        return str(path)


def _batches(shard: list[np.ndarray], most: int) -> list[np.ndarray]:
    """Group the images of a shard by size, in batches of at most `most`."""
    batches: list[np.ndarray] = []
    waiting: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in shard:
        waiting.setdefault(image.shape, []).append(image)
        if len(waiting[image.shape]) == most:
            batches.append(np.stack(waiting.pop(image.shape)))
    return batches + [np.stack(rest) for rest in waiting.values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", required=True, help="a data set in VOC's layout")
    parser.add_argument("--cpus", type=int, default=14)
    parser.add_argument("--shard", type=int, default=32)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument(
        "--cases", nargs="+", default=["mobilenet/single", "resnet101/single", "resnet101/multi"]
    )
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(arguments.images, "JPEGImages").glob("*.jpg"))[: arguments.limit]
    pixels = [images.decode(file.read_bytes()) for file in files]
    for name in arguments.cases:
        try:
            case = Case(name, arguments)
            add_row(case=name, **case.network_alone(pixels))
            add_row(case=name, **case.without_ray())
            add_row(case=name, **case.through_ray())
        except Exception as error:
            add_row(case=name, failed=one_word(error))
        save_rows("bulk")


if __name__ == "__main__":
    main()
