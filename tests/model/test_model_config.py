"""A config that exists can be built, and says what is wrong with one that cannot."""

import pytest

from pipeline.model.config import ModelConfig


@pytest.mark.parametrize(
    ("output_stride", "rates"),
    [(4, (24, 48, 72)), (8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))],
)
def test_rates_are_scaled_from_output_stride_16(output_stride, rates):
    assert ModelConfig(output_stride=output_stride).rates == rates


def test_a_rate_that_becomes_no_integer_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"\(5, 12\).*even rates"):
        ModelConfig(atrous_rates=(5, 12), output_stride=32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "vgg16"}, "resnet18, resnet34, resnet50, resnet101, mobilenet_v2.*'vgg16'"),
        ({"output_stride": 12}, "4, 8, 16, 32, got 12"),
        ({"output_stride": 8.0}, "output_stride.*got 8.0"),
        ({"style": "caffe"}, "paper, torchvision, tensorflow"),
        ({"num_classes": 256}, "255 means ignore.*256"),
        ({"num_classes": True}, "num_classes.*True"),
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
        ({"image_pooling": "yes"}, "True or False"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_json_gives_the_same_config_back():
    config = ModelConfig(
        backbone="mobilenet_v2", multi_grid=(1, 1, 1), atrous_rates=(), style="tensorflow"
    )
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "JSON object"), ('{"decoder": true}', "unknown fields")],
)
def test_json_that_is_no_config_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(text)
