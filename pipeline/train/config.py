"""What an experiment is: every value that decides what a training run computes.

Enters: a recipe and flags. Leaves: frozen, checked values; `Experiment.to_json` is what a run is
known by, so that going on with another experiment can be refused. Defaults are the paper's; one
that is ours says why. Source: arXiv 1706.05587, Sec. 4.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.data.datasets import Layout
from pipeline.model.config import ModelConfig

ClassWeights = Literal["none", "median_frequency"]

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which photos: the layout below --data, the classes, the splits, what is repeated.

    `classes` is voc, cityscapes, camvid, or JSON text {"names": [...]}. A photo that holds one of
    `repeat_classes` is in the training set `repeats` times (the paper's bootstrapping).
    """

    layout: Layout = "voc"
    classes: str = "voc"
    train_split: str = "trainaug"
    val_split: str = "val"
    repeat_classes: tuple[str, ...] = ()
    repeats: int = 2

    def __post_init__(self) -> None:
        _at_least("repeats", self.repeats, 1, "1 repeats nothing")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What a photo goes through on its way into a batch: scale, crop, mirror.

    `crop_size` is (height, width). From the share `late_from` of all steps on, crops are of
    `late_crop_size` where that is given: small crops are cheap, large ones fit the test (ours).
    """

    crop_size: tuple[int, int] = (513, 513)
    late_crop_size: tuple[int, int] | None = None
    late_from: float = 0.75
    min_scale: float = 0.5
    max_scale: float = 2.0
    mirror: bool = True

    def __post_init__(self) -> None:
        for name in ("crop_size", "late_crop_size"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes) < 1:
                raise ValueError(f"{name} is {sizes}; give height and width, each at least 1")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"min_scale {self.min_scale} and max_scale {self.max_scale}: give "
                "0 < min_scale <= max_scale"
            )
        _share("late_from", self.late_from)

    def crop_at(self, step: int, max_steps: int) -> tuple[int, int]:
        """The crop (height, width) of the batch at `step`, counted from 0."""
        late = self.late_crop_size is not None and step >= self.late_from * max_steps
        return self.late_crop_size if late and self.late_crop_size else self.crop_size


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """SGD with the poly schedule, and the loss that it makes smaller.

    `batch_size` is the global batch, whatever the number of workers; where it does not fit,
    `micro_batch` images of a worker go through the network at a time and gradients add up.
    `head_lr_factor` multiplies the rate of the freshly made head (ours: 1 is the paper).
    `upsample_logits` False takes the loss at feature resolution with labels downsampled (Table 8).
    `hard_share` keeps that share of the valid pixels, the hardest, in the loss; 1 keeps all.
    `ema_decay` 0 keeps no moving average of the weights. `bn_momentum` is torch's: 1 - decay.
    """

    max_steps: int = 30_000
    batch_size: int = 16
    micro_batch: int | None = None
    base_lr: float = 0.007
    power: float = 0.9
    head_lr_factor: float = 1.0
    # The paper states neither; the authors' code for ResNet.
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bn_momentum: float = 0.0003
    freeze_bn: bool = False
    upsample_logits: bool = True
    class_weights: ClassWeights = "none"
    hard_share: float = 1.0
    auxiliary_weight: float = 0.4
    ema_decay: float = 0.0
    bf16: bool = True

    def __post_init__(self) -> None:
        _at_least("max_steps", self.max_steps, 1, "a run needs a step")
        _at_least("batch_size", self.batch_size, 1, "it is the batch of all workers together")
        if self.micro_batch is not None:
            _at_least("micro_batch", self.micro_batch, 1, "leave it out to take a whole batch")
        for name in ("base_lr", "power", "head_lr_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be over 0")
        if not 0 < self.hard_share <= 1:
            raise ValueError(f"hard_share is {self.hard_share}; give a share over 0, 1 keeps all")
        for name in ("momentum", "bn_momentum", "ema_decay"):
            _share(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How val is looked at, every `eval_every` steps and at the end; 0 is at the end alone."""

    eval_every: int = 0
    eval_output_stride: int | None = None
    eval_scales: tuple[float, ...] = (1.0,)
    eval_flip: bool = False

    def __post_init__(self) -> None:
        _at_least("eval_every", self.eval_every, 0, "0 evaluates at the end alone")
        if not self.eval_scales or not all(scale > 0 for scale in self.eval_scales):
            raise ValueError(f"eval_scales is {self.eval_scales}; give some, each over 0")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides what a training run computes: network, photos, schedule, evaluation.

    `init` is the weight file to start from: a backbone's (ImageNet) or a whole checkpoint, whose
    classifier is made anew where its classes are others. `zoo:NAME` is a public file.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0, "numpy's generators take no other")
        if self.model.auxiliary and not self.optimiser.upsample_logits:
            raise ValueError(
                "upsample_logits is False, but the auxiliary head is trained on upsampled logits: "
                "give auxiliary=False"
            )
        stride = self.evaluation.eval_output_stride
        if stride is not None:
            try:
                dataclasses.replace(self.model, output_stride=stride)
            except ValueError as error:
                raise ValueError(f"eval_output_stride is {stride}: {error}") from None

    def to_json(self) -> str:
        """This experiment as one line of JSON: equal lines are equal experiments."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """The experiment that `to_json` wrote, or an older version of it, which lacks fields.

        Raises ValueError where it is not one.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"experiment is no JSON: {error}") from None
        fields = _known(cls, values, "experiment")
        if "model" in fields:
            fields["model"] = ModelConfig.from_json(json.dumps(fields["model"]))
        try:
            for name, part in _PARTS.items():
                if name in fields:
                    fields[name] = part(**_known(part, fields[name], name))
        except TypeError as error:
            raise ValueError(f"experiment has a value of another type: {error}") from None
        return cls(**fields)


_PARTS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "optimiser": OptimiserConfig,
    "evaluation": EvaluationConfig,
}


def _known(part: type, values: Any, what: str) -> dict[str, Any]:
    """The values of `part`'s fields as JSON gave them, lists as tuples."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(values).__name__}")
    known = [entry.name for entry in dataclasses.fields(part)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{what} has unknown fields {unknown}, known are {known}; was it written by a newer "
            "version?"
        )
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }


def differences(mine: str, theirs: str) -> list[str]:
    """What differs between two experiments' JSON, as `field: mine, theirs`; [] for nothing."""
    flat_mine, flat_theirs = _flat(json.loads(mine)), _flat(json.loads(theirs))
    return [
        f"{name}: {flat_mine.get(name)!r} here, {flat_theirs.get(name)!r} there"
        for name in sorted(set(flat_mine) | set(flat_theirs))
        if flat_mine.get(name) != flat_theirs.get(name)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _at_least(name: str, value: int, least: int, hint: str) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}: {hint}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
