"""A tiny training run: photos on disk, a network, and processes that share it."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from PIL import Image

from pipeline.data.labels import Classes
from pipeline.evaluation.score import Score
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.driver.preflight import inspect_data, prepare
from pipeline.train.recipes.experiment import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
)
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker.distributed import ProcessGroup
from pipeline.train.worker.history import Step
from pipeline.train.worker.task import WorkerSpec

CLASSES = Classes.from_dict({"names": ["ground", "square", "noise", "never"]})
MOBILENET = ModelConfig(
    backbone="mobilenet_v2",
    num_classes=4,
    multi_grid=(1, 1, 1),
    atrous_rates=(),
    image_pooling=False,
)
RESNET = replace(MOBILENET, backbone="resnet18", style="torchvision", num_convs=0, auxiliary=True)

TIME_OUT_S = 200
"""For processes that share a run; one that waits for another in vain is killed then."""


def network(config: ModelConfig = MOBILENET) -> DeepLabV3:
    """Weights by chance, and the statistics of noise, without which logits are all but zero."""
    torch.manual_seed(4)
    model = DeepLabV3(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 33, 33))
    return model


def write_dataset(root: Path, *, train: int = 6, val: int = 5) -> None:
    """Two folders a split: photos of a few sizes whose labels can be seen in them."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            generator = np.random.default_rng((number, count))
            size = (37 + 3 * (number % 3), 41 + number)
            label = generator.choice(np.array([0, 0, 2, 255], dtype=np.uint8), size)
            label[5:20, 8 : 20 + number] = 1
            noise = generator.integers(0, 60, (*size, 3), dtype=np.uint8)
            photo = noise + np.where(label == 1, 150, 20).astype(np.uint8)[..., None]
            for folder, pixels, ending in (("images", photo, "jpg"), ("labels", label, "png")):
                path = root / split / folder / f"{number:02d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def experiment(**optimizer: Any) -> Experiment:
    """Four steps over photos of `draw_set`; `optimizer` are values of its OptimizerConfig."""
    values = {
        "max_steps": 4,
        "batch_size": 3,
        "base_lr": 0.02,
        "bn_momentum": 0.1,
        "ema_decay": 0.5,
        "bf16": False,
    }
    names = '{"names": ["ground", "square", "noise", "never"]}'
    return Experiment(
        model=MOBILENET,
        data=DataConfig(layout="folders", classes=names, train_split="train", val_split="val"),
        augment=AugmentConfig(crop_size=(33, 35)),
        optimizer=OptimizerConfig(**{**values, **optimizer}),
        evaluation=EvaluationConfig(eval_every=2),
    )


def settings(root: Path, out: Path, what: Experiment, **more: Any) -> TrainingSettings:
    """A run of one worker without other processes."""
    values = {"checkpoint_every": 2, "loaders": 0, "cpus_per_worker": 1}
    return TrainingSettings(data=str(root), out=str(out), experiment=what, **{**values, **more})


def worker_spec(root: Path, out: Path, what: Experiment, **more: Any) -> WorkerSpec:
    """A run that has begun below `out`."""
    said = settings(root, out, what, **more)
    return prepare(said, inspect_data(said, print), print).spec


@dataclass
class RecordingListener:
    """A listener that keeps what it is told."""

    rows: list[Step] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    begun: list[tuple[int, Score | None]] = field(default_factory=list)
    lived: int = 0

    def started(self, workers: int, best: Score | None) -> None:
        self.begun.append((workers, best))

    def heartbeat(self) -> None:
        self.lived += 1

    def report_step(self, row: Step, scored: Score | None) -> None:
        self.rows.append(row)
        self.scores += [scored] if scored else []

    def fail(self, message: str) -> None:
        self.failures.append(message)


def run_workers(world_size: int, folder: Path, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What `work(group, *given)` returns in each of `world_size` processes that are a group.

    Raises AssertionError where one fails, or does not end in time. `folder` is where they meet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.train.worker.loop"])
    meeting = folder / f"meeting-{world_size}-{len(list(folder.iterdir()))}"
    ends = []
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_join, args=(there, rank, world_size, str(meeting), work, given), daemon=True
        )
        process.start()
        there.close()
        ends.append((process, here))
    try:
        answers = []
        for rank, (_, here) in enumerate(ends):
            assert here.poll(TIME_OUT_S), f"worker {rank} of {world_size} hangs"
            answers.append(pickle.loads(here.recv_bytes()))
    finally:
        for process, _ in ends:
            process.join(10)
            process.kill()
    wrong = [answer for ok, answer in answers if not ok]
    assert not wrong, "\n".join(wrong)
    return [answer for _, answer in answers]


def _join(
    there: Connection,
    rank: int,
    world_size: int,
    meeting: str,
    work: Callable[..., Any],
    given: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            distributed.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
            )
        answer = True, work(ProcessGroup(rank=rank, world_size=world_size), *given)
    except BaseException:
        answer = False, f"worker {rank}: {traceback.format_exc()}"
    # not send(): it would leave tensors in memory that ends with this process
    there.send_bytes(pickle.dumps(answer))
    if distributed.is_initialized():
        distributed.destroy_process_group()
