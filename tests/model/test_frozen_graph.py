"""The TensorFlow zoo's file: our network against its graph, written out by hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.model import weights

# Index in the graph -> channels, stride at output stride 8, rate.
UNITS = [
    (16, 1, 1),
    (24, 2, 1), (24, 1, 1),
    (32, 2, 1), (32, 1, 1), (32, 1, 1),
    (64, 1, 1), (64, 1, 2), (64, 1, 2), (64, 1, 2),
    (96, 1, 2), (96, 1, 2), (96, 1, 2),
    (160, 1, 2), (160, 1, 4), (160, 1, 4),
    (320, 1, 4),
]  # fmt: skip
CLASSES = 5

REAL_FILE = os.environ.get("DEEPLAB_TFZOO_NPZ", "")
"""deeplabv3_mnv2_pascal_trainval_max as an npz file of 8 MB, which the project does not ship."""
DEMO_CHECKPOINT = Path(__file__).parents[2] / "jobs/demo/tfzoo-voc-mobilenetv2.safetensors"


def random_graph():
    """Return the constants of a frozen graph, by the zoo's names, with random values."""
    random = np.random.default_rng(0)
    graph = {"ResizeBilinear_1.size": np.array([513, 513], np.int32)}

    def draw(*shape, scale=0.1):
        return random.normal(0, scale, shape).astype(np.float32)

    def convolution(name, kernel, inputs, outputs):
        scale = (2 / (kernel * kernel * inputs)) ** 0.5
        graph[f"{name}.Conv2D.merged_input"] = draw(kernel, kernel, inputs, outputs, scale=scale)
        graph[f"{name}.BatchNorm.FusedBatchNorm.Offset"] = draw(outputs)

    convolution("MobilenetV2.Conv", 3, 3, 32)
    inputs = 32
    for index, (outputs, _, _) in enumerate(UNITS):
        name = "MobilenetV2.expanded_conv" + (f"_{index}" if index else "")
        width = inputs * 6 if index else inputs
        if index:
            convolution(f"{name}.expand", 1, inputs, width)
        graph[f"{name}.depthwise.depthwise_weights"] = draw(3, 3, width, 1, scale=0.5)
        graph[f"{name}.depthwise.BatchNorm.FusedBatchNorm.Scaled"] = 1 + draw(width)
        graph[f"{name}.depthwise.BatchNorm.FusedBatchNorm.Offset"] = draw(width)
        convolution(f"{name}.project", 1, width, outputs)
        inputs = outputs
    for name, channels in (("image_pooling", 320), ("aspp0", 320), ("concat_projection", 512)):
        convolution(name, 1, channels, 256)
    graph["logits.semantic.weights"] = draw(1, 1, 256, CLASSES)
    graph["logits.semantic.biases"] = draw(CLASSES)
    paddings = "MobilenetV2.expanded_conv_7.depthwise.depthwise.SpaceToBatchND.paddings"
    graph[paddings] = np.zeros((2, 2), np.int32)
    return graph


def same(x, kernel, bias, *, stride=1, rate=1, groups=1):
    """Convolve with TensorFlow's SAME padding: ceil(n / stride) outputs."""
    pads = []
    for n in (x.shape[3], x.shape[2]):
        reach = (kernel.shape[2] - 1) * rate
        total = max(((n + stride - 1) // stride - 1) * stride + reach + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    padded = functional.pad(x, pads)
    return functional.conv2d(padded, kernel, bias, stride, 0, rate, groups)


def evaluate(graph, image):
    """Return the graph's logits at the size of `image` (1, 3, h, w), in float64."""
    values = {key: torch.tensor(value).double() for key, value in graph.items()}

    def convolution(name, x, **options):
        kernel = values[f"{name}.Conv2D.merged_input"].permute(3, 2, 0, 1)
        return same(x, kernel, values[f"{name}.BatchNorm.FusedBatchNorm.Offset"], **options)

    height, width = image.shape[2:]
    while (image.shape[2] - 1) % 16:
        image = functional.pad(image, (0, 0, 0, 1))
    while (image.shape[3] - 1) % 16:
        image = functional.pad(image, (0, 1))
    x = convolution("MobilenetV2.Conv", image, stride=2).clamp(0, 6)
    for index, (_, stride, rate) in enumerate(UNITS):
        name = "MobilenetV2.expanded_conv" + (f"_{index}" if index else "")
        y = convolution(f"{name}.expand", x).clamp(0, 6) if index else x
        norm = f"{name}.depthwise.BatchNorm.FusedBatchNorm"
        kernel = values[f"{name}.depthwise.depthwise_weights"] * values[f"{norm}.Scaled"][:, None]
        kernel = kernel.permute(2, 3, 0, 1)
        y = same(
            y, kernel, values[f"{norm}.Offset"], stride=stride, rate=rate, groups=len(kernel)
        ).clamp(0, 6)
        y = convolution(f"{name}.project", y)
        x = x + y if x.shape == y.shape else y
    pooled = convolution("image_pooling", x.mean((2, 3), keepdim=True)).relu()
    branches = [pooled + torch.zeros(1, 1, *x.shape[2:]), convolution("aspp0", x).relu()]
    x = convolution("concat_projection", torch.cat(branches, 1)).relu()
    kernel = values["logits.semantic.weights"].permute(3, 2, 0, 1)
    x = functional.conv2d(x, kernel, values["logits.semantic.biases"])
    x = functional.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)
    return x[:, :, :height, :width]


@pytest.fixture(scope="module")
def graph():
    return random_graph()


@pytest.fixture(scope="module")
def path(graph, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "zoo.npz"
    np.savez(path, **graph)
    return str(path)


@pytest.mark.parametrize("size", [(33, 49), (37, 50), (1, 20)])
def test_the_network_equals_the_zoos_graph_written_out_by_hand(size, graph, path):
    model, classes = weights.load(path)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3)).double()
    with torch.inference_mode():
        logits = model.double()(image)
        wanted = evaluate(graph, image)
    assert len(classes.names) == CLASSES
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not REAL_FILE, reason="DEEPLAB_TFZOO_NPZ does not name the zoo's npz")
def test_the_real_file_at_513_is_within_1e_4_of_its_graph():
    with np.load(REAL_FILE) as archive:
        graph = {key: archive[key] for key in archive.files if archive[key].dtype == np.float32}
    model, classes = weights.load(REAL_FILE)
    # Waves on the -1..1 scale, padded with gray to 513 x 513.
    rows, columns = torch.meshgrid(torch.arange(375.0), torch.arange(500.0), indexing="ij")
    waves = [torch.sin(rows / 31) * torch.cos(columns / k) for k in (17, 43, 90)]
    image = functional.pad(torch.stack(waves)[None], (0, 13, 0, 138))
    with torch.inference_mode():
        logits, wanted = model(image), evaluate(graph, image.double())
    assert logits.shape == (1, 21, 513, 513)
    assert len(classes.names) == 21
    difference = (logits - wanted).abs().max() / wanted.abs().max()
    assert difference <= 1e-4


def test_the_demos_checkpoint_loads_though_older_than_some_fields():
    model, classes = weights.load(str(DEMO_CHECKPOINT))
    assert (model.config.style, model.config.head, model.config.convs) == ("tensorflow", "aspp", 0)
    assert model(torch.zeros(1, 3, 20, 30)).shape == (1, len(classes.names), 20, 30)


def test_rates_for_the_zoos_network_are_refused(path):
    with pytest.raises(weights.CheckpointError, match="no atrous branches"):
        weights.load(path, atrous_rates=(6, 12, 18))


def test_a_graph_with_atrous_branches_is_refused_with_their_names(graph, tmp_path):
    path = tmp_path / "other.npz"
    extra = {"aspp1_depthwise.depthwise_weights": np.ones((3, 3, 320, 1), np.float32)}
    lacking = {key: value for key, value in graph.items() if not key.startswith("aspp0.B")}
    np.savez(path, **lacking, **extra)
    with pytest.raises(
        weights.CheckpointError, match=r"missing: aspp0.*unexpected: aspp1_depthwise"
    ):
        weights.load(str(path))


def test_an_npz_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, x=np.ones(3))
    with pytest.raises(weights.CheckpointError, match="not of the TensorFlow DeepLab zoo"):
        weights.load(str(path))
    np.savez(path, x=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(weights.CheckpointError, match="cannot be read as an npz"):
        weights.load(str(path))
