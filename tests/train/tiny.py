"""A tiny training run: images on disk, a network, and a group of worker processes."""

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

TIMEOUT_S = 200
"""For all processes of a group; one that is blocked is killed then."""


def network(config: ModelConfig = MOBILENET) -> DeepLabV3:
    """Return a network with random weights and the statistics of noise.

    With the initial statistics its logits would be almost zero.
    """
    torch.manual_seed(4)
    model = DeepLabV3(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 33, 33))
    return model


def write_dataset(root: Path, *, train: int = 6, val: int = 5) -> None:
    """Write images of several sizes, in which the labels are visible, and labels, per split."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            generator = np.random.default_rng((number, count))
            size = (37 + 3 * (number % 3), 41 + number)
            label = generator.choice(np.array([0, 0, 2, 255], dtype=np.uint8), size)
            label[5:20, 8 : 20 + number] = 1
            noise = generator.integers(0, 60, (*size, 3), dtype=np.uint8)
            image = noise + np.where(label == 1, 150, 20).astype(np.uint8)[..., None]
            for folder, pixels, ending in (("images", image, "jpg"), ("labels", label, "png")):
                path = root / split / folder / f"{number:02d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def experiment(**optimizer: Any) -> Experiment:
    """Return four steps on the images of `write_dataset`; `optimizer` replaces its values."""
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
    """Return the settings of a run of one worker without loader processes."""
    values = {"checkpoint_every": 2, "loaders": 0, "cpus_per_worker": 1}
    return TrainingSettings(data=str(root), out=str(out), experiment=what, **{**values, **more})


def worker_spec(root: Path, out: Path, what: Experiment, **more: Any) -> WorkerSpec:
    """Prepare a run below `out` and return what its workers need."""
    given = settings(root, out, what, **more)
    return prepare(given, inspect_data(given, print), print).spec


@dataclass
class RecordingListener:
    """A listener that keeps what is reported."""

    rows: list[Step] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    starts: list[tuple[int, Score | None]] = field(default_factory=list)
    heartbeats: int = 0

    def started(self, workers: int, best: Score | None) -> None:
        self.starts.append((workers, best))

    def heartbeat(self) -> None:
        self.heartbeats += 1

    def report_step(self, latest: Step, scored: Score | None) -> None:
        self.rows.append(latest)
        self.scores += [scored] if scored else []

    def fail(self, message: str) -> None:
        self.failures.append(message)


def run_workers(world_size: int, folder: Path, work: Callable[..., Any], *given: Any) -> list[Any]:
    """Return what `work(group, *given)` returns in each of `world_size` processes of a group.

    The processes find each other through a file in `folder`. Raises AssertionError if one fails
    or does not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.train.worker.loop"])
    rendezvous = folder / f"rendezvous-{world_size}-{len(list(folder.iterdir()))}"
    workers = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        group = ProcessGroup(rank=rank, world_size=world_size)
        process = context.Process(
            target=_work_in_group, args=(sender, group, str(rendezvous), work, given), daemon=True
        )
        process.start()
        sender.close()
        workers.append((process, receiver))
    try:
        results = []
        for rank, (_, receiver) in enumerate(workers):
            assert receiver.poll(TIMEOUT_S), f"worker {rank} of {world_size} is blocked"
            results.append(pickle.loads(receiver.recv_bytes()))
    finally:
        for process, _ in workers:
            process.join(10)
            process.kill()
    errors = [result for succeeded, result in results if not succeeded]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


def _work_in_group(
    sender: Connection, group: ProcessGroup, rendezvous: str, work: Callable[..., Any], given: Any
) -> None:
    torch.set_num_threads(1)
    try:
        if group.world_size > 1:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=group.rank,
                world_size=group.world_size,
            )
        result = True, work(group, *given)
    except BaseException:
        result = False, f"worker {group.rank}: {traceback.format_exc()}"
    # not send(): it would leave tensors in memory that ends with this process
    sender.send_bytes(pickle.dumps(result))
    if distributed.is_initialized():
        distributed.destroy_process_group()
