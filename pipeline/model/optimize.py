"""Makes a trained network fast: folding, precision, memory format, one-pass layers, compilation.

Enters: a network in eval mode and a device. Leaves: a network of the same signature for
inference alone; the one that entered is unchanged. Invariant: in fp32 its logits are the plain
network's to 1e-4; where a fast form does not work on the device, the plain one is taken and the
log says why.
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

from pipeline.model import atrous
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.fused import Activation, Fused, has_one_pass
from pipeline.model.resize import Size
from pipeline.text import first_line

Precision = Literal["fp32", "bf16"]

_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}

_BF16_CPUS = ("amx", "avx512_bf16")
"""Others compute bf16 by hand: on AVX2 a product of 512 x 512 ran at 1.8 GFLOP/s, fp32 at 40."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What compiling for one size takes (seconds), and the share of a pass that it saves."""

    takes_s: float
    saves: float


COMPILATIONS = {
    # ResNet-50, output stride 8, 513 x 513, AMX: 47 s, and 0.35 s a pass after 0.59.
    ("amx", torch.bfloat16): Compilation(takes_s=47, saves=0.4),
    # The same on EPYC (Zen 1), one thread: 20 s; 0.76 of the plain form's time, which layers in
    # one pass take to 0.80 (two runs: the saving is a difference of ratios).
    ("avx2", torch.float32): Compilation(takes_s=20, saves=0.05),
    # The same on EPYC (Zen 4): 11 s, and 1.51 s a pass after 1.59.
    ("avx512_bf16", torch.bfloat16): Compilation(takes_s=11, saves=0.05),
}
"""By `atrous.engine` and type. Where nothing is measured (GPUs too), nothing is compiled."""


def prepare(
    model: DeepLabV3,
    device: torch.device | str | None = None,
    *,
    precision: Precision | None = None,
    size: Size | None = None,
    images: int = 0,
) -> DeepLabV3:
    """A copy of `model` for inference on `device`, by default the one that it is on.

    It has no batch normalisation and no auxiliary head, cannot be trained or saved, and keeps
    `config`, `logits`, `upsample` and `set_output_stride`. `precision` None is bf16 where the
    device has instructions for it, else fp32; the last layer is fp32 in any case. It is warmed
    up on one image of `size` (h, w), where given; where `images` of that size are to come and
    the time that compiling saves them is more than it takes, it is compiled for that size, and
    stays plain for others. Raises ValueError where the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before preparing it")
    device = next(model.parameters()).device if device is None else torch.device(device)
    on = atrous.engine(device)
    dtype = _dtype(precision, device)
    fast = copy.deepcopy(model).requires_grad_(False)
    fast.aux_classifier = None
    _fold(fast)
    last = _last_layer(fast)
    fast.to(device, dtype)
    lay_out(fast)
    last.float()
    _fuse(fast, on, cpu=device.type == "cpu")
    if size is not None:
        fast = _warmed_up(fast, model, size, images)
    return fast


def _warmed_up(fast: DeepLabV3, model: DeepLabV3, size: Size, images: int) -> DeepLabV3:
    """`fast` after a pass; compiled where it pays; plain and in fp32 where the pass fails."""
    parameter = next(fast.parameters())
    photo = torch.zeros((1, 3, *size), device=parameter.device, dtype=parameter.dtype)
    photo = photo.contiguous(memory_format=torch.channels_last)
    try:
        seconds = _seconds(fast, photo)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.warning(
            "the network runs in its plain form: the fast one fails (%s)", first_line(error)
        )
        return copy.deepcopy(model).to(parameter.device).requires_grad_(False)
    if compilation_pays(atrous.engine(photo.device), photo.dtype, images=images, seconds=seconds):
        _compile(fast, photo)
    return fast


def compilation_pays(on: str, dtype: torch.dtype, *, images: int, seconds: float) -> bool:
    """Whether compiling saves more time than it takes, for `images` that take `seconds` each."""
    known = COMPILATIONS.get((on, dtype))
    return known is not None and images * seconds * known.saves > known.takes_s


class _Compiled:
    """Logits by a compiled graph for images of one shape at one output stride, else plainly."""

    def __init__(self, model: DeepLabV3, like: torch.Tensor) -> None:
        self._model = model
        self._plain = model.logits
        self._shape, self._stride = like.shape, model.config.output_stride
        self._graph: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            self._plain, dynamic=False, options={"freezing": True}
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        known = x.shape == self._shape and self._model.config.output_stride == self._stride
        if not known:
            return self._plain(x)
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone(memory_format=torch.channels_last) if x.is_inference() else x
            return self._graph(x)


def _compile(model: DeepLabV3, photo: torch.Tensor) -> None:
    compiled = _Compiled(model, photo)
    try:
        compiled(photo)
    except Exception as error:  # a compiler has no one kind of failure
        logger.warning("the network is not compiled: %s", first_line(error))
        return
    model.logits = compiled  # type: ignore[method-assign]


def _seconds(model: DeepLabV3, photo: torch.Tensor) -> float:
    """Of the second pass: the first one fills caches."""
    with torch.inference_mode():
        model.logits(photo)
        started = time.perf_counter()
        model.logits(photo).sum().item()  # waits for the device
    return time.perf_counter() - started


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16, so that it is faster than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return atrous.engine(device) in _BF16_CPUS


def _dtype(precision: Precision | None, device: torch.device) -> torch.dtype:
    if precision not in ("fp32", "bf16", None):
        raise ValueError(f"precision must be fp32, bf16 or None, got {precision!r}")
    bf16 = has_bf16(device) if precision is None else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def lay_out(model: nn.Module) -> None:
    """Makes all weights channels last; measured on a CPU: 8 to 18 % less time than first."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _fold(model: nn.Module) -> None:
    """Puts each batch normalisation into the convolution before it."""
    for parent in model.modules():
        children = list(parent.named_children())
        for (_, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, Convolution) and isinstance(norm, nn.BatchNorm2d):
                _fold_into(conv, norm)
                setattr(parent, name, nn.Identity())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def _fold_into(conv: Convolution, norm: nn.BatchNorm2d) -> None:
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


def _fuse(model: nn.Module, on: str, *, cpu: bool) -> None:
    """Makes every convolution compute for inference, with the activation that follows it."""
    for layer in model.modules():
        if isinstance(layer, Convolution):
            layer.fused = Fused(on=on, one_pass=cpu and has_one_pass(layer.weight.dtype))
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
