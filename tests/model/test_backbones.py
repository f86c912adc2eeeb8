"""Backbones: strides and rates, and atrous features that contain the strided ones."""

import pytest
import torch

from pipeline.model.mobilenet import MobileNetV2
from pipeline.model.resnet import ResNet


def rates(backbone, stage):
    """Return the rate of each 3x3 convolution of a stage, in order; a basic block has two."""
    layers = [m for _, m in getattr(backbone, stage).named_modules() if hasattr(m, "dilation")]
    return [layer.dilation[0] for layer in layers if layer.kernel_size == (3, 3)]


def strides(backbone, stage):
    layers = [m for _, m in getattr(backbone, stage).named_modules() if hasattr(m, "dilation")]
    return [layer.stride[0] for layer in layers if layer.kernel_size == (3, 3)]


def shell(name, style, blocks=4):
    """Return a ResNet without memory for its weights."""
    with torch.device("meta"):
        return ResNet(name, stride_last=style == "paper", blocks=blocks)


def built(name, style, output_stride, multi_grid=(1, 1, 1), blocks=4):
    backbone = shell(name, style, blocks)
    backbone.set_strides(output_stride=output_stride, multi_grid=multi_grid)
    return backbone


def test_torchvisions_first_unit_keeps_the_previous_stages_rate():
    backbone = built("resnet50", "torchvision", 8)
    assert rates(backbone, "layer2") == [1, 1, 1, 1]
    assert rates(backbone, "layer3") == [1, 2, 2, 2, 2, 2]
    assert rates(backbone, "layer4") == [2, 4, 4]
    assert strides(backbone, "layer2") == [2, 1, 1, 1]
    assert strides(backbone, "layer3") + strides(backbone, "layer4") == [1] * 9


def test_paper_style_strides_in_the_last_unit_and_multiplies_every_rate():
    backbone = built("resnet101", "paper", 16, (1, 2, 4))
    assert strides(backbone, "layer1") == [1, 1, 2]
    assert strides(backbone, "layer2") == [1, 1, 1, 2]
    assert set(rates(backbone, "layer3")) == {1}
    assert rates(backbone, "layer4") == [2, 4, 8]
    backbone.set_strides(output_stride=8, multi_grid=(1, 2, 4))
    assert strides(backbone, "layer2") == [1, 1, 1, 1]
    assert set(rates(backbone, "layer3")) == {2}
    assert rates(backbone, "layer4") == [4, 8, 16]


def test_output_stride_4_replaces_every_stride_after_the_stem():
    backbone = built("resnet34", "torchvision", 4)
    assert rates(backbone, "layer2") == [1, 2] + [2] * 6
    assert rates(backbone, "layer4") == [4, 8] + [8] * 4
    assert sum(map(sum, (strides(backbone, f"layer{n}") for n in (1, 2, 3, 4)))) == 32


@pytest.mark.parametrize("multi_grid", [(1, 1, 1), (1, 2, 1), (1, 2, 3), (1, 2, 4), (2, 2, 2)])
def test_cascade_rates_at_output_stride_16_are_2_4_8_16_times_the_multi_grid(multi_grid):
    backbone = built("resnet101", "paper", 16, multi_grid, blocks=7)
    assert set(rates(backbone, "layer1") + rates(backbone, "layer2")) == {1}
    assert set(rates(backbone, "layer3")) == {1}
    for stage, rate in (("layer4", 2), ("layer5", 4), ("layer6", 8), ("layer7", 16)):
        assert rates(backbone, stage) == [rate * unit for unit in multi_grid]
        assert strides(backbone, stage) == [1, 1, 1]


@pytest.mark.parametrize(
    ("output_stride", "wanted"),
    [(4, (8, 16, 32, 64)), (8, (4, 8, 16, 32)), (64, (1, 1, 2, 4)), (256, (1, 1, 1, 1))],
)
def test_each_removed_stride_doubles_the_rates_of_later_blocks(output_stride, wanted):
    backbone = built("resnet50", "paper", output_stride, blocks=7)
    stages = [f"layer{number}" for number in range(1, 8)]
    assert [rates(backbone, stage)[0] for stage in stages[3:]] == list(wanted)
    total = sum(stride == 2 for stage in stages for stride in strides(backbone, stage))
    assert 4 * 2**total == output_stride
    assert all(set(strides(backbone, stage)[:-1]) == {1} for stage in stages)


def test_first_units_of_a_torchvision_style_cascade_keep_the_previous_rate():
    backbone = built("resnet50", "torchvision", 16, (1, 2, 1), blocks=6)
    assert rates(backbone, "layer4") == [1, 4, 2]
    assert rates(backbone, "layer5") == [2, 8, 4]
    assert rates(backbone, "layer6") == [4, 16, 8]


def test_blocks_5_to_7_are_copies_of_block4():
    backbone = built("resnet50", "paper", 16, blocks=7)
    copies = [dict(getattr(backbone, f"layer{n}").named_parameters()) for n in (5, 6, 7)]
    fourth = dict(backbone.layer4.named_parameters())
    for copy in copies:
        # Except for the input channels: 2048 need no projection.
        assert copy.keys() == {name for name in fourth if "downsample" not in name}
        shapes = {name: p.shape for name, p in copy.items() if name != "0.conv1.weight"}
        assert shapes == {name: fourth[name].shape for name in shapes}
        assert copy["0.conv1.weight"].shape == (512, 2048, 1, 1)


def test_mobilenet_has_the_zoos_rates_at_output_stride_8():
    backbone = MobileNetV2()
    backbone.set_strides(output_stride=8)
    depthwise = [m for m in backbone.modules() if getattr(m, "groups", 1) > 1]
    assert [layer.dilation[0] for layer in depthwise] == [1] * 7 + [2] * 7 + [4] * 3
    assert [i for i, layer in enumerate(depthwise) if layer.stride == (2, 2)] == [1, 3]


@pytest.mark.parametrize("style", ["paper", "torchvision"])
@pytest.mark.parametrize(
    ("name", "multi_grid", "output_stride"),
    [
        ("resnet18", (1, 2), 4),
        ("resnet18", (1, 1), 8),
        ("resnet34", (1, 1, 1), 16),
        ("resnet50", (1, 1, 1), 8),
        ("resnet50", (1, 2, 4), 16),
    ],
)
def test_sampled_atrous_features_equal_strided_features(
    name, multi_grid, style, output_stride, randomize
):
    backbone = randomize(shell(name, style).to_empty(device="cpu")).double()
    image = torch.randn(1, 3, 33, 49, generator=torch.Generator().manual_seed(1)).double()
    step = 32 // output_stride
    with torch.inference_mode():
        backbone.set_strides(output_stride=32, multi_grid=multi_grid)
        strided = backbone(image).final
        backbone.set_strides(output_stride=output_stride, multi_grid=multi_grid)
        atrous = backbone(image).final
    assert strided.shape[-2:] == (2, 2)
    torch.testing.assert_close(atrous[..., ::step, ::step], strided, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("style", ["paper", "torchvision"])
@pytest.mark.parametrize(
    ("blocks", "strided_at", "output_stride", "multi_grid"),
    [(7, 256, 16, (1, 1)), (7, 64, 16, (1, 2)), (5, 64, 8, (2, 1))],
)
def test_sampled_atrous_features_of_a_cascade_equal_strided_features(
    blocks, strided_at, output_stride, multi_grid, style, randomize
):
    backbone = randomize(shell("resnet18", style, blocks).to_empty(device="cpu")).double()
    # one column of features is enough at large strides, and saves seconds
    size = (strided_at + 2, min(strided_at, 64) + 1)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    step = strided_at // output_stride
    with torch.inference_mode():
        backbone.set_strides(output_stride=strided_at, multi_grid=multi_grid)
        strided = backbone(image)
        backbone.set_strides(output_stride=output_stride, multi_grid=multi_grid)
        atrous = backbone(image)
    assert strided.final.shape[-2:] == (2, 2 if strided_at == 64 else 1)
    torch.testing.assert_close(
        atrous.final[..., ::step, ::step], strided.final, rtol=1e-5, atol=1e-9
    )
    torch.testing.assert_close(atrous.low, strided.low)


@pytest.mark.parametrize("output_stride", [4, 8, 16])
def test_sampled_atrous_features_of_mobilenet_equal_strided_features(output_stride, randomize):
    backbone = randomize(MobileNetV2()).double()
    image = torch.randn(1, 3, 33, 49, generator=torch.Generator().manual_seed(1)).double()
    step = 32 // output_stride
    with torch.inference_mode():
        backbone.set_strides(output_stride=32)
        strided = backbone(image).final
        backbone.set_strides(output_stride=output_stride)
        atrous = backbone(image).final
    torch.testing.assert_close(atrous[..., ::step, ::step], strided, rtol=1e-5, atol=1e-9)
