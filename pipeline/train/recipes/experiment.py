"""An experiment: every value that decides what a training run computes.

Frozen, validated dataclasses. `Experiment.to_json` is stored with a run, so that resuming it with
another experiment is refused. Defaults are the paper's (arXiv 1706.05587, Sec. 4); one that is not
says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.checks import check_at_least, check_fraction, flag
from pipeline.data.datasets import Layout
from pipeline.model.config import MAX_SCALE, ModelConfig

ClassWeights = Literal["none", "median_frequency"]

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data: layout, classes, splits, and which images are repeated."""

    layout: Layout = "voc"
    """Directory layout of the images and labels under --data."""
    classes: str = "voc"
    """voc, cityscapes, camvid, or JSON text {"names": [...]}."""
    train_split: str = "trainaug"
    """Split used for training."""
    val_split: str = "val"
    """Split used for validation."""
    repeat_classes: tuple[str, ...] = ()
    """Images with one of these classes are repeated (the paper's bootstrapping)."""
    repeats: int = 2
    """How many times each of these images is in the training set."""

    def __post_init__(self) -> None:
        check_at_least(flag("repeats"), self.repeats, 1, "1 repeats nothing")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Data augmentation: random scale, crop and horizontal flip."""

    crop_size: tuple[int, int] = (513, 513)
    """Height and width of a crop."""
    late_crop_size: tuple[int, int] | None = None
    """Crop size for the last steps (not in the paper): small crops are cheap, large ones match
    the images at test time."""
    late_from: float = 0.75
    """The fraction of all steps after which --late-crop-size is used."""
    min_scale: float = 0.5
    """Smallest factor by which an image is resized."""
    max_scale: float = 2.0
    """Largest factor by which an image is resized."""
    mirror: bool = True
    """Flip half of the images horizontally."""

    def __post_init__(self) -> None:
        for name in ("crop_size", "late_crop_size"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes) < 1:
                raise ValueError(
                    f"{flag(name)} {_joined(sizes)}: give height and width, each at least 1"
                )
        if not 0 < self.min_scale <= self.max_scale <= MAX_SCALE:
            raise ValueError(
                f"--min-scale {self.min_scale:g} --max-scale {self.max_scale:g}: must be "
                f"0 < min-scale <= max-scale <= {MAX_SCALE:g}"
            )
        check_fraction(flag("late_from"), self.late_from)

    def crop_at(self, step: int, max_steps: int) -> tuple[int, int]:
        """Return the crop (height, width) of the batch at `step`, counted from 0."""
        late = self.late_crop_size is not None and step >= self.late_from * max_steps
        return self.late_crop_size if late and self.late_crop_size else self.crop_size

    def steps_like(self, step: int, max_steps: int) -> float:
        """Return the cost of the steps from `step` on, in units of that step (cost ~ pixels)."""
        pixels = [math.prod(self.crop_at(each, max_steps)) for each in range(step, max_steps)]
        return sum(pixels) / pixels[0] if pixels else 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with the poly schedule, and the loss that it minimizes."""

    max_steps: int = 30_000
    """Number of training steps, and the length of the schedule."""
    batch_size: int = 16
    """Images per step, over all workers."""
    micro_batch: int | None = None
    """Images per worker and forward pass; gradients are accumulated over the batch."""
    base_lr: float = 0.007
    """Initial learning rate."""
    power: float = 0.9
    """The learning rate decays as (1 - step / max_steps) to this power."""
    head_lr_factor: float = 1.0
    """Multiplies the learning rate of the newly initialized head (not in the paper; 1 is the
    paper's)."""
    momentum: float = 0.9
    """Momentum of SGD. The paper does not state it; this is the authors' code."""
    weight_decay: float = 1e-4
    """Weight decay of all weights. The paper does not state it; this is the authors' code for
    ResNet."""
    bn_momentum: float = 0.0003
    """Weight of a batch in the running statistics (as in torch: 1 - the paper's decay)."""
    freeze_bn: bool = False
    """Keep batch normalization as it was loaded (the paper's second stage)."""
    upsample_logits: bool = True
    """Compute the loss at the labels' resolution instead of the features' (Table 8)."""
    class_weights: ClassWeights = "none"
    """median_frequency gives rare classes a higher weight in the loss."""
    hard_share: float = 1.0
    """Fraction of the valid pixels, the hardest, that the loss is computed on; 1 is all."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss, if the network has one."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved; 0 keeps none."""
    bf16: bool = True
    """Train in bf16 where the hardware supports it."""

    def __post_init__(self) -> None:
        check_at_least(flag("max_steps"), self.max_steps, 1)
        check_at_least(flag("batch_size"), self.batch_size, 1, "it is the batch of all workers")
        check_at_least(
            flag("micro_batch"), self.micro_batch, 1, "leave it out for one pass per batch"
        )
        for name in ("base_lr", "power", "head_lr_factor"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} {value:g}: must be over 0 and finite")
        for name in ("weight_decay", "auxiliary_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"{flag(name)} {value:g}: must be at least 0 and finite; 0 turns it off"
                )
        if not 0 < self.hard_share <= 1:
            raise ValueError(
                f"--hard-share {self.hard_share:g}: must be over 0 and at most 1; 1 keeps all "
                "pixels"
            )
        for name in ("momentum", "bn_momentum", "ema_decay"):
            check_fraction(flag(name), getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the validation split."""

    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_output_stride: int | None = None
    """Output stride in evaluation; the same as in training by default."""
    eval_scales: tuple[float, ...] = (1.0,)
    """Scales at which each image is evaluated; probabilities are averaged."""
    eval_flip: bool = False
    """Also evaluate horizontally flipped images."""

    def __post_init__(self) -> None:
        check_at_least(flag("eval_every"), self.eval_every, 0, "0 evaluates at the end only")
        if not self.eval_scales or not all(0 < scale <= MAX_SCALE for scale in self.eval_scales):
            raise ValueError(
                f"--eval-scales {_joined(self.eval_scales) or 'without a value'}: give one or "
                f"more, each over 0 and at most {MAX_SCALE:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides what a training run computes: network, data, schedule, evaluation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None
    """Weights to start from: a backbone (ImageNet) or a whole checkpoint, whose classifier is
    reinitialized if its number of classes differs. `zoo:NAME` is a public file."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """Seed of crops, flips, dropout and the order of images."""

    def __post_init__(self) -> None:
        check_at_least(flag("seed"), self.seed, 0)
        if self.model.auxiliary and not self.optimizer.upsample_logits:
            raise ValueError(
                "--no-upsample-logits with --auxiliary: the auxiliary head is trained on "
                "upsampled logits; give --no-auxiliary"
            )
        stride = self.evaluation.eval_output_stride
        if stride is not None:
            try:
                dataclasses.replace(self.model, output_stride=stride)
            except ValueError as error:
                raise ValueError(f"--eval-output-stride {stride}: {error}") from None

    def to_json(self) -> str:
        """Return this experiment as one line of JSON: equal lines are equal experiments."""
        values = dataclasses.asdict(self)
        stored = {_STORED_NAMES.get(name, name): value for name, value in values.items()}
        return json.dumps(stored, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """Return the experiment that `to_json` wrote; a field that an older version lacked gets
        its default.

        Raises ValueError if `text` is not an experiment, or has fields this version does not know.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"experiment is not valid JSON: {error}") from None
        fields = _known_fields(cls, values, "experiment")
        if "model" in fields:
            fields["model"] = ModelConfig.from_json(json.dumps(fields["model"]))
        try:
            for name, part in _PARTS.items():
                if name in fields:
                    what = _STORED_NAMES.get(name, name)
                    fields[name] = part(**_known_fields(part, fields[name], what))
        except TypeError as error:
            raise ValueError(f"experiment has a value of the wrong type: {error}") from None
        return cls(**fields)


_PARTS: dict[str, type] = {
    "data": DataConfig,
    "augment": AugmentConfig,
    "optimizer": OptimizerConfig,
    "evaluation": EvaluationConfig,
}

# fields that run.json and the identity of a run store under another name
_STORED_NAMES = {"optimizer": "optimiser"}


def _known_fields(part: type, values: Any, what: str) -> dict[str, Any]:
    """Return the fields of `part` in `values`, as parsed from JSON; lists become tuples."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(values).__name__}")
    stored = {
        _STORED_NAMES.get(entry.name, entry.name): entry.name for entry in dataclasses.fields(part)
    }
    unknown = sorted(set(values) - set(stored))
    if unknown:
        raise ValueError(
            f"{what} has unknown fields {unknown}; known fields are {list(stored)}; was it written "
            "by a newer version?"
        )
    return {
        stored[key]: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }


def differences(mine: str, theirs: str) -> list[str]:
    """Return the differences between two JSON objects, each as `field: mine here, theirs there`.

    A missing field differs from every value, including null.
    """
    flat_mine, flat_theirs = _flat(json.loads(mine)), _flat(json.loads(theirs))
    return [
        f"{name}: {_shown(flat_mine, name)} here, {_shown(flat_theirs, name)} there"
        for name in sorted(set(flat_mine) | set(flat_theirs))
        if name not in flat_mine or name not in flat_theirs or flat_mine[name] != flat_theirs[name]
    ]


def _shown(flat: dict[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "missing"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _joined(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
