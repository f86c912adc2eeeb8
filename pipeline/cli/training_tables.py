"""What a person reads of a training run: before it, what it would do, and at its end its score."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cli.progress import duration
from pipeline.model.config import ModelConfig
from pipeline.train.driver.estimate import TrainingEstimate
from pipeline.train.driver.preflight import DataReport
from pipeline.train.recipes.experiment import EvaluationConfig, Experiment, OptimizerConfig
from pipeline.train.recipes.recipe import WIDTH, Recipe
from pipeline.train.settings import TrainingSettings


def dry_run(recipe: Recipe, settings: TrainingSettings, found: TrainingEstimate) -> str:
    """The resolved recipe, the splits, how frequent each class is, and how long it would take."""
    experiment = settings.experiment
    values = dict(_values(experiment, found.report))
    width = max(map(len, values))
    steps = f"{experiment.optimizer.max_steps} steps of {found.step_s:.2f} s"
    steps += f" ({found.wait_share:.0%} of it waiting for photos)"
    return "\n".join(
        [
            f"recipe {recipe.name} ({recipe.source}): {recipe.about}",
            *(f"  {name:<{width}}  {value}" for name, value in values.items()),
            "",
            *_frequencies(found.report),
            "",
            "every value of the experiment, as flags:",
            *_command(flags(experiment)),
            "",
            f"about {duration(found.seconds)}, evaluation apart: {steps},",
            "as ten of them took here on one worker's part of the batch",
        ]
    )


def flags(part: Any) -> list[str]:
    """Every value of the dataclass `part` and those in it, each as the flag that gives it."""
    found = []
    for entry in dataclasses.fields(part):
        value, name = getattr(part, entry.name), entry.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += flags(value)
        elif isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            words = map(str, value) if isinstance(value, tuple) else [str(value)]
            found.append(shlex.join([f"--{name}", *words]))
    return found


def class_table(record: Mapping[str, Any]) -> str:
    """Per-class IoU on val at the end, in percent, a line a class."""
    if not record["last"]:
        return "val was not looked at"
    ious = dict(zip(record["classes"], record["last"]["ious"], strict=True))
    width = max(map(len, ("IoU, %", *ious)))
    lines = [f"{'IoU, %':<{width}}  after step {record['last']['step']}"]
    for name, iou in {**ious, "mean": record["last"]["miou"]}.items():
        lines.append(f"{name:<{width}}  {'-' if iou is None else format(100 * iou, '.2f'):>6}")
    if None in ious.values():
        lines.append("-: neither in a label nor in a mask, and not in the mean")
    return "\n".join(lines)


def _values(experiment: Experiment, looked: DataReport) -> Iterator[tuple[str, str]]:
    """Name and value of what a person would want to see before hours of training."""
    data, augment, config = experiment.data, experiment.augment, experiment.optimizer
    yield "network", _network(experiment.model)
    yield "starts from", experiment.init or "random weights"
    yield "train", f"{data.train_split}, {_photos(looked, data.repeat_classes)}"
    yield "val", f"{data.val_split}, {len(looked.val)} photos"
    crop = _size(augment.crop_size)
    if augment.late_crop_size is not None:
        crop += f", from {augment.late_from:.0%} of the steps on {_size(augment.late_crop_size)}"
    mirrored = ", mirrored" if augment.mirror else ""
    yield "crop", f"{crop}, scaled {augment.min_scale:g} to {augment.max_scale:g}{mirrored}"
    epochs = config.max_steps * config.batch_size / len(looked.indices)
    yield "steps", f"{config.max_steps} of {config.batch_size} photos ({epochs:.1f} epochs)"
    yield "lr", _rate(config)
    yield "batch norm", "frozen" if config.freeze_bn else f"momentum {config.bn_momentum:g}"
    yield "loss", _loss(config)
    if config.ema_decay:
        yield "average", f"of the weights, decay {config.ema_decay:g}"
    yield "precision", "bf16 where it is fast" if config.bf16 else "fp32"
    yield "evaluation", _evaluation(experiment.evaluation)
    yield "seed", str(experiment.seed)


def _network(model: ModelConfig) -> str:
    parts = [model.backbone, f"output stride {model.output_stride}"]
    parts.append("decoder" if model.decoder else model.head)
    if model.head == "aspp":
        parts.append(f"rates {' '.join(map(str, model.rates)) or 'none'}")
    return ", ".join([*parts, f"{model.num_classes} classes"])


def _photos(looked: DataReport, repeat_classes: tuple[str, ...]) -> str:
    photos, entries = len(looked.train), len(looked.indices)
    if entries == photos:
        return f"{photos} photos"
    return f"{photos} photos ({entries} with those of {', '.join(repeat_classes)} repeated)"


def _rate(config: OptimizerConfig) -> str:
    head = f", the head's {config.head_lr_factor:g} times" if config.head_lr_factor != 1 else ""
    return (
        f"{config.base_lr:g}{head}, power {config.power:g}, momentum {config.momentum:g}, "
        f"weight decay {config.weight_decay:g}"
    )


def _loss(config: OptimizerConfig) -> str:
    parts = ["all pixels" if config.hard_share == 1 else f"hardest {config.hard_share:.0%}"]
    if config.class_weights != "none":
        parts.append("median-frequency class weights")
    if not config.upsample_logits:
        parts.append("at feature resolution")
    return ", ".join(parts)


def _evaluation(config: EvaluationConfig) -> str:
    when = f"every {config.eval_every} steps" if config.eval_every else "at the end"
    stride = config.eval_output_stride
    parts = [when, *([f"output stride {stride}"] if stride else [])]
    parts.append("scales " + " ".join(f"{scale:g}" for scale in config.eval_scales))
    return ", ".join([*parts, *(["flip"] if config.eval_flip else [])])


def _frequencies(looked: DataReport) -> Iterator[str]:
    """How much of the labelled pixels each class has, and in how many photos to train on it is."""
    survey, names = looked.train_survey, looked.train.classes.names
    total = max(1, int(survey.pixels.sum()))
    width = max(map(len, ("class", *names)))
    yield f"{'class':<{width}}  pixels, %  photos"
    for name, pixels, photos in zip(names, survey.pixels, survey.holds.sum(axis=0), strict=True):
        yield f"{name:<{width}}  {100 * pixels / total:>9.2f}  {photos:>6}"


def _command(words: list[str]) -> Iterator[str]:
    """The words as a shell takes them, in lines of at most 100 columns where they are shorter."""
    line = " "
    for word in words:
        if len(f"{line} {word} \\") > WIDTH and line != " ":
            yield f"{line} \\"
            line = " "
        line += f" {word}"
    yield line


def _size(size: tuple[int, int]) -> str:
    height, width = size
    return f"{height} x {width}"
