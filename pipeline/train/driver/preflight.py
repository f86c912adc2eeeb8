"""Preflight of a training run: check its data, and write what it starts from.

`prepare` stores the identity of the run once, so that another experiment under the same URI is
refused.
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
from pipeline.data.labels import Classes
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
"""Called with each line for the user."""

LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """The splits of a run, the surveys of their labels, and the network to start from.

    `indices` is the list of training images, with repeats. `initial_model` is None if the run is
    resumed: its initial network is stored already.
    """

    train: Split
    val: Split
    train_survey: Survey
    val_survey: Survey
    indices: tuple[int, ...]
    class_weights: tuple[float, ...] | None
    initial_model: DeepLabV3 | None
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run whose workers can start, and the spec they start with."""

    settings: TrainingSettings
    spec: WorkerSpec

    def record(self, last: Snapshot | None, *, seconds: float) -> dict[str, Any]:
        """Return the record of the finished run; `seconds` are this driver's."""
        history = last.history if last else None
        newest, best = (history.scores[-1], history.best) if history else (None, None)
        steps = history.steps if history else []
        speeds = sorted(each.images_per_second for each in steps)
        return {
            "steps": last.step if last else 0,
            "seconds": round(seconds, 1),
            "images_per_second": round(speeds[len(speeds) // 2], 3) if speeds else None,
            "workers": self.settings.workers,
            "classes": self.spec.train.classes.names,
            "last": newest and {"step": newest.step, "miou": newest.miou, "ious": newest.ious},
            "best": best and {"step": best.step, "miou": best.miou, "ious": best.ious},
            "experiment": json.loads(self.spec.experiment.to_json()),
        }


def inspect_data(settings: TrainingSettings, log: Log) -> DataReport:
    """Open the splits, check every label, and load the initial weights. Writes no part of the run.

    Raises ValueError (including SampleError) or StorageError if one of these cannot be used, or if
    --out holds another run.
    """
    _check_gpus(settings, log)
    data = settings.experiment.data
    classes = _classes(settings.experiment)
    check_repeat_classes(classes, data.repeat_classes)  # before checking a million labels
    train, val = (
        open_split(settings.data, split, layout=data.layout, classes=classes)
        for split in (data.train_split, data.val_split)
    )
    identity = run_identity.of_lists(settings, train, val)
    run_identity.check_same(settings.out, identity)
    resumed = storage.exists(storage.join(settings.out, checkpoints.INITIAL))
    model = None if resumed else initial_model(settings.experiment, log)
    read = node_cache(train, val, max_bytes=settings.cache_bytes)
    val_survey = _survey(settings, val, checkpoints.SURVEY_VAL, read, log)
    _check_labeled(val_survey, val)
    train_survey = _survey(settings, train, checkpoints.SURVEY, read, log)
    class_weights = None
    if settings.experiment.optimizer.class_weights == "median_frequency":
        class_weights = tuple(map(float, median_frequency_weights(train_survey)))
    identity |= run_identity.of_contents(train_survey, val_survey)
    run_identity.check_same(settings.out, identity)
    return DataReport(
        train=train,
        val=val,
        train_survey=train_survey,
        val_survey=val_survey,
        indices=tuple(repeat_positions(train_survey, classes, data.repeat_classes, data.repeats)),
        class_weights=class_weights,
        initial_model=model,
        identity=identity,
    )


def prepare(settings: TrainingSettings, report: DataReport, log: Log) -> PreparedRun:
    """Write the run's identity, surveys and initial network, unless it is resumed."""
    out = settings.out
    storage.create(storage.join(out, checkpoints.RUN), json.dumps(report.identity).encode())
    run_identity.check_same(out, report.identity)
    surveys = {
        checkpoints.SURVEY: report.train_survey,
        checkpoints.SURVEY_VAL: report.val_survey,
    }
    for name, survey in surveys.items():
        storage.write(storage.join(out, name), survey.to_json().encode())
    initial = storage.join(out, checkpoints.INITIAL)
    if report.initial_model is not None:
        # `create` limits the size; under the lease `write` is safe, and the network is the same
        storage.write(initial, weights.to_bytes(report.initial_model, report.train.classes))
    return PreparedRun(settings=settings, spec=build_worker_spec(settings, report, initial))


def build_worker_spec(settings: TrainingSettings, report: DataReport, initial: str) -> WorkerSpec:
    """Return what the workers need to know; `initial` is the URI of the initial network."""
    return WorkerSpec(
        experiment=settings.experiment,
        out=settings.out,
        initial=initial,
        train=report.train,
        val=report.val,
        indices=report.indices,
        class_weights=report.class_weights,
        checkpoint_every=settings.checkpoint_every,
        threads=settings.cpus,
        loaders=settings.loader_processes,
        cache_bytes=settings.cache_bytes,
    )


def initial_model(experiment: Experiment, log: Log) -> DeepLabV3:
    """Return the network before the first step: random weights by the seed, then those of `init`.

    Raises ValueError or StorageError if `init` cannot be loaded.
    """
    torch.manual_seed(experiment.seed)
    model = DeepLabV3(experiment.model)
    if experiment.init is None:
        log("the network starts from random weights; --init zoo:NAME starts from ImageNet's")
        return model
    data = weights.read(experiment.init)
    if weights.is_backbone(data, name=experiment.init):
        weights.load_backbone(model, experiment.init)
        return model
    wanted = experiment.model.num_classes
    loaded, classes = weights.load(experiment.init, data=data)
    if classes.num_classes != wanted:
        log(
            f"{experiment.init} has {classes.num_classes} classes instead of {wanted}: its last "
            "layer is reinitialized"
        )
        loaded, _ = weights.load(
            experiment.init, num_classes=wanted, reset_classifier=True, data=data
        )
    weights.copy_weights(loaded, model, experiment.init)
    return model


def _check_gpus(settings: TrainingSettings, log: Log) -> None:
    if ray_connection.has_cluster():
        return
    workers, each = settings.workers_range[0], settings.gpus_per_worker
    devices.check_gpus(workers * each, f"--gpus-per-worker {each:g} on {workers} workers")
    if not each and torch.cuda.device_count():
        log("this machine has GPUs, but training uses its CPUs; --gpus-per-worker 1 uses a GPU")


def _classes(experiment: Experiment) -> Classes:
    """Return the classes of the data. Raises ValueError if the network has another number."""
    given = experiment.data.classes
    try:
        classes = labels.get_classes(given)
    except TypeError as error:
        raise ValueError(f"--classes: {error}") from None
    wanted = experiment.model.num_classes
    if classes.num_classes != wanted:
        raise ValueError(
            f"--classes {given} has {classes.num_classes} classes, but the network has {wanted}; "
            f"give --num-classes {classes.num_classes}"
        )
    return classes


def _check_labeled(survey: Survey, val: Split) -> None:
    """Raise ValueError if val has no labeled pixel: the run would end without a score."""
    if not survey.pixels.any():
        raise ValueError(
            f"no pixel of the {len(val)} images of {val.name} is labeled, so there is no score; "
            "check --val-split and the ignore_index of the classes"
        )


def _survey(settings: TrainingSettings, split: Split, name: str, read: Read, log: Log) -> Survey:
    """Return the survey of `split` that an earlier driver stored as `name`, or make one.

    Raises SampleError if a label, or the header of its image, is invalid.
    """
    uri = storage.join(settings.out, name)
    if storage.exists(uri):
        stored = Survey.from_json(storage.read(uri).decode())
        # an early version stored no digests
        if stored.fingerprint == split.fingerprint and stored.labels_sha256:
            return stored
    if not settings.dry_run:
        _check_writable(settings.out)
    log(f"checking the labels of {len(split)} images of {split.name}")
    return survey_split(split, read, progress=_SurveyProgress(split, log))


def _check_writable(out: str) -> None:
    """Raise StorageError if nothing can be written below `out`: now, rather than after an hour."""
    probe = storage.join(out, "probe")
    storage.write(probe, b"")
    storage.delete([probe], within=out)


class _SurveyProgress:
    """A log line every `LOG_EVERY_S` of how many labels of a split have been checked."""

    def __init__(self, split: Split, log: Log) -> None:
        self._split, self._log = split, log
        self._next = time.monotonic() + LOG_EVERY_S

    def __call__(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self._next += LOG_EVERY_S
            self._log(f"checked {done} of {len(self._split)} labels of {self._split.name}")
