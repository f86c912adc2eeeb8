"""Weight files: ours survive a round trip, published ones load, others are refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pipeline.data.labels import VOC, Classes
from pipeline.model import weights
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.formats import CheckpointError
from tests.model.published import constants, resnet_shapes

CLASSES = Classes(names=("sky", "sea", "land"), palette=((1, 2, 3), (4, 5, 6), (7, 8, 9)))
SMALL = ModelConfig(
    backbone="mobilenet_v2", num_classes=3, multi_grid=(1, 1, 1), atrous_rates=(6,), mean=(0, 0, 0)
)


@pytest.fixture
def model(randomize):
    return randomize(DeepLabV3(SMALL))


@pytest.fixture(scope="module")
def metadata():
    """Return the metadata of a checkpoint of a `SMALL` model."""
    return safetensors_metadata(weights.to_bytes(DeepLabV3(SMALL), CLASSES))


def safetensors_metadata(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def test_a_checkpoint_survives_a_round_trip(model, stored):
    path = stored(weights.to_bytes(model.to(memory_format=torch.channels_last), CLASSES))
    loaded, classes = weights.load(path)
    assert not loaded.training
    assert loaded.config == model.config
    assert classes == CLASSES
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_same_model_gives_the_same_bytes(model):
    assert weights.to_bytes(model, CLASSES, half=True) == weights.to_bytes(
        model, CLASSES, half=True
    )


def test_half_precision_is_used_for_convolutions_within_its_range(model, stored):
    with torch.no_grad():
        model.classifier[0].project[0].weight[0, 0] = 1e6
        model.backbone.features[0][1].running_var[0] = 5.6e-45
    data = weights.to_bytes(model, CLASSES, half=True)
    for key, tensor in load_safetensors(data).items():
        narrow = tensor.ndim == 4 and "project" not in key
        assert tensor.dtype in (torch.float16 if narrow else torch.float32, torch.int64), key
    before = model.state_dict()
    loaded, _ = weights.load(stored(data))
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == before[key].dtype
        wanted = before[key] if tensor.ndim < 4 or "project" in key else before[key].half().float()
        assert torch.equal(tensor, wanted)


def test_the_number_of_classes_must_match_the_model(model):
    with pytest.raises(ValueError, match=r"21 names.*num_classes is 3"):
        weights.to_bytes(model, VOC)


def test_output_stride_and_rates_can_be_replaced(model, stored):
    path = stored(weights.to_bytes(model, CLASSES))
    loaded, _ = weights.load(path, output_stride=4, atrous_rates=(3,))
    assert (loaded.config.output_stride, loaded.config.rates) == (4, (12,))


def test_rates_for_a_network_without_atrous_branches_are_refused(stored):
    cascade = ModelConfig(
        backbone="resnet18", num_classes=3, multi_grid=(1, 2), head="cascade", blocks=5,
        atrous_rates=(), image_pooling=False,
    )  # fmt: skip
    path = stored(weights.to_bytes(DeepLabV3(cascade), CLASSES))
    with pytest.raises(ValueError, match=r"head 'cascade'.*atrous_rates=\(\)"):
        weights.load(path, atrous_rates=(6,))
    loaded, _ = weights.load(path, output_stride=64)
    assert loaded.config.output_stride == 64


def test_other_numbers_of_classes_need_reset_classifier(model, stored):
    path = stored(weights.to_bytes(model, CLASSES))
    with pytest.raises(CheckpointError, match=r"has 3 classes, but num_classes is 11.*reset"):
        weights.load(path, num_classes=11)
    loaded, classes = weights.load(path, num_classes=11, reset_classifier=True)
    assert len(classes.names) == loaded.config.num_classes == 11
    assert loaded(torch.zeros(1, 3, 9, 9)).shape == (1, 11, 9, 9)
    kept = model.backbone.features[0][0].weight
    assert torch.equal(loaded.backbone.features[0][0].weight, kept)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"style": "torchvision", "auxiliary": True}, ("classifier.4", "aux_classifier.4")),
        ({"decoder": True}, ("classifier.classifier.6",)),
        (
            {"head": "cascade", "blocks": 5, "atrous_rates": (), "image_pooling": False},
            ("classifier.1",),
        ),
    ],
)
def test_reset_classifier_changes_only_the_last_layers(fields, names, stored):
    model = DeepLabV3(ModelConfig(backbone="resnet18", num_classes=3, multi_grid=(1, 2), **fields))
    path = stored(weights.to_bytes(model, CLASSES))
    loaded, _ = weights.load(path, num_classes=4, reset_classifier=True)
    before, after = model.state_dict(), loaded.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def test_load_backbone_keeps_the_weights_of_a_cascades_later_blocks(stored):
    model = DeepLabV3(
        ModelConfig(
            backbone="resnet18", multi_grid=(1, 1), head="cascade", blocks=6, style="torchvision",
            atrous_rates=(), image_pooling=False,
        )
    )  # fmt: skip
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    published = constants(resnet_shapes("resnet18") | {"fc.bias": (1000,)})
    weights.load_backbone(model, stored(published))
    for key, value in model.backbone.state_dict().items():
        added = key.startswith(("layer5.", "layer6."))
        assert torch.equal(value, before[key] if added else published[key]), key


def test_imagenet_backbones_load_without_their_classifiers(model, stored):
    mobile = {key: torch.ones_like(value) for key, value in model.backbone.state_dict().items()}
    mobile |= constants({"features.18.0.weight": (1280, 320, 1, 1), "classifier.1.bias": (1000,)})
    weights.load_backbone(model, stored(mobile))
    assert all((value == 1).all() for value in model.backbone.state_dict().values())

    config = ModelConfig(backbone="resnet18", style="torchvision", multi_grid=(1, 1))
    resnet = DeepLabV3(config)
    tensors = constants(resnet_shapes("resnet18") | {"fc.weight": (1000, 512), "fc.bias": (1000,)})
    # As in files older than PyTorch 0.4.1.
    old = {key: value for key, value in tensors.items() if not key.endswith("tracked")}
    weights.load_backbone(resnet, stored(old))
    state = resnet.backbone.state_dict()
    assert all(torch.equal(state[key], old[key]) for key in old if not key.startswith("fc"))
    with pytest.raises(CheckpointError, match=r"missing: features\.0.*unexpected: conv1\.weight"):
        weights.load_backbone(model, stored(old))


def test_a_torchvision_backbone_in_paper_style_logs_a_warning(stored, caplog):
    paper = DeepLabV3(ModelConfig(backbone="resnet18", multi_grid=(1, 1)))
    weights.load_backbone(paper, stored(constants(resnet_shapes("resnet18"))))
    assert "torchvision" in caplog.text


def test_weights_that_do_not_fit_are_listed_in_one_line(model, metadata, stored):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    del state["classifier.0.convs.0.0.weight"]
    state["decoder.weight"] = torch.zeros(1)
    state["classifier.1.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError) as error:
        weights.load(stored(save_safetensors(state, metadata)))
    message = str(error.value)
    assert "missing: classifier.0.convs.0.0.weight" in message
    assert "unexpected: decoder.weight" in message
    assert "wrong shape: classifier.1.bias (4,), expected (3,)" in message
    assert "\n" not in message


def test_weights_that_are_not_finite_are_refused(model, stored):
    with torch.no_grad():
        model.classifier[1].bias[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"not finite: classifier\.1\.bias"):
        weights.load(stored(weights.to_bytes(model, CLASSES)))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=99),
        lambda content: content.pop("classes"),
        lambda content: content["model"].update(backbone="vgg16"),
        lambda content: content["model"].update(num_classes=4),
        lambda content: content["model"].update(unheard_of=1),
        lambda content: content["classes"].update(names=["a", "a", "b"]),
        lambda content: content["classes"].update(palette=7),
    ],
)
def test_invalid_metadata_is_refused(change, metadata, stored):
    content = json.loads(metadata["deeplab"])
    change(content)
    data = save_safetensors({"w": torch.zeros(1)}, {"deeplab": json.dumps(content)})
    with pytest.raises(CheckpointError, match="invalid metadata"):
        weights.load(stored(data))
