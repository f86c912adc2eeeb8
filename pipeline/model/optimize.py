"""Optimize a trained network for inference on its device.

Batch normalization is folded into the convolutions, weights become channels last and bf16 where
the device has it, activations are fused, and the network is compiled where that pays off. In
fp32 the logits equal the plain network's to 1e-4. If an optimization fails on the device, the
plain form is used and the reason is logged.
"""

import copy
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.checks import check_choice
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.devices import engine, has_bf16
from pipeline.model.fused import FusedKernel, onednn_fuses
from pipeline.model.resize import Size
from pipeline.model.torch_compat import Activation
from pipeline.text import first_line

Precision = Literal["fp32", "bf16"]

_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CompilationCost:
    """Seconds that compiling for one size takes, and the share of a forward pass that it saves."""

    compile_s: float
    saved_share: float


# Measured with ResNet-50 at output stride 8 on 513 x 513; on CPUs with one thread.
COMPILATION_COSTS = {
    ("amx", torch.bfloat16): CompilationCost(compile_s=47, saved_share=0.4),
    ("avx2", torch.float32): CompilationCost(compile_s=20, saved_share=0.05),
    ("avx512_bf16", torch.bfloat16): CompilationCost(compile_s=11, saved_share=0.05),
}
"""By `devices.engine` and type. Nothing is compiled on others, GPUs included: not measured."""


def optimize_for_inference(
    model: DeepLabV3,
    device: torch.device | str | None = None,
    *,
    precision: Precision | None = None,
    size: Size | None = None,
    images: int = 0,
) -> DeepLabV3:
    """Return a copy of `model` that is optimized for inference on `device` (default: its own).

    The copy has no batch normalization and no auxiliary head, and cannot be trained or saved;
    `config`, `logits`, `upsample` and `set_output_stride` work as before. `precision` None means
    bf16 if the device has instructions for it, else fp32; the last layer is always fp32.

    With `size` (h, w), the copy is warmed up on an image of that size. With `images`, the number
    of images of that size to come, it is also compiled for that size if this saves more time
    than compiling takes; other sizes use the uncompiled form.

    Raises ValueError if the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before optimizing it")
    device = next(model.parameters()).device if device is None else torch.device(device)
    dtype = _dtype(precision, device)
    fast = copy.deepcopy(model).requires_grad_(False)
    fast.aux_classifier = None
    _fold_batch_norms(fast)
    last = _last_layer(fast)
    fast.to(device, dtype)
    to_channels_last(fast)
    last.float()
    _fuse(fast, device)
    if size is not None:
        fast = _warm_up(fast, model, size, images)
    return fast


def _warm_up(fast: DeepLabV3, model: DeepLabV3, size: Size, images: int) -> DeepLabV3:
    """Return `fast` after a forward pass: compiled if worthwhile; `model` in fp32 if it fails."""
    parameter = next(fast.parameters())
    image = torch.zeros((1, 3, *size), device=parameter.device, dtype=parameter.dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    try:
        seconds = _seconds(fast, image)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning(
            "the optimized network fails on this device, so the plain one is used: %s",
            first_line(error),
        )
        return copy.deepcopy(model).to(parameter.device).requires_grad_(False)
    if compilation_pays_off(engine(image.device), image.dtype, images=images, seconds=seconds):
        _compile(fast, image)
    return fast


def compilation_pays_off(engine: str, dtype: torch.dtype, *, images: int, seconds: float) -> bool:
    """Return whether compiling saves time for `images` images that take `seconds` each."""
    cost = COMPILATION_COSTS.get((engine, dtype))
    return cost is not None and images * seconds * cost.saved_share > cost.compile_s


class _CompiledLogits:
    """Logits by a compiled graph for one image shape and output stride, by the model for others."""

    def __init__(self, model: DeepLabV3, like: torch.Tensor) -> None:
        self._model = model
        self._plain = model.logits
        self._shape, self._stride = like.shape, model.config.output_stride
        self._graph: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            self._plain, dynamic=False, options={"freezing": True}
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape != self._shape or self._model.config.output_stride != self._stride:
            return self._plain(x)
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone(memory_format=torch.channels_last) if x.is_inference() else x
            return self._graph(x)


def _compile(model: DeepLabV3, image: torch.Tensor) -> None:
    compiled = _CompiledLogits(model, image)
    try:
        compiled(image)
    except Exception as error:  # the compiler may raise anything
        logger.warning("the network is used uncompiled; compiling failed: %s", first_line(error))
        return
    model.logits = compiled  # type: ignore[method-assign]


def _seconds(model: DeepLabV3, image: torch.Tensor) -> float:
    """Return the seconds of the second forward pass; the first one fills caches."""
    with torch.inference_mode():
        model.logits(image)
        started = time.perf_counter()
        model.logits(image).sum().item()  # waits for the device
    return time.perf_counter() - started


def _dtype(precision: Precision | None, device: torch.device) -> torch.dtype:
    check_choice("precision", precision, ("fp32", "bf16", None))
    bf16 = has_bf16(device) if precision is None else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def to_channels_last(model: nn.Module) -> None:
    """Make all weights channels last, which takes 8 to 18 % less time on CPUs."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch normalization into the convolution before it."""
    for parent in model.modules():
        children = list(parent.named_children())
        for (_, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, Convolution) and isinstance(norm, nn.BatchNorm2d):
                _fold(conv, norm)
                setattr(parent, name, nn.Identity())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def _fold(conv: Convolution, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # in fp64, so that the folded weights are rounded once
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift += conv.bias.double() * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _fuse(model: nn.Module, device: torch.device) -> None:
    """Give every convolution a `FusedKernel`, with the activation that follows it."""
    cpu = device.type == "cpu"
    for layer in model.modules():
        if isinstance(layer, Convolution):
            layer.fused = FusedKernel(
                engine=engine(device), onednn=cpu and onednn_fuses(layer.weight.dtype)
            )
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            conv: Convolution | None = None
            for name, layer in parent.named_children():
                activation = _ACTIVATIONS.get(type(layer))
                if activation is not None and conv is not None and conv.fused is not None:
                    conv.fused.activation = activation
                    setattr(parent, name, nn.Identity())
                elif not isinstance(layer, nn.Identity):
                    conv = layer if isinstance(layer, Convolution) else None


def _last_layer(model: DeepLabV3) -> Convolution:
    *_, last = (each for each in model.classifier.modules() if isinstance(each, Convolution))
    assert last.out_channels == model.config.num_classes
    return last
