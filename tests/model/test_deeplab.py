"""DeepLabV3: shapes, published counts, and behavior in edge cases."""

import pytest
import torch

from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3, TrainingLogits

MOBILE = {"backbone": "mobilenet_v2", "multi_grid": (1, 1, 1)}
TORCHVISION = {"style": "torchvision", "multi_grid": (1, 1, 1)}
PAPER_HEAD = {**TORCHVISION, "num_convs": 0}
CASCADE = {"head": "cascade", "atrous_rates": (), "image_pooling": False}
SMALL = {
    "paper": ModelConfig(**MOBILE, num_classes=3),
    "torchvision": ModelConfig(**MOBILE, num_classes=3, style="torchvision"),
    "tensorflow": ModelConfig(**MOBILE, num_classes=3, style="tensorflow"),
    "decoder": ModelConfig(**MOBILE, num_classes=3, decoder=True),
}


def shell(**fields):
    """Return a network without memory for its weights."""
    with torch.device("meta"):
        return DeepLabV3(ModelConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "parameters", "keys"),
    [
        ({"backbone": "resnet50", **TORCHVISION, "auxiliary": True}, 42_004_074, 370),
        ({"backbone": "resnet50", **TORCHVISION}, 39_638_869, 362),
        ({"backbone": "resnet101", **TORCHVISION, "auxiliary": True}, 60_996_202, 676),
        ({"backbone": "resnet101", **TORCHVISION}, 58_630_997, 668),
        ({"backbone": "resnet50"}, 39_048_533, 356),
        ({"backbone": "resnet101"}, 58_040_661, 662),
        ({"backbone": "resnet50", **PAPER_HEAD}, 39_048_533, 356),
        ({"backbone": "resnet101", **PAPER_HEAD}, 58_040_661, 662),
    ],
)
def test_parameter_and_key_counts_equal_published_ones(fields, parameters, keys):
    model = shell(**fields)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("blocks", [4, 5, 6, 7])
@pytest.mark.parametrize(
    ("name", "imagenet"), [("resnet50", 25_557_032), ("resnet101", 44_549_160)]
)
def test_a_cascade_has_the_parameters_of_its_blocks(name, imagenet, blocks):
    """Uses published counts of the ImageNet networks, and a block's counted by hand."""
    unit = 2048 * 512 + 512 * 512 * 9 + 512 * 2048 + 2 * (512 + 512 + 2048)
    backbone = imagenet - (2048 * 1000 + 1000) + (blocks - 4) * 3 * unit
    model = shell(backbone=name, blocks=blocks, **CASCADE)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == backbone + 2048 * 21 + 21
    # One weight and five entries of batch normalization for each of nine convolutions per block.
    assert len(model.state_dict()) == {"resnet50": 320, "resnet101": 626}[name] + (blocks - 4) * 54


@pytest.mark.parametrize(
    ("fields", "side", "published"),
    [
        ({"backbone": "resnet50", **TORCHVISION, "output_stride": 8}, 520, 168.731),
        ({"backbone": "resnet101", **TORCHVISION, "output_stride": 8}, 520, 248.752),
        # The paper's head on a backbone in torchvision's style: its stride is in the first unit.
        ({"backbone": "resnet50", **PAPER_HEAD, "output_stride": 16}, 513, 50.436),
        ({"backbone": "resnet50", **PAPER_HEAD, "output_stride": 8}, 513, 166.161),
        ({"backbone": "resnet101", **PAPER_HEAD, "output_stride": 16}, 513, 71.061),
        ({"backbone": "resnet101", **PAPER_HEAD, "output_stride": 8}, 513, 246.182),
        # VainF's table, which counts batch normalization too.
        ({"backbone": "resnet50", **TORCHVISION, "decoder": True, "num_convs": 1}, 513, 62.7),
        ({**MOBILE, "style": "torchvision"}, 513, 6.0),
        ({**MOBILE, "style": "torchvision", "decoder": True, "num_convs": 1}, 513, 17.0),
    ],
)
def test_multiply_accumulates_are_within_1_percent_of_published_counts(fields, side, published):
    from torch.utils.flop_counter import FlopCounterMode

    model = shell(**fields).eval()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    assert counter.get_total_flops() / 2e9 == pytest.approx(published, rel=0.01)


def test_set_output_stride_changes_rates_and_config_but_no_weight():
    model = DeepLabV3(SMALL["paper"]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_output_stride(8)
    assert model.config.output_stride == 8
    assert model.logits(torch.zeros(1, 3, 64, 80)).shape == (1, 3, 8, 10)
    assert [model.classifier[0].convs[i][0].dilation[0] for i in (1, 2, 3)] == [12, 24, 36]
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_output_stride_with_fractional_rates_leaves_the_model_unchanged():
    model = DeepLabV3(ModelConfig(**MOBILE, atrous_rates=(3,)))
    with pytest.raises(ValueError, match=r"atrous_rates \(3,\).*output_stride 32"):
        model.set_output_stride(32)
    assert model.config.output_stride == 16
    assert model.classifier[0].convs[1][0].dilation == (3, 3)


def test_an_unsupported_output_stride_leaves_the_model_unchanged():
    model = shell(backbone="resnet18", blocks=5, **CASCADE, multi_grid=(1, 2))
    model.set_output_stride(64)
    with pytest.raises(ValueError, match="128: must be one of 4, 8, 16, 32, 64; with 5 blocks"):
        model.set_output_stride(128)
    assert model.config.output_stride == 64


def test_a_cascades_logits_have_the_images_size_at_every_output_stride():
    model = shell(backbone="resnet18", blocks=7, **CASCADE, multi_grid=(1, 2), num_classes=3).eval()
    for power in (2, 5, 6, 8):
        model.set_output_stride(2**power)
        for size in [(1, 1), (37, 66)]:
            side = [-(-n // 2**power) for n in size]
            images = torch.ones(1, 3, *size, device="meta")
            assert list(model.logits(images).shape) == [1, 3, *side]
            assert model(images).shape == (1, 3, *size)


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
@pytest.mark.parametrize("style", SMALL)
def test_logits_have_the_images_size_even_for_tiny_images(style, output_stride, randomize):
    model = randomize(DeepLabV3(SMALL[style]))
    model.set_output_stride(output_stride)
    with torch.inference_mode():
        for size in [(1, 1), (1, 100), (5, 7), (33, 18)]:
            logits = model(torch.ones(1, 3, *size))
            assert logits.shape == (1, 3, *size)
            assert logits.isfinite().all()


def test_training_on_a_batch_of_one_is_refused_with_the_way_out():
    model = DeepLabV3(SMALL["paper"]).train()
    with pytest.raises(ValueError, match="batch of at least 2"):
        model(torch.zeros(1, 3, 65, 65))
    assert model(torch.zeros(2, 3, 65, 65)).shape == (2, 3, 65, 65)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    assert model(torch.zeros(1, 3, 65, 65)).shape == (1, 3, 65, 65)


def test_the_auxiliary_head_is_used_only_in_training():
    config = ModelConfig(
        backbone="resnet18", num_classes=3, style="torchvision", auxiliary=True, multi_grid=(1, 1)
    )
    model = DeepLabV3(config).train()
    images = torch.randn(2, 3, 33, 41)
    outputs = model(images)
    assert isinstance(outputs, TrainingLogits)
    assert outputs.logits.shape == outputs.auxiliary.shape == (2, 3, 33, 41)
    (outputs.logits.mean() + outputs.auxiliary.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.eval()(images), torch.Tensor)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8, 3), (1, 3, 0, 8), (0, 3, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(n, 3, h, w\)"):
        DeepLabV3(SMALL["paper"])(torch.zeros(shape))


@pytest.mark.parametrize("side", [513, 500, 65, 1])
def test_tensorflow_style_resizes_logits_of_a_scaled_image_to_the_original(side):
    """A ramp of positions in the scaled image becomes p (scaled - 1) / (size - 1) at pixel p."""
    model = DeepLabV3(SMALL["tensorflow"])
    scaled, stride = int((side - 1) * 0.75) + 1, model.config.output_stride
    padded = -(-(scaled - 1) // 16) * 16 + 1
    ramp = torch.arange((padded - 1) // stride + 1, dtype=torch.float64) * stride
    logits = ramp[None, None, :, None].expand(1, 3, -1, len(ramp))
    up = model.upsample(logits, image_size=(scaled, scaled), size=(side, side))
    wanted = [p * (scaled - 1) / max(side - 1, 1) for p in range(side)]
    torch.testing.assert_close(
        up[0, 0, :, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-4
    )
    turned = model.upsample(logits.mT, image_size=(scaled, scaled), size=(side, side))
    torch.testing.assert_close(turned, up.mT)
