"""What is looked at before a training run, and what it begins with.

Enters: `Settings`. Leaves: a `Task` for the workers, with all that decides the result written below
--out, once: the run is known by it, and another experiment under the same URI is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data import labels, storage
from pipeline.data.datasets import Split, open_split
from pipeline.data.samples import Read
from pipeline.data.survey import (
    Survey,
    check_repeat_classes,
    median_frequency_weights,
    repeat_positions,
    survey_split,
)
from pipeline.model import devices, weights
from pipeline.model.deeplab import DeepLabV3
from pipeline.runs import ray_connection
from pipeline.train.driver import run_identity
from pipeline.train.recipes.experiment import Experiment
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker import checkpoints
from pipeline.train.worker.state import Snapshot
from pipeline.train.worker.task import WorkerSpec, node_cache

Log = Callable[[str], None]

SAY_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The splits of a run, what their labels hold, and the network to start from.

    `survey` is of the labels to train on, `survey_val` of val's. `first` is None where the run has
    begun before, with a network of its own.
    """

    train: Split
    val: Split
    survey: Survey
    survey_val: Survey
    indices: tuple[int, ...]
    class_weights: tuple[float, ...] | None
    first: DeepLabV3 | None
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run whose workers can start."""

    settings: TrainingSettings
    task: WorkerSpec

    def record(self, last: Snapshot | None, *, seconds: float) -> dict[str, Any]:
        """What the run came to, for its record; `seconds` are this driver's."""
        history = last.history if last else None
        newest, best = (history.scores[-1], history.best) if history else (None, None)
        steps = history.steps if history else []
        speeds = sorted(each.images_per_second for each in steps)
        return {
            "steps": last.step if last else 0,
            "seconds": round(seconds, 1),
            "images_per_second": round(speeds[len(speeds) // 2], 3) if speeds else None,
            "workers": self.settings.workers,
            "classes": self.task.train.classes.names,
            "last": newest and {"step": newest.step, "miou": newest.miou, "ious": newest.ious},
            "best": best and {"step": best.step, "miou": best.miou, "ious": best.ious},
            "experiment": json.loads(self.task.experiment.to_json()),
        }


def inspect_data(settings: TrainingSettings, say: Log) -> DataReport:
    """Opens the splits, checks every label, and reads the weights to start from. Writes nothing.

    Raises ValueError where one of these cannot be used, or --out holds another run.
    """
    _check_gpus(settings, say)
    data = settings.experiment.data
    try:
        classes = labels.get_classes(data.classes)
    except TypeError as error:
        raise ValueError(f"--classes: {error}") from None
    wanted = settings.experiment.model.num_classes
    if classes.num_classes != wanted:
        raise ValueError(
            f"--classes {data.classes} are {classes.num_classes}, but the network has {wanted}: "
            f"give --num-classes {classes.num_classes}"
        )
    check_repeat_classes(classes, data.repeat_classes)  # not after a look at a million labels
    train, val = (
        open_split(settings.data, split, layout=data.layout, classes=classes)
        for split in (data.train_split, data.val_split)
    )
    known = run_identity.of_lists(settings, train, val)
    run_identity.check_same(settings.out, known)
    begun = storage.exists(storage.join(settings.out, checkpoints.INITIAL))
    first = None if begun else initial_model(settings.experiment, say)
    read = node_cache(train, val, max_bytes=settings.cache_bytes)
    found_val = _surveyed(settings, val, checkpoints.SURVEY_VAL, read, say)
    _check_labelled(found_val, val)
    found = _surveyed(settings, train, checkpoints.SURVEY, read, say)
    chosen = repeat_positions(found, classes, data.repeat_classes, data.repeats)
    balanced = settings.experiment.optimizer.class_weights == "median_frequency"
    known |= run_identity.of_contents(found, found_val)
    run_identity.check_same(settings.out, known)
    return DataReport(
        train=train,
        val=val,
        survey=found,
        survey_val=found_val,
        indices=tuple(chosen),
        class_weights=tuple(map(float, median_frequency_weights(found))) if balanced else None,
        first=first,
        identity=known,
    )


def prepare(settings: TrainingSettings, looked: DataReport, say: Log) -> PreparedRun:
    """Writes what the run is, and the network that it starts from, unless it has begun before."""
    out = settings.out
    storage.create(storage.join(out, checkpoints.RUN), json.dumps(looked.identity).encode())
    run_identity.check_same(out, looked.identity)
    surveys = {checkpoints.SURVEY: looked.survey, checkpoints.SURVEY_VAL: looked.survey_val}
    for name, found in surveys.items():
        storage.write(storage.join(out, name), found.to_json().encode())
    initial = storage.join(out, checkpoints.INITIAL)
    if looked.first is not None:
        # under the lease, and the same for the same run: a large network is over `create`'s limit
        storage.write(initial, weights.to_bytes(looked.first, looked.train.classes))
    return PreparedRun(settings=settings, task=build_worker_spec(settings, looked, initial))


def build_worker_spec(settings: TrainingSettings, looked: DataReport, initial: str) -> WorkerSpec:
    """What the workers need to know."""
    return WorkerSpec(
        experiment=settings.experiment,
        out=settings.out,
        initial=initial,
        train=looked.train,
        val=looked.val,
        indices=looked.indices,
        class_weights=looked.class_weights,
        checkpoint_every=settings.checkpoint_every,
        threads=settings.cpus,
        loaders=settings.loader_processes,
        cache_bytes=settings.cache_bytes,
    )


def initial_model(experiment: Experiment, say: Log) -> DeepLabV3:
    """The network before the first step: fresh weights by the seed, then those of `init`."""
    torch.manual_seed(experiment.seed)
    model = DeepLabV3(experiment.model)
    if experiment.init is None:
        say("the network starts from random weights: give --init zoo:NAME for ImageNet's")
        return model
    data = weights.read(experiment.init)
    if weights.is_backbone(data, name=experiment.init):
        weights.load_backbone(model, experiment.init)
        return model
    wanted = experiment.model.num_classes
    found, classes = weights.load(experiment.init, data=data)
    if classes.num_classes != wanted:
        say(
            f"{experiment.init} has {classes.num_classes} classes, not {wanted}: its last layer "
            "starts anew"
        )
        found, _ = weights.load(
            experiment.init, num_classes=wanted, reset_classifier=True, data=data
        )
    weights.copy_weights(found, model, experiment.init)
    return model


def _check_gpus(settings: TrainingSettings, say: Log) -> None:
    if ray_connection.has_cluster():
        return
    workers, each = settings.workers_range[0], settings.gpus_per_worker
    devices.check_gpus(workers * each, f"--gpus-per-worker {each:g} on {workers} workers")
    if not each and torch.cuda.device_count():
        say("this machine has GPUs, and training is on its CPU: --gpus-per-worker 1 uses one")


def _check_labelled(found: Survey, val: Split) -> None:
    """Raises ValueError where val has no labelled pixel: a run would end without a score."""
    if not found.pixels.any():
        raise ValueError(
            f"no pixel of the {len(val)} photos of {val.name} is labelled, so there is no score: "
            "are --val-split and the classes' ignore_index the right ones?"
        )


def _surveyed(settings: TrainingSettings, split: Split, name: str, read: Read, say: Log) -> Survey:
    """What an earlier driver found in the labels of `split` and kept as `name`, or a look at them.

    Raises SampleError where one of them, or its photo's header, is not as it must be.
    """
    uri = storage.join(settings.out, name)
    if storage.exists(uri):
        before = Survey.from_json(storage.read(uri).decode())
        # an older one knows no digest
        if before.fingerprint == split.fingerprint and before.labels_sha256:
            return before
    if not settings.dry_run:
        _check_writable(settings.out)
    say(f"looking at the labels of {len(split)} photos of {split.name}")
    return survey_split(split, read, progress=_Progress(split, say))


def _check_writable(out: str) -> None:
    """Raises StorageError where nothing can be put below `out`: now, not after an hour."""
    probe = storage.join(out, "probe")
    storage.write(probe, b"")
    storage.delete([probe], within=out)


class _Progress:
    """Says how many labels of a split were looked at, where it takes long."""

    def __init__(self, split: Split, say: Log) -> None:
        self._split, self._say = split, say
        self._next = time.monotonic() + SAY_EVERY_S

    def __call__(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self._next += SAY_EVERY_S
            self._say(f"looked at {done} of {len(self._split)} labels of {self._split.name}")
