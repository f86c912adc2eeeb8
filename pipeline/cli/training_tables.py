"""Text for training runs: the plan that a dry run prints, and the scores at the end."""

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
    """Return the resolved recipe, the splits, the class frequencies and the estimated time."""
    experiment = settings.experiment
    values = dict(_values(experiment, found.report))
    width = max(map(len, values))
    steps = f"{experiment.optimizer.max_steps} steps of {found.step_s:.2f} s"
    steps += f" ({found.wait_share:.0%} of it waiting for images)"
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
            f"about {duration(found.seconds)} without evaluation: {steps},",
            "measured over ten steps here on one worker's part of the batch",
        ]
    )


def flags(part: Any) -> list[str]:
    """Return every value of the dataclass `part` and of those in it as a flag."""
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


def final_scores(record: Mapping[str, Any]) -> str:
    """Return the final IoU of each class on val, in percent, one per line."""
    if not record["last"]:
        return "val was not evaluated"
    ious = dict(zip(record["classes"], record["last"]["ious"], strict=True))
    width = max(map(len, ("IoU, %", *ious)))
    lines = [f"{'IoU, %':<{width}}  after step {record['last']['step']}"]
    for name, iou in {**ious, "mean": record["last"]["miou"]}.items():
        lines.append(f"{name:<{width}}  {'-' if iou is None else format(100 * iou, '.2f'):>6}")
    if None in ious.values():
        lines.append("-: in no label and no mask; left out of the mean")
    return "\n".join(lines)


def _values(experiment: Experiment, report: DataReport) -> Iterator[tuple[str, str]]:
    """Yield name and value of what matters before hours of training."""
    data, augment, config = experiment.data, experiment.augment, experiment.optimizer
    yield "network", _network(experiment.model)
    yield "starts from", experiment.init or "random weights"
    yield "train", f"{data.train_split}, {_images(report, data.repeat_classes)}"
    yield "val", f"{data.val_split}, {len(report.val)} images"
    crop = _size(augment.crop_size)
    if augment.late_crop_size is not None:
        crop += f", from {augment.late_from:.0%} of the steps on {_size(augment.late_crop_size)}"
    mirrored = ", mirrored" if augment.mirror else ""
    yield "crop", f"{crop}, scaled {augment.min_scale:g} to {augment.max_scale:g}{mirrored}"
    epochs = config.max_steps * config.batch_size / len(report.indices)
    yield "steps", f"{config.max_steps} of {config.batch_size} images ({epochs:.1f} epochs)"
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


def _images(report: DataReport, repeat_classes: tuple[str, ...]) -> str:
    images, entries = len(report.train), len(report.indices)
    if entries == images:
        return f"{images} images"
    return f"{images} images ({entries} with those of {', '.join(repeat_classes)} repeated)"


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


def _frequencies(report: DataReport) -> Iterator[str]:
    """Yield the share of labeled pixels of each class, and the number of images that contain it."""
    survey, names = report.train_survey, report.train.classes.names
    total = max(1, int(survey.pixels.sum()))
    width = max(map(len, ("class", *names)))
    yield f"{'class':<{width}}  pixels, %  images"
    for name, pixels, images in zip(names, survey.pixels, survey.holds.sum(axis=0), strict=True):
        yield f"{name:<{width}}  {100 * pixels / total:>9.2f}  {images:>6}"


def _command(words: list[str]) -> Iterator[str]:
    """Yield the words as lines of a shell command, of at most WIDTH columns where possible."""
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
