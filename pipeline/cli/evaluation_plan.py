"""What an evaluation is to do: from a command line to photos, and the ways to look at them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data import labels, storage
from pipeline.data.datasets import Layout, open_split
from pipeline.data.labels import Classes
from pipeline.evaluation.evaluator import EvalConfig, EvaluatorSpec
from pipeline.model import devices, weights
from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import PAPER_SCALES


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a checkpoint on photos with labels."""

    checkpoint: str
    """The model: a file in any layout that the jobs read, or a public file, zoo:NAME."""
    data: str
    """Where the photos and labels are: s3://bucket/prefix or a folder."""
    layout: Layout = "voc"
    """How they lie there."""
    split: str = "val"
    """Which of them; train+val is both."""
    classes: str | None = None
    """What the labels' values mean: voc, cityscapes, camvid or JSON text {"names": [...]}; the
    checkpoint's own by default."""
    scales: tuple[float, ...] = ()
    """Scales whose probabilities are averaged; 1 by default, the paper's in --table."""
    flip: bool = False
    """Average over the mirrored photo too."""
    output_stride: int | None = None
    """4, 8, 16 or 32 (a cascade's up to 256); the checkpoint's own by default."""
    table: bool = False
    """The paper's kind of table: output strides 16 and 8, then several scales, then flips."""
    over: tuple[str, ...] = ()
    """Names of classes, over which there is another mean."""
    limit: int | None = None
    """Look at the first so many photos only."""
    workers: int = 1
    """Processes that share the photos; more than 1 are Ray's."""
    cpus_per_worker: int | None = None
    """CPUs and torch threads for each; by default they share this machine, and have 2 each on a
    cluster."""
    gpus_per_worker: float = 0.0
    """GPUs for each; 0 looks on the CPU."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", storage.normalize(self.data))
        for name in ("limit", "workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not 0 <= self.gpus_per_worker < float("inf"):
            raise ValueError(f"--gpus-per-worker {self.gpus_per_worker}: must be at least 0")
        if self.table and (self.flip or self.output_stride is not None):
            raise ValueError("--table looks in every way: leave out --flip and --output-stride")
        EvalConfig(scales=self.scales or (1.0,))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done: the photos, and the ways to look at them, each with its name.

    `over` are the ids of the classes of another mean.
    """

    work: EvaluatorSpec
    indices: range
    looks: dict[str, EvalConfig]
    over: tuple[int, ...]


def plan_of(arguments: Arguments) -> Plan:
    """What the arguments ask for. Raises ValueError where they do not fit checkpoint or data.

    Raises StorageError where one of these cannot be read.
    """
    _check_gpus(arguments)
    data = weights.read(arguments.checkpoint)
    model, classes = weights.load(arguments.checkpoint, data=data)
    looks = _looks(arguments, model.config)
    classes = _classes(arguments, classes)
    split = open_split(arguments.data, arguments.split, layout=arguments.layout, classes=classes)
    return Plan(
        work=EvaluatorSpec(
            checkpoint=arguments.checkpoint,
            digest=weights.checkpoint_sha256(data),
            split=split,
            cpus=arguments.cpus_per_worker or _cpus(arguments.workers),
            gpu=arguments.gpus_per_worker > 0,
        ),
        indices=range(min(len(split), arguments.limit or len(split))),
        looks=looks,
        over=_ids(arguments.over, classes),
    )


def _check_gpus(arguments: Arguments) -> None:
    workers, each = arguments.workers, arguments.gpus_per_worker
    if not _on_cluster(workers):
        devices.check_gpus(workers * each, f"--gpus-per-worker {each:g} on {workers} workers")


def _looks(arguments: Arguments, config: ModelConfig) -> dict[str, EvalConfig]:
    """The ways to look, by name. Raises ValueError on a stride that the network cannot have."""
    if arguments.table:
        scales = arguments.scales or PAPER_SCALES
        looks = [  # strides that every network has
            EvalConfig(output_stride=16),
            EvalConfig(output_stride=8),
            EvalConfig(output_stride=8, scales=scales),
            EvalConfig(output_stride=8, scales=scales, flip=True),
        ]
    else:
        stride = arguments.output_stride or config.output_stride
        dataclasses.replace(config, output_stride=stride)  # which checks it
        scales = arguments.scales or (1.0,)
        looks = [EvalConfig(output_stride=stride, scales=scales, flip=arguments.flip)]
    return {_name(look): look for look in looks}


def _name(look: EvalConfig) -> str:
    several = " + MS" if len(look.scales) > 1 else f" x {look.scales[0]:g}"
    name = f"OS {look.output_stride}" + (several if look.scales != (1.0,) else "")
    return name + (" + flip" if look.flip else "")


def _classes(arguments: Arguments, trained: Classes) -> Classes:
    """What the labels mean. Raises ValueError where the checkpoint knows another number."""
    if arguments.classes is not None:
        meant = labels.get_classes(arguments.classes)
        _check_number(meant, "--classes", arguments, trained)
        return meant
    if arguments.layout not in labels.KNOWN_CLASSES:
        return trained
    usual = labels.KNOWN_CLASSES[arguments.layout]
    _check_number(usual, f"--layout {arguments.layout}", arguments, trained)
    # files that say nothing of their classes come without their data's ignore_index too
    return dataclasses.replace(trained, ignore_index=usual.ignore_index)


def _check_number(meant: Classes, what: str, arguments: Arguments, trained: Classes) -> None:
    if meant.num_classes != trained.num_classes:
        raise ValueError(
            f"{what} has {meant.num_classes} classes, but {arguments.checkpoint} was trained on "
            f"{trained.num_classes}: {', '.join(trained.names[:3])}, ...; give --classes for "
            "labels that mean these"
        )


def _ids(names: Sequence[str], classes: Classes) -> tuple[int, ...]:
    unknown = [name for name in names if name not in classes.names]
    if unknown:
        raise ValueError(f"--over {unknown[0]!r}: the classes are {', '.join(classes.names)}")
    return tuple(dict.fromkeys(classes.names.index(name) for name in names))


def _on_cluster(workers: int) -> bool:
    """Whether they are not this machine's: a single one is this process."""
    return workers > 1 and bool(os.environ.get("RAY_ADDRESS"))


def _cpus(workers: int) -> int:
    """CPUs a worker where nobody asked: on a cluster this machine says nothing of the others."""
    if _on_cluster(workers):
        return 2
    return max(1, len(os.sched_getaffinity(0)) // workers)
