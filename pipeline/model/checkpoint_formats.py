"""Layouts of other people's weight files: names and shapes -> our config and state_dict.

torchvision's names are ours, and so are those of VainF's DeepLabv3+; VainF's DeepLabv3 has its
head one level deeper. No file says its output stride, its rates or its dropout: each layout has
a default, what its authors publish the file with.
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
"""In the metadata of what a training run goes on from, which holds more than a network."""

RATES = (6, 12, 18)
"""At output stride 16, so 12, 24, 36 at 8: what all of them train with."""

# Units of layer3, and whether they are bottlenecks.
RESNETS: dict[tuple[int, bool], Backbone] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """Where a family of files keeps ASPP and logits, and what it never says.

    All of them have torchvision's backbone, and one 3x3 convolution before the logits.
    """

    aspp: str
    logits: str
    decoder: bool = False
    output_stride: int
    dropout: float
    renamed: tuple[str, str] = ("", "")
    """How their names begin, and ours in its place."""


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
    """The config and state_dict of a file of torchvision's, VainF's or the zoo's layout.

    `atrous_rates` (at output stride 16) replace the layout's own. Raises CheckpointError.
    """
    if TRAINING_KEY in file.metadata:
        raise CheckpointError(
            f"{name} is what a training run goes on from, not a network: give the run's "
            "model.safetensors, or best.safetensors, which lie beside its checkpoints folder"
        )
    if file.npz:
        if atrous_rates:
            raise CheckpointError(
                f"{name} has no atrous branches, but rates {atrous_rates}; leave atrous_rates out"
            )
        config = frozen_graph.read_config(file.tensors, name)
        return config, frozen_graph.read_state(file.tensors, name)
    layout = _layout(file.tensors, name)
    config = _config(layout, file.tensors, name, atrous_rates)
    theirs, ours = layout.renamed
    state = {
        ours + key.removeprefix(theirs) if theirs and key.startswith(theirs) else key: tensor
        for key, tensor in file.tensors.items()
    }
    return config, state


def _layout(tensors: State, name: str) -> CheckpointFormat:
    if any(key.startswith("backbone.low_level_features.") for key in tensors):
        raise CheckpointError(
            f"{name} is VainF's MobileNetV2, which is not supported: it pads before the 1x1 "
            "expansion, so that its borders carry the normalisation's bias; its ResNets load"
        )
    for layout in CHECKPOINT_FORMATS:
        logits = tensors.get(f"{layout.logits}.weight")
        found = f"{layout.aspp}.convs.0.0.weight" in tensors
        if found and logits is not None and logits.ndim == 4:
            return layout
    raise CheckpointError(
        f"{name} is of no known layout (its first names: {first_names(sorted(tensors))}); a "
        "backbone alone, from ImageNet, is what load_backbone is for"
    )


def _config(
    layout: CheckpointFormat, tensors: State, name: str, atrous_rates: tuple[int, ...] | None
) -> ModelConfig:
    """The config of a file: what names and shapes tell, and the layout's defaults."""
    branches = _branches(tensors, layout.aspp)
    rates = RATES if atrous_rates is None else atrous_rates
    if len(rates) != branches:
        raise CheckpointError(
            f"{name} has {branches} atrous branches, but rates {rates}; give atrous_rates"
        )
    backbone = _backbone(tensors, name)
    try:
        return ModelConfig(
            backbone=backbone,
            num_classes=tensors[f"{layout.logits}.weight"].shape[0],
            output_stride=layout.output_stride,
            multi_grid=(1, 1, 1),
            atrous_rates=rates,
            image_pooling=f"{layout.aspp}.convs.{branches + 1}.1.weight" in tensors,
            decoder=layout.decoder,
            num_convs=1,
            style="torchvision",
            auxiliary="aux_classifier.0.weight" in tensors,
            dropout=layout.dropout,
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
            f"{name} has a backbone of no known depth ({len(units)} units in layer3); known are "
            f"mobilenet_v2 and {', '.join(RESNETS.values())}"
        ) from None
