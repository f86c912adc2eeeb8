"""Optimized networks against plain ones: logits, masks, strides, fallbacks."""

import logging

import pytest
import torch
from torch import nn

from pipeline.model import atrous, devices, fused, optimize
from pipeline.model.config import ModelConfig
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.predict import segment

PLAIN = {"multi_grid": (1, 1, 1), "num_classes": 5}
CONFIGS = {
    "bottlenecks": ModelConfig(backbone="resnet50", num_classes=5),
    "basic": ModelConfig(backbone="resnet18", style="torchvision", auxiliary=True, **PLAIN),
    "inverted": ModelConfig(backbone="mobilenet_v2", **PLAIN),
    "tensorflow": ModelConfig(backbone="mobilenet_v2", style="tensorflow", **PLAIN),
    "decoder": ModelConfig(backbone="resnet18", decoder=True, **PLAIN),
    "cascade": ModelConfig(
        backbone="resnet18", head="cascade", blocks=5, atrous_rates=(), image_pooling=False, **PLAIN
    ),
}


def images(n, height, width, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture
def tiny(randomize):
    return randomize(DeepLabV3(CONFIGS["inverted"]))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_fp32_logits_equal_the_plain_networks_at_any_output_stride(name, randomize):
    model = randomize(DeepLabV3(CONFIGS[name]))
    x = images(1, 33, 50)
    fast = optimize.optimize_for_inference(model, precision="fp32")
    for output_stride in (16, 8):
        model.set_output_stride(output_stride)
        fast.set_output_stride(output_stride)
        assert fast.config == model.config
        assert relative(fast.logits(x), model.logits(x)) < 1e-4
        assert relative(fast(x), model(x)) < 1e-4


@pytest.mark.parametrize("one_pass", [True, False])
@torch.inference_mode()
def test_logits_are_equal_with_and_without_onednn_fusion(one_pass, randomize, monkeypatch):
    monkeypatch.setattr(optimize, "onednn_fuses", lambda _: one_pass)
    for name in ("basic", "tensorflow"):
        model = randomize(DeepLabV3(CONFIGS[name]))
        fast = optimize.optimize_for_inference(model, precision="fp32")
        assert relative(fast.logits(images(1, 33, 41)), model.logits(images(1, 33, 41))) < 1e-4


@torch.inference_mode()
def test_logits_are_equal_with_shifted_convolutions(randomize, monkeypatch):
    crossover = atrous.Crossover(min_rate=2, max_valid_share=1.0, min_in_channels=1)
    on = devices.engine(torch.device("cpu"))
    monkeypatch.setitem(atrous.CROSSOVERS, (on, torch.float32), crossover)
    calls, shifted = [], atrous.shifted_conv2d
    monkeypatch.setattr(
        atrous,
        "shifted_conv2d",
        lambda *a, **how: calls.append(how["rate"]) or shifted(*a, **how),  # type: ignore[func-returns-value]
    )
    for name in ("basic", "tensorflow"):
        calls.clear()
        model = randomize(DeepLabV3(CONFIGS[name]))
        fast = optimize.optimize_for_inference(model, precision="fp32")
        for side in (17, 33):
            x = images(1, side, side + 8)
            assert relative(fast.logits(x), model.logits(x)) < 1e-4
        assert {6, 12, 18} <= set(calls)


def test_the_original_network_is_unchanged_and_shares_nothing(tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    fast = optimize.optimize_for_inference(tiny)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name])
    tiny.train()(images(2, 33, 33)).sum().backward()


@torch.inference_mode()
def test_bf16_keeps_the_last_layer_in_fp32_and_logits_within_5_percent(tiny):
    fast = optimize.optimize_for_inference(tiny, precision="bf16")
    x = images(1, 65, 81)
    logits = fast.logits(x.bfloat16())
    assert logits.dtype == torch.float32
    layers = [layer for layer in fast.modules() if isinstance(layer, Convolution)]
    assert {layer.weight.dtype for layer in layers[:-1]} == {torch.bfloat16}
    assert relative(logits, tiny.logits(x)) < 0.05


def test_masks_of_an_optimized_network_equal_the_plain_ones(tiny):
    pixels = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8)
    how = {"scales": (0.5, 1.0), "flip": True}
    wanted, confidence = segment(tiny, pixels, **how)
    found, sure = segment(optimize.optimize_for_inference(tiny, precision="fp32"), pixels, **how)
    assert (found == wanted).float().mean() >= 0.999
    torch.testing.assert_close(sure, confidence, rtol=0, atol=1e-4)


def test_if_the_optimized_network_fails_the_plain_one_is_used_and_logged(tiny, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(fused, "onednn_convolution", broken)
    monkeypatch.setattr(optimize, "onednn_fuses", lambda _: True)
    with caplog.at_level(logging.WARNING):
        fast = optimize.optimize_for_inference(tiny, precision="bf16", size=(33, 41))
    assert "could not create a primitive" in caplog.text
    x = images(1, 33, 41)
    with torch.inference_mode():
        assert torch.equal(fast.logits(x), tiny.logits(x))


def test_a_missing_onednn_operator_is_logged(monkeypatch, caplog):
    def missing(*_, **__):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(fused, "onednn_convolution", missing)
    fused.onednn_fuses.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not fused.onednn_fuses(torch.float32)
    finally:
        fused.onednn_fuses.cache_clear()
    assert "pass of their own" in caplog.text


def test_compilation_pays_off_once_it_saves_more_time_than_it_takes():
    # Compiling takes 47 s and saves 0.4 of 0.6 s per pass: 196 passes.
    amx = ("amx", torch.bfloat16)
    assert not optimize.compilation_pays_off(*amx, images=20, seconds=0.6)
    assert not optimize.compilation_pays_off(*amx, images=195, seconds=0.6)
    assert optimize.compilation_pays_off(*amx, images=197, seconds=0.6)
    assert not optimize.compilation_pays_off("avx2", torch.float32, images=20, seconds=8.0)
    assert optimize.compilation_pays_off("avx2", torch.float32, images=200, seconds=8.0)
    assert not optimize.compilation_pays_off("cuda", torch.bfloat16, images=10**6, seconds=1.0)


@torch.inference_mode()
def test_the_compiled_graph_is_used_for_its_size_and_output_stride_only(tiny, monkeypatch):
    graphs = []

    def compiled(function, **_):
        def graph(x):
            graphs.append(tuple(x.shape))
            return function(x)

        return graph

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(optimize, "compilation_pays_off", lambda *_, images, **__: images > 10)
    optimize.optimize_for_inference(tiny, precision="fp32", size=(33, 41), images=10)
    assert graphs == []
    fast = optimize.optimize_for_inference(tiny, precision="fp32", size=(33, 41), images=11)
    graphs.clear()
    for size in ((33, 41), (41, 33)):
        assert relative(fast.logits(images(1, *size)), tiny.logits(images(1, *size))) < 1e-4
    fast.set_output_stride(8)
    fast.logits(images(1, 33, 41))
    assert graphs == [(1, 3, 33, 41)]


def test_a_failing_compiler_leaves_the_network_uncompiled(tiny, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(optimize, "compilation_pays_off", lambda *_, **__: True)
    with caplog.at_level(logging.WARNING):
        fast = optimize.optimize_for_inference(tiny, precision="fp32", size=(33, 41), images=1)
    assert "no working C++ compiler" in caplog.text
    assert fast.logits(images(1, 33, 41)).shape[1] == 5


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_network_has_the_plain_networks_logits(tiny, monkeypatch):
    monkeypatch.setattr(optimize, "compilation_pays_off", lambda *_, **__: True)
    fast = optimize.optimize_for_inference(tiny, precision="fp32", size=(33, 41), images=1)
    assert isinstance(fast.logits, optimize._CompiledLogits)
    x = images(1, 33, 41)
    assert relative(fast.logits(x), tiny.logits(x)) < 1e-4


def test_training_mode_and_an_unknown_precision_are_refused(tiny):
    with pytest.raises(ValueError, match=r"fp8.*must be one of fp32"):
        optimize.optimize_for_inference(tiny, precision="fp8")
    with pytest.raises(ValueError, match="eval"):
        optimize.optimize_for_inference(tiny.train())
