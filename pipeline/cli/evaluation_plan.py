"""Plan of an evaluation: from the command line to the images and the configurations."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.checks import check_at_least, flag
from pipeline.data import labels, storage
from pipeline.data.datasets import Layout, open_split
from pipeline.data.labels import Classes
from pipeline.evaluation.evaluator import EvalConfig, EvaluatorSpec
from pipeline.model import devices, weights
from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import PAPER_SCALES


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Score a checkpoint on labeled images."""

    checkpoint: str
    """Model: a file in any layout that the jobs read, or a public file, zoo:NAME."""
    data: str
    """Images and labels: s3://bucket/prefix or a folder."""
    layout: Layout = "voc"
    """Directory layout of --data."""
    split: str = "val"
    """Split to evaluate; train+val is both."""
    classes: str | None = None
    """Classes of the labels: voc, cityscapes, camvid or JSON text {"names": [...]}; by default
    those of the checkpoint."""
    scales: tuple[float, ...] = ()
    """Scales whose probabilities are averaged; 1 by default, those of the paper with --table."""
    flip: bool = False
    """Also evaluate horizontally flipped images, and average."""
    output_stride: int | None = None
    """4, 8, 16 or 32 (a cascade: up to 256); by default that of the checkpoint."""
    table: bool = False
    """Print a table like the paper's: output strides 16 and 8, then multi-scale, then flips."""
    over: tuple[str, ...] = ()
    """Names of classes over which to report another mean IoU."""
    limit: int | None = None
    """Evaluate at most this many images."""
    workers: int = 1
    """Processes that share the images; more than 1 run on Ray."""
    cpus_per_worker: int | None = None
    """CPUs and torch threads of each worker; by default the workers share this machine, and have 2
    each on a cluster."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker; 0 evaluates on the CPU."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", storage.normalize(self.data))
        for name in ("limit", "workers", "cpus_per_worker"):
            check_at_least(flag(name), getattr(self, name), 1)
        if not 0 <= self.gpus_per_worker < float("inf"):
            raise ValueError(f"--gpus-per-worker {self.gpus_per_worker}: must be at least 0")
        if self.table and (self.flip or self.output_stride is not None):
            raise ValueError(
                "--table covers flips and output strides: leave out --flip and --output-stride"
            )
        EvalConfig(scales=self.scales or (1.0,))


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """The images to evaluate, and the configurations by name.

    `over` holds the ids of the classes of the additional mean.
    """

    work: EvaluatorSpec
    indices: range
    configs: dict[str, EvalConfig]
    over: tuple[int, ...]


def plan_evaluation(arguments: EvaluateArguments) -> EvaluationPlan:
    """Return the plan for the arguments.

    Raises ValueError if they do not fit the checkpoint or the data, StorageError if one of these
    cannot be read.
    """
    _check_gpus(arguments)
    data = weights.read(arguments.checkpoint)
    model, classes = weights.load(arguments.checkpoint, data=data)
    configs = _configs(arguments, model.config)
    classes = _classes(arguments, classes)
    split = open_split(arguments.data, arguments.split, layout=arguments.layout, classes=classes)
    return EvaluationPlan(
        work=EvaluatorSpec(
            checkpoint=arguments.checkpoint,
            digest=weights.checkpoint_sha256(data),
            split=split,
            cpus=arguments.cpus_per_worker or _cpus(arguments.workers),
            gpu=arguments.gpus_per_worker > 0,
        ),
        indices=range(min(len(split), arguments.limit or len(split))),
        configs=configs,
        over=_ids(arguments.over, classes),
    )


def _check_gpus(arguments: EvaluateArguments) -> None:
    workers, each = arguments.workers, arguments.gpus_per_worker
    if not _on_cluster(workers):
        devices.check_gpus(workers * each, f"--gpus-per-worker {each:g} on {workers} workers")


def _configs(arguments: EvaluateArguments, config: ModelConfig) -> dict[str, EvalConfig]:
    """Return the configurations by name. Raises ValueError for an impossible output stride."""
    if arguments.table:
        scales = arguments.scales or PAPER_SCALES
        configs = [  # strides that every network supports
            EvalConfig(output_stride=16),
            EvalConfig(output_stride=8),
            EvalConfig(output_stride=8, scales=scales),
            EvalConfig(output_stride=8, scales=scales, flip=True),
        ]
    else:
        stride = arguments.output_stride or config.output_stride
        dataclasses.replace(config, output_stride=stride)  # checks it
        scales = arguments.scales or (1.0,)
        configs = [EvalConfig(output_stride=stride, scales=scales, flip=arguments.flip)]
    return {_name(config): config for config in configs}


def _name(config: EvalConfig) -> str:
    several = " + MS" if len(config.scales) > 1 else f" x {config.scales[0]:g}"
    name = f"OS {config.output_stride}" + (several if config.scales != (1.0,) else "")
    return name + (" + flip" if config.flip else "")


def _classes(arguments: EvaluateArguments, trained: Classes) -> Classes:
    """Return the classes of the labels. Raises ValueError if the checkpoint has another number."""
    if arguments.classes is not None:
        given = labels.get_classes(arguments.classes)
        _check_number(given, "--classes", arguments, trained)
        return given
    if arguments.layout not in labels.KNOWN_CLASSES:
        return trained
    usual = labels.KNOWN_CLASSES[arguments.layout]
    _check_number(usual, f"--layout {arguments.layout}", arguments, trained)
    # a checkpoint without class names lacks the ignore_index of its data too
    return dataclasses.replace(trained, ignore_index=usual.ignore_index)


def _check_number(
    given: Classes, what: str, arguments: EvaluateArguments, trained: Classes
) -> None:
    if given.num_classes != trained.num_classes:
        raise ValueError(
            f"{what} has {given.num_classes} classes, but {arguments.checkpoint} was trained on "
            f"{trained.num_classes}: {', '.join(trained.names[:3])}, ...; give the --classes of "
            "the labels"
        )


def _ids(names: Sequence[str], classes: Classes) -> tuple[int, ...]:
    unknown = [name for name in names if name not in classes.names]
    if unknown:
        raise ValueError(f"--over {unknown[0]!r}: the classes are {', '.join(classes.names)}")
    return tuple(dict.fromkeys(classes.names.index(name) for name in names))


def _on_cluster(workers: int) -> bool:
    """Whether the workers run on a cluster; a single worker is this process."""
    return workers > 1 and bool(os.environ.get("RAY_ADDRESS"))


def _cpus(workers: int) -> int:
    """Return the default CPUs of a worker; the size of the nodes of a cluster is not known here."""
    if _on_cluster(workers):
        return 2
    return max(1, len(os.sched_getaffinity(0)) // workers)
