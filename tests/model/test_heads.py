"""Heads: ASPP with any branches, cascade and decoder, against the same layers by hand."""

import pytest
import torch
from torch.nn import functional

from pipeline.model.aspp import ASPP
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.features import Features
from pipeline.model.heads import build_head

MOBILE = {"backbone": "mobilenet_v2", "multi_grid": (1, 1, 1)}
PLAIN = {"backbone": "resnet18", "multi_grid": (1, 1), "num_classes": 4}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def bn_relu(x, state, name):
    """Return batch normalization and ReLU of a trained network, by definition."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).relu()


def by_hand(x, state, name, rates, pooling):
    """Return ASPP's branches, from its state_dict, with PyTorch's functions only."""
    branches = [bn_relu(functional.conv2d(x, state[f"{name}.0.0.weight"]), state, f"{name}.0.1")]
    for index, rate in enumerate(rates, start=1):
        y = functional.conv2d(x, state[f"{name}.{index}.0.weight"], padding=rate, dilation=rate)
        branches.append(bn_relu(y, state, f"{name}.{index}.1"))
    if pooling:
        last = len(rates) + 1
        y = functional.conv2d(x.mean((2, 3), keepdim=True), state[f"{name}.{last}.1.weight"])
        branches.append(bn_relu(y, state, f"{name}.{last}.2").expand(-1, -1, *x.shape[2:]))
    return torch.cat(branches, 1)


@pytest.mark.parametrize("rates", [(), (2,), (6, 12, 18), (1, 2, 3, 24)])
@pytest.mark.parametrize("pooling", [True, False])
def test_aspp_equals_its_branches_computed_by_hand(rates, pooling, randomize):
    aspp = ASPP(
        6, branches=len(rates), image_pooling=pooling, dropout=0.5, folded=False,
        pooling_first=False,
    )  # fmt: skip
    randomize(aspp).double().set_rates(rates)
    state, x = aspp.state_dict(), noise(2, 6, 9, 7)
    with torch.inference_mode():
        wanted = functional.conv2d(
            by_hand(x, state, "convs", rates, pooling), state["project.0.weight"]
        )
        torch.testing.assert_close(aspp(x), bn_relu(wanted, state, "project.1"))


def test_a_rate_beyond_the_map_gives_the_filters_1x1_center(randomize):
    config = ModelConfig(**PLAIN, atrous_rates=(66,), image_pooling=False)
    aspp = randomize(build_head(6, 6, config)).double()[0]
    x = noise(1, 6, 65, 33)
    atrous = aspp.convs[1][0]
    atrous.set_stride_and_rate(stride=1, rate=65)
    with torch.inference_mode():
        center = functional.conv2d(x, atrous.weight[:, :, 1:2, 1:2])
        torch.testing.assert_close(atrous(x), center)
        atrous.set_stride_and_rate(stride=1, rate=64)
        assert not torch.allclose(atrous(x), center)


@pytest.mark.parametrize(
    ("fields", "rates", "channels"),
    [
        ({"atrous_rates": (6, 12, 18, 24), "image_pooling": False}, [6, 12, 18, 24], 5 * 256),
        ({"atrous_rates": (6, 12, 18, 24), "output_stride": 8}, [12, 24, 36, 48], 6 * 256),
        ({"atrous_rates": (6, 12, 18), "image_pooling": False}, [6, 12, 18], 4 * 256),
    ],
)
def test_the_rates_of_the_papers_table_can_be_built(fields, rates, channels):
    with torch.device("meta"):
        aspp = DeepLabV3(ModelConfig(**fields)).classifier[0]
    assert [branch[0].dilation[0] for branch in aspp.convs[1 : len(rates) + 1]] == rates
    assert aspp.project[0].in_channels == channels


@pytest.mark.parametrize("convs", [0, 1, 2, 3])
def test_the_decoder_equals_its_layers_computed_by_hand(convs, randomize):
    config = ModelConfig(**PLAIN, decoder=True, num_convs=convs, atrous_rates=(2, 4))
    head = randomize(build_head(6, 5, config)).double()
    head.set_rates((2, 4))
    state = head.state_dict()
    low, final = noise(1, 5, 13, 18), noise(1, 6, 4, 5, seed=2)
    with torch.inference_mode():
        found = head(Features(low, final, final))
        x = by_hand(final, state, "aspp.convs", (2, 4), pooling=True)
        x = bn_relu(functional.conv2d(x, state["aspp.project.0.weight"]), state, "aspp.project.1")
        x = functional.interpolate(x, (13, 18), mode="bilinear", align_corners=False)
        y = bn_relu(functional.conv2d(low, state["project.0.weight"]), state, "project.1")
        assert y.shape[1] == 48
        x = torch.cat([y, x], 1)
        for index in range(0, convs * 3, 3):
            weight = state[f"classifier.{index}.weight"]
            assert weight.shape[0] == 256
            x = bn_relu(functional.conv2d(x, weight, padding=1), state, f"classifier.{index + 1}")
        last = f"classifier.{convs * 3}"
        wanted = functional.conv2d(x, state[f"{last}.weight"], state[f"{last}.bias"])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "resnet18", "multi_grid": (1, 1)},
        {"backbone": "resnet18", "multi_grid": (1, 2), "style": "torchvision"},
        {**MOBILE},
        {**MOBILE, "style": "torchvision"},
    ],
)
def test_a_decoders_logits_are_at_stride_4_at_any_output_stride(fields, randomize):
    model = randomize(DeepLabV3(ModelConfig(**fields, num_classes=3, decoder=True)))
    images, low = noise(1, 3, 33, 50).float(), []
    with torch.inference_mode():
        for output_stride in (4, 16, 32):
            model.set_output_stride(output_stride)
            assert model.logits(images).shape == (1, 3, 9, 13)
            low.append(model.backbone(images).low)
    for other in low[1:]:
        assert torch.equal(low[0], other)


def test_every_parameter_of_a_decoder_gets_a_gradient():
    model = DeepLabV3(ModelConfig(**PLAIN, decoder=True, style="torchvision", auxiliary=True))
    outputs = model.train()(torch.randn(2, 3, 33, 41))
    (outputs.logits.square().mean() + outputs.auxiliary.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("blocks", [4, 7])
def test_a_cascade_ends_in_a_1x1_convolution_of_its_last_block(blocks, randomize):
    config = ModelConfig(
        **PLAIN, head="cascade", blocks=blocks, atrous_rates=(), image_pooling=False
    )
    model = randomize(DeepLabV3(config)).double()
    images = noise(1, 3, 33, 50)
    with torch.inference_mode():
        final = model.backbone(images).final
        last = model.classifier[1]
        wanted = torch.einsum("nchw,kc->nkhw", final, last.weight[:, :, 0, 0])
        torch.testing.assert_close(model.logits(images), wanted + last.bias[:, None, None])
    assert sum(parameter.numel() for parameter in model.classifier.parameters()) == 512 * 4 + 4
