"""The network on a GPU against the CPU: logits, masks, and running out of memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jobs.demo.images import demo_images
from pipeline.bulk.settings import Inference
from pipeline.bulk.worker.inference import InferenceModel
from pipeline.model import optimize, predict, weights
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
PLAIN = {"multi_grid": (1, 1, 1), "num_classes": 5}
CONFIGS = {
    "bottlenecks": ModelConfig(backbone="resnet50", num_classes=5),
    "inverted": ModelConfig(backbone="mobilenet_v2", **PLAIN),
    "tensorflow": ModelConfig(backbone="mobilenet_v2", style="tensorflow", **PLAIN),
    "decoder": ModelConfig(backbone="resnet18", decoder=True, **PLAIN),
    "cascade": ModelConfig(
        backbone="resnet18", head="cascade", blocks=5, atrous_rates=(), image_pooling=False, **PLAIN
    ),
}


def network(config: ModelConfig) -> DeepLabV3:
    """Return a network with random weights whose logits are about 1."""
    torch.manual_seed(4)
    model = DeepLabV3(config)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(torch.randn(8, 3, 65, 65))
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_the_cpus_at_any_output_stride(name: str) -> None:
    model = network(CONFIGS[name])
    image = torch.randn(2, 3, 65, 97)
    exact = optimize.optimize_for_inference(model, "cuda", precision="fp32")
    for output_stride in (16, 8):
        for each in (model, exact):
            each.set_output_stride(output_stride)
        expected = model.logits(image)
        found = exact.logits(image.to("cuda")).cpu()
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def random_image(height: int, width: int) -> np.ndarray:
    """Return soft blobs of color with a little noise."""
    generator = np.random.default_rng(height)
    small = torch.from_numpy(generator.uniform(0, 255, (1, 3, 7, 9)))
    soft = nn.functional.interpolate(small, (height, width), mode="bicubic")[0].permute(1, 2, 0)
    noisy = soft.numpy() + generator.normal(0, 4, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ["voc-mobilenetv2", "tfzoo-voc-mobilenetv2"])
def test_masks_of_the_demos_checkpoints_nearly_equal_the_cpus(name: str, flip: bool) -> None:
    model, _ = weights.load(str(DEMO / f"{name}.safetensors"))
    plain = optimize.optimize_for_inference(model.eval(), "cpu", precision="fp32")
    fast = optimize.optimize_for_inference(model.eval(), "cuda")
    assert next(fast.backbone.parameters()).dtype == torch.bfloat16
    how = {"scales": (0.75, 1.0, 1.5) if flip else (1.0,), "flip": flip}
    for data in demo_images().values():
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((320, 240)))[None]
        expected, confidence = predict.segment(plain, image, **how)
        found, found_confidence = predict.segment(fast, image, **how)
        # bf16 changes pixels along borders: on VOC 0.4 % of all, and 4 % of the worst image
        assert (expected == found).float().mean() > 0.95
        assert (confidence.float() - found_confidence.float()).abs().mean() < 0.02


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit this process to a gigabyte of GPU memory."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_retries_images_alone_and_gives_none_if_one_does_not_fit() -> None:
    model, _ = weights.load(str(DEMO / "tfzoo-voc-mobilenetv2.safetensors"))
    segmenter = InferenceModel(model.eval(), Inference(window_above=10**9), gpu=True)
    [alone] = segmenter.segment([random_image(500, 600)])
    assert alone is not None
    together = segmenter.segment([random_image(500, 600)] * 12)
    assert len(together) == 12
    for each in together:
        assert each is not None
        assert (each[0] == alone[0]).mean() > 0.99
    assert segmenter.segment([random_image(5000, 6000)]) == [None]
    [after] = segmenter.segment([random_image(500, 600)])  # the next one fits again
    assert after is not None
