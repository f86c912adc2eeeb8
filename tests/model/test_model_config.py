"""Model configs: valid ones can be built, invalid ones are refused by field."""

import pytest

from pipeline.model.config import ModelConfig

CASCADE = {"head": "cascade", "blocks": 7, "atrous_rates": (), "image_pooling": False}
MOBILE = {"backbone": "mobilenet_v2", "multi_grid": (1, 1, 1)}


@pytest.mark.parametrize(
    ("output_stride", "rates"),
    [(4, (24, 48, 72)), (8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))],
)
def test_rates_are_scaled_from_output_stride_16(output_stride, rates):
    assert ModelConfig(output_stride=output_stride).rates == rates


def test_a_rate_that_becomes_fractional_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"\(5, 12\).*even rates"):
        ModelConfig(atrous_rates=(5, 12), output_stride=32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "vgg16"}, "resnet18, resnet34, resnet50, resnet101, mobilenet_v2"),
        ({"output_stride": 12}, "output_stride 12: must be one of 4, 8, 16, 32; with 4 blocks"),
        ({"output_stride": 8.0}, r"output_stride 8\.0: must"),
        ({"output_stride": 64}, "64: must be one of 4, 8, 16, 32;"),
        ({**CASCADE, "blocks": 6, "output_stride": 256}, "256: .* 64, 128; with 6 blocks"),
        ({**CASCADE, "blocks": 8}, "blocks 8: .*from 4 to 7"),
        ({**CASCADE, "multi_grid": (1, 2)}, "3 unit rates"),
        ({**CASCADE, "atrous_rates": (6,)}, r"give atrous_rates=\(\)$"),
        ({"head": "cascade"}, r"give atrous_rates=\(\), image_pooling=False$"),
        ({**CASCADE, "decoder": True, "num_convs": 1}, "give decoder=False, num_convs=None$"),
        ({**CASCADE, "style": "torchvision", "auxiliary": True}, "give auxiliary=False"),
        ({**CASCADE, **MOBILE}, "'cascade' is for ResNets"),
        ({"head": "fcn"}, "head 'fcn': must be one of aspp, cascade"),
        ({"blocks": 7}, "needs head 'cascade'.*blocks=4"),
        ({"num_convs": -1}, "num_convs -1: .*from 0"),
        ({"num_convs": 10**6}, "num_convs 1000000: must"),
        ({"decoder": 1}, "decoder 1: must be one of True, False"),
        ({**MOBILE, "style": "tensorflow", "decoder": True}, "right after the ASPP.*decoder=False"),
        ({**MOBILE, "style": "tensorflow", "num_convs": 1}, "right after the ASPP.*num_convs=None"),
        ({**MOBILE, "style": "torchvision", "auxiliary": True}, "and a ResNet"),
        ({"style": "caffe"}, "paper, torchvision, tensorflow"),
        ({"num_classes": 256}, "256: .*255 means ignore"),
        ({"num_classes": True}, "num_classes True: "),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"mean": (123.7, 116.3, 103.5)}, "divide by 255"),
        ({"std": (0.0, 1.0, 1.0)}, "0..1 pixel scale"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"atrous_rates": [6, 12]}, "tuple of positive integers"),
        ({"atrous_rates": (0,)}, "tuple of positive integers"),
        ({"multi_grid": (1, 2)}, "3 unit rates"),
        ({"backbone": "resnet18"}, "2 unit rates"),
        ({"backbone": "mobilenet_v2"}, "for ResNets"),
        ({"style": "tensorflow"}, "mobilenet_v2, got resnet101"),
        ({"auxiliary": True}, "auxiliary=False"),
        ({"image_pooling": "yes"}, "'yes': must be one of True, False"),
    ],
)
def test_an_invalid_value_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


@pytest.mark.parametrize("blocks", [4, 5, 6, 7])
def test_a_cascade_has_every_output_stride_that_its_blocks_allow(blocks):
    strides = [4, 8, 16, 32, 64, 128, 256][:blocks]
    for stride in strides:
        ModelConfig(**{**CASCADE, "blocks": blocks, "output_stride": stride})
    with pytest.raises(ValueError, match=f"{strides[-1] * 2}: must be one of .*{strides[-1]};"):
        ModelConfig(**{**CASCADE, "blocks": blocks, "output_stride": strides[-1] * 2})


@pytest.mark.parametrize(
    ("fields", "convs"),
    [
        ({}, 0),
        ({"style": "torchvision"}, 1),
        ({"style": "torchvision", "num_convs": 0}, 0),
        ({"decoder": True}, 2),
        ({"style": "torchvision", "decoder": True}, 2),
        ({"decoder": True, "num_convs": 1}, 1),
        ({**CASCADE, "style": "torchvision"}, 0),
    ],
)
def test_a_head_has_as_many_convolutions_as_its_source_by_default(fields, convs):
    assert ModelConfig(**fields).convs == convs


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**MOBILE, atrous_rates=(), style="tensorflow"),
        ModelConfig(**CASCADE, output_stride=256),
        ModelConfig(decoder=True, num_convs=1, atrous_rates=(6, 12, 18, 24)),
    ],
)
def test_a_config_survives_a_round_trip_through_json(config):
    assert ModelConfig.from_json(config.to_json()) == config


def test_json_without_newer_fields_keeps_its_meaning():
    text = (
        '{"atrous_rates": [6, 12, 18], "auxiliary": true, "backbone": "resnet50", '
        '"dropout": 0.5, "image_pooling": true, "mean": [0.5, 0.5, 0.5], "multi_grid": [1, 1, 1], '
        '"num_classes": 7, "output_stride": 8, "std": [0.5, 0.5, 0.5], "style": "torchvision"}'
    )
    config = ModelConfig.from_json(text)
    assert (config.head, config.blocks, config.decoder, config.convs) == ("aspp", 4, False, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "JSON object"), ('{"unheard_of": true}', "unknown fields")],
)
def test_json_that_is_not_a_config_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(text)
