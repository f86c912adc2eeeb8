"""Operation counts against published ones, and against counting taps one by one."""

import pytest
import torch

from pipeline.model.config import ModelConfig
from pipeline.model.convolution import Convolution
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.flops import count

PAPER_HEAD = {"style": "torchvision", "num_convs": 0}


@pytest.mark.parametrize(
    ("fields", "size", "gmacs"),
    [
        ({"backbone": "resnet50", "style": "torchvision", "output_stride": 8}, 520, 168.731),
        ({"backbone": "resnet50", **PAPER_HEAD, "output_stride": 16}, 513, 50.436),
        ({"backbone": "resnet101", **PAPER_HEAD, "output_stride": 8}, 513, 246.182),
    ],
)
def test_nominal_operations_equal_published_counts(fields, size, gmacs):
    with torch.device("meta"):
        model = DeepLabV3(ModelConfig(multi_grid=(1, 1, 1), **fields))
    operations = count(model, (size, size))
    assert operations.nominal / 2e9 == pytest.approx(gmacs, rel=0.01)
    assert 0.5 * operations.nominal < operations.executed < operations.nominal


def test_executed_operations_equal_a_count_of_taps_on_the_map():
    model = DeepLabV3(ModelConfig(backbone="resnet18", num_classes=2, multi_grid=(1, 1))).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, Convolution)]
    seen = []

    def add(layer, inputs, output):
        ones = torch.ones_like(inputs[0])
        weight = torch.ones_like(layer.weight)
        place = (layer.stride, layer.padding, layer.dilation, layer.groups)
        seen.append(torch.nn.functional.conv2d(ones, weight, None, *place).double().sum().item())

    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.inference_mode():
        model.logits(torch.zeros(1, 3, 33, 49))
    for hook in hooks:
        hook.remove()
    assert count(model, (33, 49)).executed == 2 * sum(seen)
