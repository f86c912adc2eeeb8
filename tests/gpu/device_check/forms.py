"""Inference of ResNet-50, ResNet-101 and MobileNetV2, against torchvision and possible speedups.

Rows are measured for several batch sizes, with a single scale, and with six scales and flip.
`ours` is the product; `ours_fused_cudnn` computes convolution, bias, residual and ReLU in one cuDNN
kernel; `ours_cuda_graphs` also replays a CUDA graph for each shape.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.model import flops, fused, predict
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.optimize import optimize_for_inference
from tests.gpu.device_check.measurement import (
    PAPER_SCALES,
    add_row,
    calibrate,
    hardware_limits,
    median_seconds,
    one_word,
    peak_gb,
    save_rows,
)

Logits = Callable[[torch.Tensor], torch.Tensor]
Work = Callable[[int], object]
PrepareWork = Callable[[list[torch.Tensor], Sequence[float], bool], Work]


def build_network(backbone: Any, device: torch.device) -> DeepLabV3:
    """Return a network with random weights whose activations are about 1."""
    config = ModelConfig(
        backbone=backbone, output_stride=8, style="torchvision", multi_grid=(1, 1, 1)
    )
    model = DeepLabV3(config)
    calibrate(model, device)
    return model


def torchvisions(model: DeepLabV3, device: torch.device) -> Any:
    """Return torchvision's network with the same weights; None if there is none."""
    if importlib.util.find_spec("torchvision") is None or model.config.backbone == "mobilenet_v2":
        return None
    segmentation = importlib.import_module("torchvision.models.segmentation")
    build = getattr(segmentation, f"deeplabv3_{model.config.backbone}")
    network = build(weights=None, weights_backbone=None, aux_loss=False)
    network.load_state_dict(model.state_dict())
    network = network.eval().to(device, torch.bfloat16)
    return network.to(memory_format=torch.channels_last)


def with_logits(model: DeepLabV3, logits: Logits, device: torch.device) -> DeepLabV3:
    """Return our network around other logits: same scales, upsampling and averaging."""
    shell = copy.deepcopy(model).to(device, torch.bfloat16)
    shell.logits = logits  # type: ignore[assignment]
    return shell


@contextmanager
def fused_cudnn() -> Iterator[None]:
    """Compute convolution, bias, residual and ReLU in one cuDNN kernel where it has one."""
    before = fused.FusedKernel.__call__

    def call(
        self: fused.FusedKernel,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        **how: Any,
    ) -> torch.Tensor:
        x = x.to(weight.dtype)
        fusible = how["groups"] == 1 and how["activation"] == "relu"
        if not (fusible and bias is not None and x.is_cuda):
            return before(self, x, weight, bias, **how)
        geometry = ([how["stride"]] * 2, list(how["padding"]), [how["rate"]] * 2, 1)
        if how["residual"] is not None:
            return torch.cudnn_convolution_add_relu(
                x, weight, how["residual"], 1.0, bias, *geometry
            )
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)

    fused.FusedKernel.__call__ = call
    try:
        yield
    finally:
        fused.FusedKernel.__call__ = before


class CudaGraphs:
    """Logits by a CUDA graph for each shape of images."""

    def __init__(self, model: DeepLabV3) -> None:
        self._plain = model.logits
        self._known: dict[torch.Size, tuple[Any, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape not in self._known:
            static = x.clone(memory_format=torch.channels_last)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._plain(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self._plain(static)
            self._known[x.shape] = (graph, static, captured)
        graph, static, captured = self._known[x.shape]
        static.copy_(x)
        graph.replay()
        return captured.clone()


def masks_on_device(model: DeepLabV3) -> PrepareWork:
    """Masks of normalized images that are already on the device."""

    def prepare(images: list[torch.Tensor], scales: Sequence[float], flip: bool) -> Work:
        batches = [predict.normalize(model, each) for each in images]

        def work(i: int) -> object:
            size = (images[i].shape[1], images[i].shape[2])
            with torch.inference_mode():
                found = predict.compute_logits(model, batches[i], scales=scales, flip=flip)
                return [
                    predict.mean_probabilities(model, found, size, rows).max(dim=1)
                    for rows in predict.row_strips(found, size, slice(0, size[0]))
                ]

        return work

    return prepare


def masks_from_host(model: DeepLabV3) -> PrepareWork:
    """What a bulk run calls: uint8 images in host memory -> masks in host memory."""

    def prepare(images: list[torch.Tensor], scales: Sequence[float], flip: bool) -> Work:
        return lambda i: predict.segment(model, images[i].numpy(), scales=scales, flip=flip)

    return prepare


def logits_only(model: DeepLabV3) -> PrepareWork:
    """The network alone, at a single scale."""

    def prepare(images: list[torch.Tensor], scales: Sequence[float], flip: bool) -> Work:
        x = predict.normalize(model, images[0]).to(next(model.parameters()).dtype)

        def work(_: int) -> object:
            with torch.inference_mode():
                return model.logits(x)

        return work

    return prepare


class Check:
    """The measurements of one backbone."""

    def __init__(self, arguments: argparse.Namespace, backbone: str, peak: float) -> None:
        self._arguments, self._backbone, self._peak = arguments, backbone, peak
        self._device = torch.device(arguments.device)
        self._model = build_network(backbone, self._device)
        self._ours = optimize_for_inference(self._model, self._device, precision="bf16")
        self._theirs = torchvisions(self._model, self._device)

    def errors(self) -> None:
        """Add rows of the relative errors of bf16 logits against fp64.

        Random networks amplify rounding errors, so compare with the plain network's error.
        """
        x = torch.randn(2, 3, 129, 161, device=self._device).to(torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            exact = copy.deepcopy(self._model).double().logits(x.double().cpu())
            plain = copy.deepcopy(self._model).to(self._device, torch.bfloat16)
            self._add_error("plain_bf16", plain.logits, x, exact)
            self._add_error("ours", self._ours.logits, x, exact)
            if self._device.type == "cuda":
                with fused_cudnn():
                    self._add_error("ours_fused_cudnn", self._ours.logits, x, exact)

    def _add_error(self, form: str, logits: Logits, x: torch.Tensor, exact: torch.Tensor) -> None:
        row = {"form": form, "backbone": self._backbone}
        try:
            found = logits(x).double().cpu()
        except Exception as failure:
            add_row(**row, failed=one_word(failure))
            return
        add_row(**row, error=float((found - exact).norm() / exact.norm()))

    def measure(self, form: str, protocol: str, batch: int, prepare: PrepareWork) -> None:
        """Add a row of the time per image, and of its share of the matrix-product rate."""
        scales: Sequence[float] = PAPER_SCALES if protocol == "multi" else (1.0,)
        flip, side = protocol == "multi", self._arguments.size
        images = [
            torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8) for _ in range(3)
        ]
        row = {"form": form, "backbone": self._backbone, "batch": batch, "protocol": protocol}
        try:
            work = prepare(images, scales, flip)
            seconds = median_seconds(lambda i: work(i % 3), self._device)
        except Exception as error:
            add_row(**row, failed=one_word(error))
            return
        counts = [
            flops.count(self._model, predict.scaled_size(self._model, (side, side), scale))
            for scale in scales
        ]
        nominal = batch * (1 + flip) * sum(each.nominal for each in counts)
        executed = batch * (1 + flip) * sum(each.executed for each in counts)
        add_row(
            **row,
            ms_per_image=1e3 * seconds / batch,
            tflops_nominal=nominal / seconds / 1e12,
            share_of_peak_nominal=nominal / seconds / self._peak,
            share_of_peak_executed=executed / seconds / self._peak,
            peak_gb=peak_gb(self._device),
        )

    def forms(self, protocol: str, batch: int) -> None:
        """Measure every form at one batch size."""
        if self._theirs is not None:
            theirs = with_logits(self._model, self._torchvision_logits, self._device)
            self.measure("torchvision", protocol, batch, masks_on_device(theirs))
        self.measure("ours", protocol, batch, masks_on_device(self._ours))
        self.measure("ours_from_host", protocol, batch, masks_from_host(self._ours))
        if protocol == "single":
            self.measure("ours_logits_only", protocol, batch, logits_only(self._ours))
        if self._device.type != "cuda":
            return
        with fused_cudnn():
            self.measure("ours_fused_cudnn", protocol, batch, masks_on_device(self._ours))
            if batch <= 8:
                graphed = copy.deepcopy(self._ours)
                graphed.logits = CudaGraphs(graphed)
                self.measure("ours_cuda_graphs", protocol, batch, masks_on_device(graphed))
                del graphed
            if batch == 8:
                torch.backends.cudnn.benchmark = True
                self.measure(
                    "ours_fused_cudnn_benchmark", protocol, batch, masks_on_device(self._ours)
                )
                torch.backends.cudnn.benchmark = False
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def compiled(self, mode: str) -> None:
        """Measure torchvision's network compiled, which takes minutes: one shape, one scale."""
        torch.compiler.reset()
        network = torch.compile(self._torchvision_logits, mode=mode)
        started = time.perf_counter()
        model = with_logits(self._model, lambda x: network(x).clone(), self._device)
        self.measure(f"torchvision_compiled_{mode}", "single", 8, masks_on_device(model))
        add_row(compile_s=time.perf_counter() - started, mode=mode)

    @property
    def can_compile(self) -> bool:
        """Whether `compiled` is to be measured for this backbone."""
        wanted = self._arguments.compile and self._backbone == "resnet50"
        return bool(wanted and self._theirs is not None and self._device.type == "cuda")

    def _torchvision_logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._theirs.classifier(self._theirs.backbone(x)["out"])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--backbones", nargs="+", default=["resnet101", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1, 16])
    parser.add_argument("--protocols", nargs="+", default=["single", "multi"])
    parser.add_argument("--minutes", type=float, default=3.3)
    parser.add_argument("--compile", type=int, default=1)
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * arguments.minutes
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    peak, copy_rate = hardware_limits(device)
    name = torch.cuda.get_device_name().replace(" ", "_") if device.type == "cuda" else "cpu"
    add_row(
        device=name,
        torch=torch.__version__,
        matmul_tflops=peak / 1e12,
        copy_tb_per_s=copy_rate / 1e12,
    )
    for backbone in arguments.backbones:
        check = Check(arguments, backbone, peak)
        check.errors()
        for protocol in arguments.protocols:
            for batch in arguments.batches:
                if time.perf_counter() > end:
                    add_row(skipped=f"{backbone}/{protocol}/{batch}")
                    continue
                check.forms(protocol, batch)
                save_rows("forms")
        for mode in ("reduce-overhead", "max-autotune") if check.can_compile else ():
            if time.perf_counter() > end:
                add_row(skipped=f"compile {mode}")
                continue
            check.compiled(mode)
    save_rows("forms")


if __name__ == "__main__":
    main()
