"""The variants of a network that `jobs/benchmark.py` compares."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.model import devices, optimize
from pipeline.model.config import Backbone, ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.resize import Size

Form = Literal["plain", "channels_last", "bf16", "compiled", "torchvision", "fast"]
PLAIN_FORMS = ("plain", "channels_last", "torchvision")

_NO_BF16 = "this CPU has no instructions for bf16"
_TORCHVISION = {"resnet50": "deeplabv3_resnet50", "resnet101": "deeplabv3_resnet101"}


@dataclass(frozen=True, kw_only=True)
class BenchmarkModel:
    """A network in one form, ready for `predict`."""

    model: DeepLabV3
    dtype: torch.dtype
    channels_last: bool


def build(backbone: Backbone, output_stride: int) -> DeepLabV3:
    """Return a network with torchvision's rates and head and random weights, in eval mode."""
    config = ModelConfig(
        backbone=backbone, output_stride=output_stride, style="torchvision", multi_grid=(1, 1, 1)
    )
    return DeepLabV3(config).eval()


def form_of(
    model: DeepLabV3, form: Form, device: torch.device, size: Size, *, multi: bool
) -> tuple[BenchmarkModel | None, str | None]:
    """Return the model in that form, or None and the reason."""
    if form == "fast":
        fast = optimize.optimize_for_inference(model, device, size=size)
        dtype = next(fast.parameters()).dtype
        return BenchmarkModel(model=fast, dtype=dtype, channels_last=True), None
    if form == "torchvision":
        return _torchvision(model, device)
    if form == "bf16" and device.type == "cpu" and not devices.has_bf16(device):
        return None, _NO_BF16
    if form == "compiled" and multi:
        return None, "compiled for one size"
    plain = copy.deepcopy(model).to(device)
    if form in ("channels_last", "bf16"):
        optimize.to_channels_last(plain)
    if form == "bf16":
        plain = plain.bfloat16()
    if form == "compiled":
        plain.logits = torch.compile(plain.logits, dynamic=False)  # type: ignore[method-assign]
    dtype = next(plain.parameters()).dtype
    return BenchmarkModel(
        model=plain, dtype=dtype, channels_last=form in ("channels_last", "bf16")
    ), None


def _torchvision(
    model: DeepLabV3, device: torch.device
) -> tuple[BenchmarkModel | None, str | None]:
    """Return torchvision's network with the weights of the model, wrapped for our `predict`."""
    name = _TORCHVISION.get(model.config.backbone)
    if name is None or model.config.output_stride != 8:
        return None, "torchvision has no such network"
    if importlib.util.find_spec("torchvision") is None:
        return None, "torchvision is not installed"
    networks: Any = importlib.import_module("torchvision.models.segmentation")
    theirs = getattr(networks, name)(weights=None, weights_backbone=None, aux_loss=False)
    theirs.load_state_dict(model.state_dict())
    theirs.eval().to(device)
    ours = copy.deepcopy(model).to(device)

    def logits(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = theirs.classifier(theirs.backbone(x)["out"])
        return found

    ours.logits = logits  # type: ignore[method-assign]
    return BenchmarkModel(model=ours, dtype=torch.float32, channels_last=False), None
