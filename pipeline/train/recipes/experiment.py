"""What an experiment is: every value that decides what a training run computes.

Enters: a recipe and flags. Leaves: frozen, checked values; `Experiment.to_json` is what a run is
known by, so that going on with another experiment can be refused. Defaults are the paper's; one
that is ours says why. Source: arXiv 1706.05587, Sec. 4.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.data.datasets import Layout
from pipeline.model.config import MAX_SCALE, ModelConfig

ClassWeights = Literal["none", "median_frequency"]

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which photos: the layout below --data, the classes, the splits, what is repeated."""

    layout: Layout = "voc"
    """How photos and labels lie below --data."""
    classes: str = "voc"
    """voc, cityscapes, camvid, or JSON text {"names": [...]}."""
    train_split: str = "trainaug"
    """Its photos are learned from."""
    val_split: str = "val"
    """Its photos are measured on."""
    repeat_classes: tuple[str, ...] = ()
    """A photo that holds one of them is repeated (the paper's bootstrapping)."""
    repeats: int = 2
    """How often the training set has such a photo."""

    def __post_init__(self) -> None:
        _at_least("repeats", self.repeats, 1, "1 repeats nothing")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What a photo goes through on its way into a batch: scale, crop, mirror."""

    crop_size: tuple[int, int] = (513, 513)
    """Height and width of a crop."""
    late_crop_size: tuple[int, int] | None = None
    """That of the last steps (ours): small crops are cheap, large ones fit the test."""
    late_from: float = 0.75
    """The share of all steps after which crops are the late ones."""
    min_scale: float = 0.5
    """A photo is made this much smaller at most."""
    max_scale: float = 2.0
    """A photo is made this much larger at most."""
    mirror: bool = True
    """Mirror half of the photos, left to right."""

    def __post_init__(self) -> None:
        for name in ("crop_size", "late_crop_size"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes) < 1:
                raise ValueError(f"{name} is {sizes}; give height and width, each at least 1")
        if not 0 < self.min_scale <= self.max_scale <= MAX_SCALE:
            raise ValueError(
                f"min_scale {self.min_scale} and max_scale {self.max_scale}: give "
                f"0 < min_scale <= max_scale <= {MAX_SCALE:g}"
            )
        _share("late_from", self.late_from)

    def crop_at(self, step: int, max_steps: int) -> tuple[int, int]:
        """The crop (height, width) of the batch at `step`, counted from 0."""
        late = self.late_crop_size is not None and step >= self.late_from * max_steps
        return self.late_crop_size if late and self.late_crop_size else self.crop_size

    def steps_like(self, step: int, max_steps: int) -> float:
        """The steps from `step` on, counted in such as that one: larger crops cost more."""
        pixels = [math.prod(self.crop_at(each, max_steps)) for each in range(step, max_steps)]
        return sum(pixels) / pixels[0] if pixels else 0.0


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """SGD with the poly schedule, and the loss that it makes smaller."""

    max_steps: int = 30_000
    """The schedule ends here."""
    batch_size: int = 16
    """Photos in a step, of all workers together."""
    micro_batch: int | None = None
    """Photos of a worker in the network at a time; gradients add up to the batch."""
    base_lr: float = 0.007
    """The rate of the first step."""
    power: float = 0.9
    """The rate falls as (1 - step / max_steps) to this power."""
    head_lr_factor: float = 1.0
    """Multiplies the rate of the freshly made head (ours; 1 is the paper)."""
    momentum: float = 0.9
    """SGD's. The paper states none: this is the authors' code."""
    weight_decay: float = 1e-4
    """Of all weights. The paper states none: this is the authors' code for ResNet."""
    bn_momentum: float = 0.0003
    """The share of a batch in the running statistics (torch's sense: 1 - the paper's decay)."""
    freeze_bn: bool = False
    """Leave batch normalisation as it was loaded (the paper's second stage)."""
    upsample_logits: bool = True
    """Take the loss at the labels' resolution; else at that of the features (Table 8)."""
    class_weights: ClassWeights = "none"
    """median_frequency makes rare classes count more."""
    hard_share: float = 1.0
    """The share of the valid pixels that count, the hardest; 1 is all."""
    auxiliary_weight: float = 0.4
    """Of the auxiliary head's loss, where the network has one."""
    ema_decay: float = 0.0
    """Of a moving average of the weights, which is then evaluated and kept; 0 keeps none."""
    bf16: bool = True
    """Train in bf16 where the hardware has it."""

    def __post_init__(self) -> None:
        _at_least("max_steps", self.max_steps, 1, "a run needs a step")
        _at_least("batch_size", self.batch_size, 1, "it is the batch of all workers together")
        if self.micro_batch is not None:
            _at_least("micro_batch", self.micro_batch, 1, "leave it out to take a whole batch")
        for name in ("base_lr", "power", "head_lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be over 0 and finite")
        for name in ("weight_decay", "auxiliary_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be finite and at least 0: 0 is none"
                )
        if not 0 < self.hard_share <= 1:
            raise ValueError(f"hard_share is {self.hard_share}; give a share over 0, 1 keeps all")
        for name in ("momentum", "bn_momentum", "ema_decay"):
            _share(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the network is measured on val."""

    eval_every: int = 0
    """Steps between measurements; 0 measures at the end alone."""
    eval_output_stride: int | None = None
    """The network's in measuring, if not that in training."""
    eval_scales: tuple[float, ...] = (1.0,)
    """Sizes at which a photo is seen; probabilities are averaged."""
    eval_flip: bool = False
    """See each size mirrored too."""

    def __post_init__(self) -> None:
        _at_least("eval_every", self.eval_every, 0, "0 evaluates at the end alone")
        if not self.eval_scales or not all(0 < scale <= MAX_SCALE for scale in self.eval_scales):
            raise ValueError(
                f"eval_scales is {self.eval_scales}; give some, each over 0 and at most "
                f"{MAX_SCALE:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides what a training run computes: network, photos, schedule, evaluation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None
    """The weight file to start from: a backbone's (ImageNet) or a whole checkpoint, whose
    classifier is made anew where its classes are others. `zoo:NAME` is a public file."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """Of crops, mirrors, dropout and the order of photos."""

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
