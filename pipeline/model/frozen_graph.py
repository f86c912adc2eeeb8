"""Read the TensorFlow DeepLab zoo's MobileNetV2 from an npz of its frozen graph.

Its convolutions are HWIO with batch normalization folded in; they are renamed and transposed. The
graph states neither its output stride nor that pixels are scaled to -1..1.
"""

import torch

from pipeline.model.config import ModelConfig
from pipeline.model.formats import CheckpointError
from pipeline.model.mobilenet import STAGES
from pipeline.text import first_names

State = dict[str, torch.Tensor]

OUTPUT_STRIDE = 8
PIXELS = (0.5, 0.5, 0.5)
"""Mean and std: the zoo scales pixels to -1..1."""
SCOPES = ("MobilenetV2.", "aspp", "image_pooling.", "concat_projection.", "decoder.", "logits.")
"""Prefixes of weights; a frozen graph holds other constants too."""


def read_config(tensors: State, name: str) -> ModelConfig:
    """Return the config of the zoo's MobileNetV2: image pooling, one 1x1 branch, no 3x3.

    Raises CheckpointError if the tensors are not of the zoo.
    """
    weights = tensors.get("logits.semantic.weights")
    if weights is None or weights.ndim != 4:
        raise CheckpointError(
            f"{name} is an npz file, but not of the TensorFlow DeepLab zoo: it has no "
            "logits.semantic.weights (1, 1, 256, classes)"
        )
    try:
        return ModelConfig(
            backbone="mobilenet_v2",
            num_classes=weights.shape[3],
            output_stride=OUTPUT_STRIDE,
            multi_grid=(1, 1, 1),
            atrous_rates=(),
            style="tensorflow",
            mean=PIXELS,
            std=PIXELS,
        )
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def read_state(tensors: State, name: str) -> State:
    """Return our state_dict of the zoo's weights: HWIO to OIHW, depthwise scales multiplied in.

    Raises CheckpointError if a weight is missing or unexpected.
    """
    state: State = {}
    used: set[str] = set()
    missing: list[str] = []
    for ours, (weight, scale, bias) in _names().items():
        wanted = [key for key in (weight, scale, bias) if key]
        absent = [key for key in wanted if key not in tensors]
        missing += absent
        used.update(wanted)
        if not absent:
            state[f"{ours}.weight"] = _to_torch(tensors[weight], tensors.get(scale))
            state[f"{ours}.bias"] = tensors[bias]
    weights = [key for key, tensor in tensors.items() if tensor.is_floating_point()]
    extra = [key for key in weights if key.startswith(SCOPES) and key not in used]
    if missing or extra:
        raise CheckpointError(
            f"{name} is not the zoo's MobileNetV2 without atrous branches: missing: "
            f"{first_names(missing) or 'nothing'}; unexpected: {first_names(extra) or 'nothing'}"
        )
    return state


def _to_torch(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if weight.ndim != 4:
        return weight
    if scale is None:
        return weight.permute(3, 2, 0, 1)
    # Depthwise weights are (h, w, channels, 1), and the scale of their normalization is separate.
    if scale.shape != weight.shape[2:3]:
        return weight
    return weight.permute(2, 3, 0, 1) * scale[:, None, None, None]


def _names() -> dict[str, tuple[str, str, str]]:
    """Return our layers -> the zoo's weight, scale ('' if it is folded in) and bias."""
    names = {"backbone.features.0.0": _folded("MobilenetV2.Conv")}
    for index in range(sum(units for _, _, units, _ in STAGES)):
        theirs = "MobilenetV2.expanded_conv" + (f"_{index}" if index else "")
        ours = f"backbone.features.{index + 1}.conv"
        # The first unit has no expansion.
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
