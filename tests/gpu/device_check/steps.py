"""Training steps: time, kernels, waiting for data, and torchvision's network for comparison.

Steps are timed on random data in memory, then with images from disk for several numbers of loader
processes. torchvision's network runs at output stride 8, so ours is timed at 8 as well.
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from pipeline.data import labels, storage
from pipeline.data.datasets import open_split
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.recipes import registry
from pipeline.train.recipes.experiment import Experiment
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.loader import Batch, LoaderConfig, load_batches
from pipeline.train.worker.loss import PixelLoss
from pipeline.train.worker.state import TrainingState
from pipeline.train.worker.step import Trainer, build_average, build_optimizer
from tests.gpu.device_check.measurement import (
    add_row,
    busy_seconds,
    median_seconds,
    peak_gb,
    save_kernels,
    save_rows,
)

NUM_CLASSES, IGNORE_INDEX = 21, 255
WARMUP_STEPS = 5

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def draw_batches(batch: int, crop: int) -> Batches:
    """Return three random batches, whose labels are blocks of 16 x 16 pixels."""
    blocks = crop // 16 + 1

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8)
        label = torch.randint(0, NUM_CLASSES, (batch, blocks, blocks), dtype=torch.uint8)
        label = label.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :crop, :crop]
        return images, label.contiguous()

    return [draw() for _ in range(3)]


def build_trainer(experiment: Experiment, device: torch.device) -> Trainer:
    """Return the trainer of one worker."""
    model = DeepLabV3(experiment.model).to(device, memory_format=torch.channels_last)
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, experiment.optimizer),
        average=build_average(model, experiment.optimizer),
    )
    loss = PixelLoss(NUM_CLASSES, ignore_index=IGNORE_INDEX)
    return Trainer(state, loss, experiment.optimizer, ProcessGroup(device=device), 0)


class Check:
    """The measurements of one recipe."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self._name, self._arguments = name, arguments
        self._device = torch.device(arguments.device)
        experiment = registry.by_name(name).experiment
        optimizer = replace(experiment.optimizer, batch_size=arguments.batch, max_steps=10**6)
        self._experiment = replace(experiment, optimizer=optimizer)
        self._batches = draw_batches(arguments.batch, arguments.crop)

    def steps(self) -> None:
        """Time steps on data in memory, at the recipe's output stride and at torchvision's."""
        trainer = None
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            trainer = build_trainer(self._experiment, self._device)
            self._time("ours", trainer, cudnn_benchmark=benchmark)
        if self._device.type == "cuda" and trainer is not None:
            self._profile(trainer)
        if self._experiment.model.backbone.startswith("resnet"):
            model = replace(self._experiment.model, output_stride=8)
            self._time(
                "ours_output_stride_8",
                build_trainer(replace(self._experiment, model=model), self._device),
                cudnn_benchmark=True,
            )

    def with_loaders(self) -> None:
        """Time steps on images from disk for each number of loader processes."""
        arguments = self._arguments
        split = open_split(
            arguments.images, "trainaug", layout="voc", classes=labels.get_classes("voc")
        )
        crop = (arguments.crop, arguments.crop)
        config = LoaderConfig(
            split=split,
            indices=tuple(range(len(split))),
            read=storage.read,
            augmentation=replace(self._experiment.augment, crop_size=crop, late_crop_size=None),
            fill=(124, 116, 104),
            batch_size=arguments.batch,
            max_steps=10**6,
            seed=0,
        )
        trainer = build_trainer(self._experiment, self._device)
        for loaders in arguments.loaders:
            waited_s, started = 0.0, time.perf_counter()
            batches = load_batches(config, 0, arguments.steps, loaders=loaders)
            for number, batch in enumerate(batches):
                assert isinstance(batch, Batch), batch
                if number == WARMUP_STEPS:
                    waited_s, started = 0.0, time.perf_counter()
                trainer.step(batch.images, batch.labels)
                waited_s += batch.waited_s if number >= WARMUP_STEPS else 0.0
            seconds = time.perf_counter() - started
            add_row(
                recipe=self._name,
                loaders=loaders,
                images_per_s=(arguments.steps - WARMUP_STEPS) * arguments.batch / seconds,
                waiting=waited_s / seconds,
            )

    def torchvision(self) -> None:
        """Time torchvision's network in bf16 with autocast, at output stride 8."""
        backbone = self._experiment.model.backbone
        if not backbone.startswith("resnet"):
            return
        try:
            segmentation = importlib.import_module("torchvision.models.segmentation")
        except ImportError:
            add_row(recipe=self._name, skipped="torchvision")
            return
        build = getattr(segmentation, f"deeplabv3_{backbone}")
        model = build(weights=None, weights_backbone=None, aux_loss=True, num_classes=NUM_CLASSES)
        model = model.to(self._device).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

        def step(i: int) -> None:
            images, target = (each.to(self._device) for each in self._batches[i % 3])
            images, target = images.permute(0, 3, 1, 2).float().div_(255), target.long()
            with torch.autocast(self._device.type, torch.bfloat16):
                outputs = model(images)
                loss = functional.cross_entropy(
                    outputs["out"], target, ignore_index=IGNORE_INDEX
                ) + 0.5 * functional.cross_entropy(
                    outputs["aux"], target, ignore_index=IGNORE_INDEX
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        self._add("torchvision_output_stride_8", median_seconds(step, self._device, budget_s=4))

    def _time(self, form: str, trainer: Trainer, **facts: Any) -> None:
        seconds = median_seconds(
            lambda i: trainer.step(*self._batches[i % 3]), self._device, budget_s=4
        )
        self._add(form, seconds, **facts)

    def _add(self, form: str, seconds: float, **facts: Any) -> None:
        add_row(
            recipe=self._name,
            form=form,
            **facts,
            step_ms=1e3 * seconds,
            images_per_s=self._arguments.batch / seconds,
            peak_gb=peak_gb(self._device),
        )

    def _profile(self, trainer: Trainer) -> None:
        cuda = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=cuda) as profile:
            started = time.perf_counter()
            for i in range(5):
                trainer.step(*self._batches[i % 3])
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        add_row(recipe=self._name, gpu_busy=busy_seconds(profile) / seconds)
        save_kernels(profile, f"train-{self._name}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", required=True, help="a data set in VOC's layout")
    parser.add_argument("--recipes", nargs="+", default=["voc-mobilenetv2", "table6-final"])
    parser.add_argument("--crop", type=int, default=513)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--loaders", type=int, nargs="+", default=[4, 8, 14])
    arguments = parser.parse_args()
    for name in arguments.recipes:
        check = Check(name, arguments)
        check.steps()
        check.with_loaders()
        check.torchvision()
        save_rows("steps")


if __name__ == "__main__":
    main()
