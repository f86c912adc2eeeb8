"""Layouts of other people's weight files: names and shapes -> our config and state_dict.

torchvision's names are ours, so its tensors pass as they are and only the config is inferred.
The TensorFlow DeepLab zoo's MobileNetV2, as an npz of its frozen graph, is renamed and
transposed. Neither file says its output stride or its rates: each layout has a default.
"""

import re

import torch

from pipeline.model.config import Backbone, ModelConfig
from pipeline.model.formats import CheckpointError, TensorFile, shorten
from pipeline.model.mobilenet import STAGES

State = dict[str, torch.Tensor]

TORCHVISION_STRIDE = 8
TORCHVISION_RATES = (6, 12, 18)
"""12, 24, 36 at output stride 8: what torchvision trains its DeepLabv3 with."""
TORCHVISION_DROPOUT = 0.5

ZOO_STRIDE = 8
ZOO_PIXELS = (0.5, 0.5, 0.5)
"""Mean and std: the zoo scales pixels to -1..1."""
ZOO_SCOPES = ("MobilenetV2.", "aspp", "image_pooling.", "concat_projection.", "decoder.", "logits.")
"""What names weights; beside them a frozen graph holds constants of its own."""

# Units of layer3, and whether they are bottlenecks.
RESNETS: dict[tuple[int, bool], Backbone] = {
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
}


def recognise(
    file: TensorFile, *, name: str, atrous_rates: tuple[int, ...] | None = None
) -> tuple[ModelConfig, State]:
    """The config and state_dict of a file of torchvision's or the zoo's layout.

    `atrous_rates` (at output stride 16) replace the layout's own. Raises CheckpointError.
    """
    if file.npz:
        return zoo_config(file.tensors, name), zoo_state(file.tensors, name)
    return torchvision_config(file.tensors, name, atrous_rates), file.tensors


def torchvision_config(
    tensors: State, name: str, atrous_rates: tuple[int, ...] | None
) -> ModelConfig:
    """The config of a torchvision DeepLabv3: backbone, heads and classes from names and shapes."""
    logits = tensors.get("classifier.4.weight")
    if logits is None or logits.ndim != 4 or "classifier.0.convs.0.0.weight" not in tensors:
        raise CheckpointError(
            f"{name} is of no known layout (its first names: {shorten(sorted(tensors))}); a "
            "backbone alone, from ImageNet, is what load_backbone is for"
        )
    branches = _branches(tensors)
    rates = TORCHVISION_RATES if atrous_rates is None else atrous_rates
    if len(rates) != branches:
        raise CheckpointError(
            f"{name} has {branches} atrous branches, but rates {rates}; give atrous_rates"
        )
    try:
        return ModelConfig(
            backbone=_backbone(tensors, name),
            num_classes=logits.shape[0],
            output_stride=TORCHVISION_STRIDE,
            multi_grid=(1, 1, 1),
            atrous_rates=rates,
            image_pooling=f"classifier.0.convs.{branches + 1}.1.weight" in tensors,
            style="torchvision",
            auxiliary="aux_classifier.0.weight" in tensors,
            dropout=TORCHVISION_DROPOUT,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _branches(tensors: State) -> int:
    index = 1
    while f"classifier.0.convs.{index}.0.weight" in tensors:
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


def zoo_config(tensors: State, name: str) -> ModelConfig:
    """The config of the zoo's MobileNetV2: image pooling, one 1x1 branch, no 3x3."""
    weights = tensors.get("logits.semantic.weights")
    if weights is None or weights.ndim != 4:
        raise CheckpointError(
            f"{name} is an npz, but not of the TensorFlow DeepLab zoo: it has no "
            "logits.semantic.weights (1, 1, 256, classes)"
        )
    try:
        return ModelConfig(
            backbone="mobilenet_v2",
            num_classes=weights.shape[3],
            output_stride=ZOO_STRIDE,
            multi_grid=(1, 1, 1),
            atrous_rates=(),
            style="tensorflow",
            mean=ZOO_PIXELS,
            std=ZOO_PIXELS,
        )
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def zoo_state(tensors: State, name: str) -> State:
    """Our state_dict from the zoo's folded weights: HWIO to OIHW, depthwise scales multiplied in.

    Raises CheckpointError where a name is missing, or a weight of another network is there.
    """
    state: State = {}
    used: set[str] = set()
    lacking: list[str] = []
    for ours, (weight, scale, bias) in _zoo_names().items():
        wanted = [key for key in (weight, scale, bias) if key]
        absent = [key for key in wanted if key not in tensors]
        lacking += absent
        used.update(wanted)
        if not absent:
            state[f"{ours}.weight"] = _to_torch(tensors[weight], tensors.get(scale))
            state[f"{ours}.bias"] = tensors[bias]
    weights = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
    extra = [key for key in weights if key.startswith(ZOO_SCOPES) and key not in used]
    if lacking or extra:
        raise CheckpointError(
            f"{name} is not the zoo's MobileNetV2 without atrous branches: missing "
            f"{shorten(lacking) or 'nothing'}; unexpected {shorten(extra) or 'nothing'}"
        )
    return state


def _to_torch(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if weight.ndim != 4:
        return weight
    if scale is None:
        return weight.permute(3, 2, 0, 1)
    # Depthwise weights are (h, w, channels, 1); their normalisation's scale is kept apart.
    if scale.shape != weight.shape[2:3]:
        return weight
    return weight.permute(2, 3, 0, 1) * scale[:, None, None, None]


def _zoo_names() -> dict[str, tuple[str, str, str]]:
    """Our layer -> the zoo's weight, scale ('' where it is folded in) and bias."""
    names = {"backbone.features.0.0": _folded("MobilenetV2.Conv")}
    for index in range(sum(units for _, _, units, _ in STAGES)):
        theirs = "MobilenetV2.expanded_conv" + (f"_{index}" if index else "")
        ours = f"backbone.features.{index + 1}.conv"
        # The first unit does not expand.
        first = 1 if index else 0
        if index:
            names[f"{ours}.0.0"] = _folded(f"{theirs}.expand")
        depthwise = f"{theirs}.depthwise"
        norm = f"{depthwise}.BatchNorm.FusedBatchNorm"
        names[f"{ours}.{first}.0"] = (
            f"{depthwise}.depthwise_weights", f"{norm}.Scaled", f"{norm}.Offset",
        )  # fmt: skip
        names[f"{ours}.{first + 1}"] = _folded(f"{theirs}.project")
    names["classifier.0.convs.0.0"] = _folded("aspp0")
    names["classifier.0.convs.1.1"] = _folded("image_pooling")
    names["classifier.0.project.0"] = _folded("concat_projection")
    names["classifier.1"] = ("logits.semantic.weights", "", "logits.semantic.biases")
    return names


def _folded(scope: str) -> tuple[str, str, str]:
    bias = f"{scope}.BatchNorm.FusedBatchNorm.Offset"
    return f"{scope}.Conv2D.merged_input", "", bias
