"""DeepLabV3: sizes, counts known from elsewhere, and behaviour at the edges."""

import pytest
import torch

from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3, TrainingLogits

MOBILE = {"backbone": "mobilenet_v2", "multi_grid": (1, 1, 1)}
SMALL = {
    "paper": ModelConfig(**MOBILE, num_classes=3),
    "torchvision": ModelConfig(**MOBILE, num_classes=3, style="torchvision"),
    "tensorflow": ModelConfig(**MOBILE, num_classes=3, style="tensorflow"),
}


@pytest.mark.parametrize(
    ("fields", "parameters", "keys"),
    [
        ({"backbone": "resnet50", "style": "torchvision", "auxiliary": True}, 42_004_074, 370),
        ({"backbone": "resnet50", "style": "torchvision"}, 39_638_869, 362),
        ({"backbone": "resnet101", "style": "torchvision", "auxiliary": True}, 60_996_202, 676),
        ({"backbone": "resnet101", "style": "torchvision"}, 58_630_997, 668),
        ({"backbone": "resnet50"}, 39_048_533, 356),
        ({"backbone": "resnet101"}, 58_040_661, 662),
    ],
)
def test_parameters_and_keys_are_as_many_as_published(fields, parameters, keys):
    with torch.device("meta"):
        model = DeepLabV3(ModelConfig(**fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def test_the_operations_of_torchvisions_resnet_50_are_as_many_as_published():
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(
        backbone="resnet50", style="torchvision", output_stride=8, multi_grid=(1, 1, 1)
    )
    with torch.device("meta"):
        model = DeepLabV3(config).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 520, 520))
    assert counter.get_total_flops() / 2e9 == pytest.approx(168.731, abs=1e-3)


def test_set_output_stride_changes_rates_and_config_but_no_weight():
    model = DeepLabV3(SMALL["paper"]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_output_stride(8)
    assert model.config.output_stride == 8
    assert model.logits(torch.zeros(1, 3, 64, 80)).shape == (1, 3, 8, 10)
    assert [model.classifier[0].convs[i][0].dilation[0] for i in (1, 2, 3)] == [12, 24, 36]
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_output_stride_that_fits_no_rate_leaves_the_model_as_it_was():
    model = DeepLabV3(ModelConfig(**MOBILE, atrous_rates=(3,)))
    with pytest.raises(ValueError, match=r"atrous_rates \(3,\).*output_stride 32"):
        model.set_output_stride(32)
    assert model.config.output_stride == 16
    assert model.classifier[0].convs[1][0].dilation == (3, 3)


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
@pytest.mark.parametrize("style", SMALL)
def test_logits_have_the_images_size_however_tiny_it_is(style, output_stride, randomise):
    model = randomise(DeepLabV3(SMALL[style]))
    model.set_output_stride(output_stride)
    with torch.inference_mode():
        for size in [(1, 1), (1, 100), (5, 7), (33, 18)]:
            logits = model(torch.ones(1, 3, *size))
            assert logits.shape == (1, 3, *size)
            assert logits.isfinite().all()


def test_image_pooling_tells_what_a_batch_of_one_lacks_in_training():
    model = DeepLabV3(SMALL["paper"]).train()
    with pytest.raises(ValueError, match="batch of at least 2"):
        model(torch.zeros(1, 3, 65, 65))
    assert model(torch.zeros(2, 3, 65, 65)).shape == (2, 3, 65, 65)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    assert model(torch.zeros(1, 3, 65, 65)).shape == (1, 3, 65, 65)


def test_the_auxiliary_head_speaks_only_in_training():
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
def test_tensorflows_logits_of_a_scaled_image_are_resized_once_to_the_original(side):
    """A ramp that says where in the scaled image it is must say p (scaled - 1) / (size - 1)."""
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
