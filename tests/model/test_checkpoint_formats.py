"""Published formats: networks are detected by names and shapes, and every weight is placed."""

import pytest
import torch

from pipeline.data.labels import CITYSCAPES, VOC
from pipeline.model import weights
from pipeline.model.checkpoint_formats import detect_format
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.formats import CheckpointError, TensorFile
from tests.model.published import (
    DEPTHS,
    constants,
    torchvision_shapes,
    vainf_plus_shapes,
    vainf_shapes,
)


def detect(shapes):
    return detect_format(TensorFile(tensors=constants(shapes)), name="a.pth")


def shapes_of(config):
    with torch.device("meta"):
        state = DeepLabV3(config).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def test_a_torchvision_file_loads_with_every_value_in_its_place(stored):
    tensors = constants(torchvision_shapes("resnet50"))
    wrapped = {"model": {f"module._orig_mod.{key}": value for key, value in tensors.items()}}
    loaded, classes = weights.load(stored({**wrapped, "epoch": 3}))
    assert classes == VOC
    assert (loaded.config.output_stride, loaded.config.rates) == (8, (12, 24, 36))
    state = loaded.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", DEPTHS)
def test_torchvisions_networks_are_detected_by_names_and_shapes(name):
    shapes = torchvision_shapes(name, classes=7)
    config, state = detect(shapes)
    assert (config.backbone, config.num_classes, config.auxiliary) == (name, 7, True)
    assert config.style == "torchvision"
    assert shapes_of(config) == {key: tuple(value.shape) for key, value in state.items()} == shapes


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("listed", [vainf_shapes, vainf_plus_shapes])
def test_vainfs_networks_are_detected_by_names_and_shapes(listed, name):
    config, state = detect(listed(name, classes=7))
    assert (config.backbone, config.num_classes) == (name, 7)
    assert (config.style, config.auxiliary) == ("torchvision", False)
    assert config.decoder == (listed is vainf_plus_shapes)
    assert (config.output_stride, config.rates, config.dropout) == (16, (6, 12, 18), 0.1)
    assert shapes_of(config) == {key: tuple(value.shape) for key, value in state.items()}


def test_a_vainf_v3_file_loads_with_every_value_in_its_place(stored):
    tensors = constants(vainf_shapes("resnet18"))
    loaded, _ = weights.load(stored({"model_state": tensors, "cur_itrs": 3, "best_score": 0.7}))
    state = loaded.state_dict()
    for key, tensor in tensors.items():
        ours = key.replace("classifier.classifier.", "classifier.")
        assert torch.equal(state.pop(ours), tensor), key
    assert not state


def test_a_vainf_v3_plus_file_loads_with_every_value_in_its_place(stored):
    tensors = constants(vainf_plus_shapes("resnet18", classes=19))
    loaded, classes = weights.load(stored({"model_state": tensors}), output_stride=8)
    assert classes == CITYSCAPES
    assert loaded.config.rates == (12, 24, 36)
    state = loaded.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    assert loaded.logits(torch.zeros(1, 3, 33, 50)).shape == (1, 19, 9, 13)


def test_vainfs_mobilenet_is_refused_with_the_reason(stored):
    tensors = constants(
        {
            "backbone.low_level_features.0.0.weight": (32, 3, 3, 3),
            "backbone.high_level_features.4.conv.0.0.weight": (144, 24, 1, 1),
            "classifier.classifier.0.convs.0.0.weight": (256, 320, 1, 1),
            "classifier.classifier.4.weight": (21, 256, 1, 1),
        }
    )
    with pytest.raises(CheckpointError, match=r"VainF's MobileNetV2.*pads before the 1x1"):
        weights.load(stored({"model_state": tensors}))


def test_a_file_with_other_atrous_branches_needs_as_many_rates(stored):
    shapes = vainf_plus_shapes("resnet18")
    shapes = {key: shape for key, shape in shapes.items() if ".convs.4." not in key}
    file = TensorFile(tensors=constants(shapes))
    config, _ = detect_format(file, name="a.pth")
    assert not config.image_pooling
    with pytest.raises(CheckpointError, match=r"3 atrous branches.*atrous_rates.*\(6, 12\)"):
        detect_format(file, name="a.pth", atrous_rates=(6, 12))
