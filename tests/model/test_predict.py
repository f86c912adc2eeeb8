"""Inference: probabilities over scales and flips, and sliding windows on large images."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.predict import SlidingWindow, predict, segment, tile_spans

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
MOBILE = {"backbone": "mobilenet_v2", "multi_grid": (1, 1, 1), "num_classes": 4}


class Scripted(nn.Module):
    """A stand-in for a network: `answer` returns its logits, at the image's resolution."""

    def __init__(self, answer, *, align_corners=False, dtype=torch.float32):
        super().__init__()
        self.config = ModelConfig(**MOBILE)
        self.align_corners = align_corners
        self.anchor = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.answer = answer
        self.seen = []
        self.eval()

    def logits(self, images):
        self.seen.append(tuple(images.shape[-2:]))
        return self.answer(images)

    def upsample(self, logits, *, image_size, size, rows):
        assert tuple(logits.shape[-2:]) == image_size
        whole = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        return whole[:, :, rows]


def colors(images):
    """Return logits that are red, green, blue, and their sum, as a 1x1 convolution would."""
    return 3 * torch.cat([images, images.sum(1, keepdim=True)], 1)


def random_images(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def normalized(n, height, width, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("style", ["paper", "torchvision", "tensorflow"])
def test_a_single_scale_gives_the_softmax_of_a_forward_pass(style, randomize):
    model = randomize(DeepLabV3(ModelConfig(**MOBILE, style=style))).double()
    images = normalized(2, 37, 50).double()
    with torch.inference_mode():
        wanted = model(images).softmax(1).float()
    torch.testing.assert_close(predict(model, images), wanted)


def test_probabilities_are_averaged_not_logits():
    answers = iter([4.0, -2.0])

    def answer(images):
        n, _, h, w = images.shape
        return torch.tensor([next(answers), 0.0])[None, :, None, None].expand(n, 2, h, w)

    probabilities = predict(Scripted(answer), normalized(1, 3, 4), flip=True)
    by_hand = (1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(2))) / 2
    assert abs(by_hand - 1 / (1 + math.exp(-1))) > 0.1
    torch.testing.assert_close(probabilities[:, 0], torch.full((1, 3, 4), by_hand))


def test_a_constant_network_is_constant_over_scales_and_flips():
    def answer(images):
        n, _, h, w = images.shape
        return torch.tensor([1.0, 2.0, 0.5])[None, :, None, None].expand(n, 3, h, w)

    probabilities = predict(Scripted(answer), normalized(2, 5, 7), scales=PAPER_SCALES, flip=True)
    wanted = torch.tensor([1.0, 2.0, 0.5]).softmax(0)[None, :, None, None].expand(2, 3, 5, 7)
    torch.testing.assert_close(probabilities, wanted)


def test_mirrored_copies_are_mirrored_back():
    images = normalized(2, 5, 7)
    model = Scripted(colors)
    torch.testing.assert_close(predict(model, images, flip=True), predict(model, images))


def test_flipping_makes_an_asymmetric_network_symmetric(randomize):
    model = randomize(DeepLabV3(ModelConfig(**MOBILE))).double()
    images = normalized(1, 33, 49).double()
    direct = predict(model, images, flip=True)
    mirrored = predict(model, images.flip(3), flip=True)
    torch.testing.assert_close(mirrored.flip(3), direct)


@pytest.mark.parametrize(
    ("aligned", "sides"),
    [(True, [257, 385, 513, 641, 769, 897]), (False, [257, 385, 513, 641, 770, 898])],
)
def test_scaled_sizes_equal_the_references(aligned, sides):
    model = Scripted(colors, align_corners=aligned)
    predict(model, torch.zeros(1, 3, 513, 1), scales=PAPER_SCALES)
    assert [height for height, _ in model.seen] == sides


@pytest.mark.parametrize("style", ["paper", "torchvision", "tensorflow"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_tiny_images_have_masks_at_every_scale(style, output_stride, randomize):
    model = randomize(DeepLabV3(ModelConfig(**MOBILE, style=style, output_stride=output_stride)))
    for size in [(1, 1), (1, 500), (5, 7)]:
        mask, confidence = segment(model, random_images(1, *size), scales=(0.25, 1.0), flip=True)
        assert mask.shape == confidence.shape == (1, *size)
        assert (confidence >= 0.25).all()
        assert (confidence <= 1 + 1e-6).all()


def test_segment_normalizes_with_the_checkpoints_mean_and_std():
    image = random_images(2, 6, 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = colors(((image / 255 - mean) / std).permute(0, 3, 1, 2)).softmax(1)
    mask, confidence = segment(Scripted(colors), image)
    assert mask.dtype == torch.uint8
    torch.testing.assert_close(confidence, wanted.amax(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(mask.long(), wanted.argmax(1))


def test_read_only_arrays_and_tensors_give_the_same_masks():
    image = random_images(1, 6, 5)
    array = image.numpy()
    array.flags.writeable = False
    for a, b in zip(
        segment(Scripted(colors), array), segment(Scripted(colors), image), strict=True
    ):
        assert torch.equal(a, b)
    segment(Scripted(colors), array[:, ::-1])


@pytest.mark.parametrize("size", [(64, 200), (150, 211), (65, 64), (3, 500)])
def test_a_window_does_not_change_masks_if_logits_are_local(size):
    image = random_images(2, *size)
    window = SlidingWindow(size=64, overlap=16, threshold_pixels=1000)
    whole, tiled = Scripted(colors), Scripted(colors)
    wanted = segment(whole, image, window=SlidingWindow(threshold_pixels=10**9), flip=True)
    found = segment(tiled, image, window=window, flip=True)
    assert len(whole.seen) == 2
    assert len(tiled.seen) > 2
    assert max(max(seen) for seen in tiled.seen) <= 64
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_does_not_change_masks_if_its_context_covers_the_kernel():
    # in fp64: maps of other sizes are summed in another order, and a mask shows the least of it
    kernel = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()

    def blurred(images):
        return nn.functional.conv2d(images, kernel, padding=4)

    image = random_images(1, 90, 131)
    wanted, _ = segment(Scripted(blurred, dtype=torch.float64), image)
    window = SlidingWindow(size=32, overlap=8, threshold_pixels=1)
    found, _ = segment(Scripted(blurred, dtype=torch.float64), image, window=window)
    assert torch.equal(found, wanted)


@given(length=st.integers(1, 3000), size=st.integers(1, 1100), overlap=st.integers(0, 1099))
def test_tiles_keep_every_pixel_once_with_half_the_overlap_around_it(length, size, overlap):
    window = SlidingWindow(size=size, overlap=overlap % size)
    kept = []
    for span in tile_spans(length, window):
        assert 0 <= span.start <= span.keep_start < span.keep_end <= span.end <= length
        assert span.end - span.start == min(size, length)
        assert span.keep_start - span.start >= window.overlap // 2 or span.start == 0
        assert span.end - span.keep_end >= window.overlap // 2 or span.end == length
        kept += range(span.keep_start, span.keep_end)
    assert kept == list(range(length))


@pytest.mark.parametrize("style", ["paper", "tensorflow"])
def test_a_mask_does_not_depend_on_other_images_of_the_batch(style, randomize):
    model = randomize(DeepLabV3(ModelConfig(**MOBILE, style=style)))
    images = random_images(4, 60, 81)
    together, _ = segment(model, images, scales=(0.5, 1.0))
    alone = torch.cat([segment(model, images[i : i + 1], scales=(0.5, 1.0))[0] for i in range(4)])
    assert len(together.unique()) > 1
    assert (together == alone).float().mean() >= 0.999


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (math.nan,), (math.inf,)])
def test_invalid_scales_are_refused(scales):
    with pytest.raises(ValueError, match="scales"):
        predict(Scripted(colors), normalized(1, 3, 4), scales=scales)
    with pytest.raises(ValueError, match="scales"):
        segment(Scripted(colors), random_images(1, 3, 4), scales=scales)


def test_training_mode_and_images_of_the_wrong_type_are_refused():
    with pytest.raises(ValueError, match="eval"):
        predict(Scripted(colors).train(), normalized(1, 3, 4))
    with pytest.raises(ValueError, match="uint8"):
        segment(Scripted(colors), normalized(1, 3, 4))
    with pytest.raises(ValueError, match="uint8"):
        segment(Scripted(colors), np.zeros((1, 3, 4, 3), np.float32))
    with pytest.raises(ValueError, match="float"):
        predict(Scripted(colors), random_images(1, 3, 4))


@pytest.mark.parametrize("fields", [{"size": 0}, {"overlap": 1025}, {"threshold_pixels": 0}])
def test_an_invalid_window_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SlidingWindow(**fields)
