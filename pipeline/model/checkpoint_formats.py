"""Published checkpoint formats: detects them by names and shapes of the weights.

Our names are torchvision's and those of VainF's DeepLabv3+; VainF's DeepLabv3 has its head one
level deeper. No file states its output stride, rates or dropout: each format has its authors'
values as defaults.
"""

import re
from dataclasses import dataclass

import torch

from pipeline.model import frozen_graph
from pipeline.model.config import Backbone, ModelConfig
from pipeline.model.formats import CheckpointError, TensorFile
from pipeline.text import first_names

State = dict[str, torch.Tensor]

TRAINING_KEY = "deeplab-training"
"""Metadata key of a training checkpoint, which holds more than a network."""

RATES = (6, 12, 18)
"""At output stride 16, so 12, 24, 36 at 8: all of them were trained with these."""

RESNETS: dict[tuple[int, bool], Backbone] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
}
"""By the number of units in layer3, and whether they are bottlenecks."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """The names of ASPP and logits in a family of files, and values that the files do not state.

    All of them have torchvision's backbone, and one 3x3 convolution before the logits.
    """

    aspp: str
    logits: str
    decoder: bool = False
    output_stride: int
    dropout: float
    renamed: tuple[str, str] = ("", "")
    """Prefix of their names, and ours in its place."""


CHECKPOINT_FORMATS = (
    # torchvision.models.segmentation
    CheckpointFormat(aspp="classifier.0", logits="classifier.4", output_stride=8, dropout=0.5),
    # VainF/DeepLabV3Plus-Pytorch, deeplabv3_resnet*
    CheckpointFormat(
        aspp="classifier.classifier.0",
        logits="classifier.classifier.4",
        output_stride=16,
        dropout=0.1,
        renamed=("classifier.classifier.", "classifier."),
    ),
    # VainF/DeepLabV3Plus-Pytorch, deeplabv3plus_resnet*: its decoder has one 3x3 convolution
    CheckpointFormat(
        aspp="classifier.aspp",
        logits="classifier.classifier.3",
        decoder=True,
        output_stride=16,
        dropout=0.1,
    ),
)


def detect_format(
    file: TensorFile, *, name: str, atrous_rates: tuple[int, ...] | None = None
) -> tuple[ModelConfig, State]:
    """Return config and state_dict of a file in torchvision's, VainF's or the zoo's format.

    `atrous_rates` (at output stride 16) replace the format's default. Raises CheckpointError if
    the format is unknown or not supported.
    """
    if TRAINING_KEY in file.metadata:
        raise CheckpointError(
            f"{name} is a training checkpoint, not a network: give the run's model.safetensors or "
            "best.safetensors, next to its checkpoints folder"
        )
    if file.npz:
        if atrous_rates:
            raise CheckpointError(
                f"{name} has no atrous branches: leave out atrous_rates {atrous_rates}"
            )
        config = frozen_graph.read_config(file.tensors, name)
        return config, frozen_graph.read_state(file.tensors, name)
    spec = _match_format(file.tensors, name)
    config = _build_config(spec, file.tensors, name, atrous_rates)
    theirs, ours = spec.renamed
    state = {
        ours + key.removeprefix(theirs) if theirs and key.startswith(theirs) else key: tensor
        for key, tensor in file.tensors.items()
    }
    return config, state


def _match_format(tensors: State, name: str) -> CheckpointFormat:
    if any(key.startswith("backbone.low_level_features.") for key in tensors):
        raise CheckpointError(
            f"{name} is VainF's MobileNetV2, which is not supported: it pads before the 1x1 "
            "expansion, so that its borders carry the normalization's bias; its ResNets load"
        )
    for spec in CHECKPOINT_FORMATS:
        logits = tensors.get(f"{spec.logits}.weight")
        found = f"{spec.aspp}.convs.0.0.weight" in tensors
        if found and logits is not None and logits.ndim == 4:
            return spec
    raise CheckpointError(
        f"{name} has no known checkpoint format (first names: {first_names(sorted(tensors))}); "
        "if it is an ImageNet backbone, use load_backbone"
    )


def _build_config(
    spec: CheckpointFormat, tensors: State, name: str, atrous_rates: tuple[int, ...] | None
) -> ModelConfig:
    """Return the config from names and shapes, and the format's defaults."""
    branches = _branches(tensors, spec.aspp)
    rates = RATES if atrous_rates is None else atrous_rates
    if len(rates) != branches:
        raise CheckpointError(
            f"{name} has {branches} atrous branches: atrous_rates must have as many, got {rates}"
        )
    backbone = _backbone(tensors, name)
    try:
        return ModelConfig(
            backbone=backbone,
            num_classes=tensors[f"{spec.logits}.weight"].shape[0],
            output_stride=spec.output_stride,
            multi_grid=(1, 1, 1),
            atrous_rates=rates,
            image_pooling=f"{spec.aspp}.convs.{branches + 1}.1.weight" in tensors,
            decoder=spec.decoder,
            num_convs=1,
            style="torchvision",
            auxiliary="aux_classifier.0.weight" in tensors,
            dropout=spec.dropout,
        )
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _branches(tensors: State, aspp: str) -> int:
    index = 1
    while f"{aspp}.convs.{index}.0.weight" in tensors:
        index += 1
    return index - 1


def _backbone(tensors: State, name: str) -> Backbone:
    if "backbone.features.0.0.weight" in tensors:
        return "mobilenet_v2"
    found = [re.match(r"backbone\.layer3\.(\d+)\.", key) for key in tensors]
    units = {match[1] for match in found if match}
    bottleneck = "backbone.layer3.0.conv3.weight" in tensors
    try:
        return RESNETS[len(units), bottleneck]
    except KeyError:
        raise CheckpointError(
            f"{name} has a backbone of unknown depth ({len(units)} units in layer3); known "
            f"backbones are mobilenet_v2, {', '.join(RESNETS.values())}"
        ) from None
