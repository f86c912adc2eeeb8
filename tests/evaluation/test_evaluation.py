"""Evaluation, compared with a plain forward pass and a loop over pixels."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from pipeline.data import storage
from pipeline.data.datasets import Split, open_split
from pipeline.data.labels import Classes
from pipeline.data.samples import SampleError
from pipeline.evaluation.evaluate import Evaluation, evaluate, worker_indices
from pipeline.evaluation.evaluator import (
    EvalConfig,
    EvalResult,
    Evaluator,
    EvaluatorSpec,
    WorkersError,
)
from pipeline.evaluation.ray_pool import DistributedEvaluator
from pipeline.model import weights
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3

CLASSES = Classes.from_dict({"names": ["ground", "square", "noise", "never"]})
CONFIG = ModelConfig(
    backbone="mobilenet_v2",
    num_classes=4,
    multi_grid=(1, 1, 1),
    atrous_rates=(2,),
    image_pooling=False,
)
IMAGES = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of odd sizes, whose labels have pixels to ignore."""
    root = tmp_path_factory.mktemp("set")
    generator = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / "val" / name).mkdir(parents=True)
    for i in range(IMAGES):
        size = (17 + 2 * (i % 3), 23 + i % 5)
        pixels = generator.integers(0, 256, size=(*size, 3), dtype=np.uint8)
        label = generator.choice(np.array([0, 0, 1, 2, 255], dtype=np.uint8), size=size)
        Image.fromarray(pixels).save(root / "val" / "images" / f"{i:02d}.png")
        Image.fromarray(label).save(root / "val" / "labels" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def split(root: Path) -> Split:
    return open_split(str(root), "val", layout="folders", classes=CLASSES)


@pytest.fixture(scope="module")
def model() -> DeepLabV3:
    """A small network with random weights, which predicts several of its classes."""
    torch.manual_seed(5)
    model = DeepLabV3(CONFIG)
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # with the default statistics its logits would be almost zero
    model.train()(torch.randn(8, 3, 33, 33))
    return model.eval()


@pytest.fixture(scope="module")
def spec(model: DeepLabV3, split: Split, tmp_path_factory: pytest.TempPathFactory) -> EvaluatorSpec:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    path.write_bytes(weights.to_bytes(model, CLASSES))
    return EvaluatorSpec(
        checkpoint=str(path),
        digest=weights.checkpoint_sha256(path.read_bytes()),
        split=split,
        cpus=1,
    )


def counted(model: DeepLabV3, root: Path, indices: list[int]) -> np.ndarray:
    """Return the confusion (k, k) by a plain forward pass and two loops."""
    counts = np.zeros((4, 4), dtype=np.int64)
    mean, std = np.array(model.config.mean), np.array(model.config.std)
    for i in indices:
        image = np.array(Image.open(root / "val" / "images" / f"{i:02d}.png"))
        label = np.array(Image.open(root / "val" / "labels" / f"{i:02d}.png"))
        x = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
        with torch.no_grad():
            mask = model(x)[0].argmax(dim=0)
        for row in range(label.shape[0]):
            for column in range(label.shape[1]):
                if label[row, column] != 255:
                    counts[label[row, column], int(mask[row, column])] += 1
    return counts


def test_the_confusion_agrees_with_a_forward_pass_and_a_loop_over_pixels(
    model: DeepLabV3, split: Split, root: Path
) -> None:
    seen: dict[int, np.ndarray] = {}
    chosen = [3, 0, 6]
    found = evaluate(model, split, read=storage.read, indices=chosen, on_image=seen.__setitem__)
    expected = counted(model, root, chosen)
    assert np.count_nonzero(expected.sum(axis=0)) > 1  # the network predicts more than one class
    assert found.confusion.dtype == np.int64
    # a tie within rounding may go either way
    assert np.abs(found.confusion - expected).sum() <= 2
    assert found.images == 3
    assert list(seen) == chosen
    assert (sum(seen.values()) == found.confusion).all()


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_any_number_of_workers_adds_up_to_the_same_evaluation(
    model: DeepLabV3, split: Split, world: int
) -> None:
    whole = evaluate(model, split, read=storage.read)
    total = Evaluation.zeros(4)
    for rank in range(world):
        total += evaluate(
            model, split, read=storage.read, indices=worker_indices(len(split), rank, world)
        )
    assert (total.confusion == whole.confusion).all()
    assert total.images == whole.images == IMAGES


def test_every_image_belongs_to_exactly_one_worker() -> None:
    for n in range(12):
        for world in range(1, 6):
            dealt = [i for rank in range(world) for i in worker_indices(n, rank, world)]
            assert sorted(dealt) == list(range(n))
    with pytest.raises(ValueError, match="rank 2: must be"):
        worker_indices(5, 2, 2)


def snapshot(model: DeepLabV3) -> tuple[object, ...]:
    return (
        {key: value.numpy().tobytes() for key, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
        torch.is_grad_enabled(),
        model.config,
        [(m.stride, m.dilation) for m in model.modules() if isinstance(m, torch.nn.Conv2d)],
    )


def training_model() -> DeepLabV3:
    """Return a model in training, with frozen batch normalization and a step's gradients."""
    model = DeepLabV3(CONFIG).train()
    model(torch.randn(2, 3, 33, 33)).sum().backward()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def test_evaluation_leaves_a_model_in_training_bitwise_unchanged(split: Split) -> None:
    model = training_model()
    before = snapshot(model)
    evaluate(model, split, read=storage.read, indices=[0], flip=True, output_stride=8)
    assert snapshot(model) == before
    model(torch.randn(2, 3, 33, 33)).sum().backward()  # no inference tensor is left in it


def test_an_unreadable_image_is_named_and_the_model_is_left_unchanged(
    split: Split,
) -> None:
    model, threads = training_model(), threading.active_count()
    before = snapshot(model)
    bad = split.pairs[4].image

    def read(uri: str) -> bytes:
        return b"not an image" if uri == bad else storage.read(uri)

    with pytest.raises(SampleError, match=r"04\.png"):
        evaluate(model, split, read=read, output_stride=8)
    assert snapshot(model) == before
    assert threading.active_count() == threads


def test_the_next_images_are_read_while_one_is_in_the_network(
    model: DeepLabV3, split: Split
) -> None:
    third = threading.Event()

    def read(uri: str) -> bytes:
        if uri == split.pairs[2].image:
            third.set()
        return storage.read(uri)

    def on_image(index: int, _: np.ndarray) -> None:
        assert third.wait(timeout=30), f"image 2 was not read while {index} was in the network"

    evaluate(model, split, read=read, indices=[0, 1, 2], on_image=on_image)


def test_output_strides_and_scales_are_applied(model: DeepLabV3, split: Split) -> None:
    plain = evaluate(model, split, read=storage.read)
    finer = evaluate(model, split, read=storage.read, output_stride=8)
    model.set_output_stride(8)
    try:
        again = evaluate(model, split, read=storage.read)
    finally:
        model.set_output_stride(16)
    assert (finer.confusion == again.confusion).all()
    assert (finer.confusion != plain.confusion).any()
    several = evaluate(model, split, read=storage.read, scales=(0.75, 1.5), flip=True)
    assert (several.confusion != plain.confusion).any()


def test_other_numbers_of_classes_and_an_empty_score_are_refused(
    model: DeepLabV3, root: Path
) -> None:
    three = Classes.from_dict({"names": ["a", "b", "c"]})
    other = open_split(str(root), "val", layout="folders", classes=three)
    with pytest.raises(ValueError, match="4 classes, but the split has 3"):
        evaluate(model, other, read=storage.read)
    with pytest.raises(ValueError, match="4 and 3 classes"):
        _ = Evaluation.zeros(4) + Evaluation.zeros(3)
    with pytest.raises(ValueError, match="no pixel of the 0 images"):
        Evaluation.zeros(4).score(step=1, time=0.0)


def test_a_score_is_derived_from_the_counts() -> None:
    confusion = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    score = Evaluation(confusion=confusion, images=3).score(step=7, time=12.5)
    assert (score.step, score.time) == (7, 12.5)
    assert score.ious == (6 / 8, 4 / 6, None)
    assert score.miou == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert score.pixel_accuracy == pytest.approx(10 / 12)


def assert_same(found: EvalResult, expected: EvalResult) -> None:
    assert (found.evaluation.confusion == expected.evaluation.confusion).all()
    assert found.evaluation.images == expected.evaluation.images
    assert found.per_image.keys() == expected.per_image.keys()
    assert all((found.per_image[i] == expected.per_image[i]).all() for i in found.per_image)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_actors_agree_with_one_process_even_if_one_of_them_crashes(
    spec: EvaluatorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.ray_pool._PART_IMAGES", 2)
    expected = Evaluator(spec).evaluate(EvalConfig(), range(IMAGES))
    seen: list[int] = []

    def on_progress(images: int) -> None:
        if not seen:
            ray.kill(pool.actors[0], no_restart=False)
        seen.append(images)

    with DistributedEvaluator(spec, workers=2) as pool:
        assert_same(pool.evaluate(EvalConfig(), range(IMAGES), on_progress), expected)
        assert_same(
            pool.evaluate(EvalConfig(output_stride=8, flip=True), range(3)),
            Evaluator(spec).evaluate(EvalConfig(output_stride=8, flip=True), range(3)),
        )
    assert sum(seen) == IMAGES


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_actors_that_keep_crashing_or_cannot_read_an_image_end_the_evaluation(
    spec: EvaluatorSpec, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.ray_pool._PART_IMAGES", 2)

    def kill(_: int) -> None:
        for actor in pool.actors:
            ray.kill(actor, no_restart=True)

    with (
        DistributedEvaluator(spec, workers=1) as pool,
        pytest.raises(WorkersError, match="a worker crashed 3 times"),
    ):
        pool.evaluate(EvalConfig(), range(IMAGES), kill)
    path = root / "val" / "images" / "05.png"
    data = path.read_bytes()
    path.write_bytes(data[:40])
    try:
        with (
            DistributedEvaluator(spec, workers=2) as pool,
            pytest.raises(SampleError, match=r"05\.png"),
        ):
            pool.evaluate(EvalConfig(), range(IMAGES))
    finally:
        path.write_bytes(data)


def test_a_replaced_checkpoint_is_refused(spec: EvaluatorSpec) -> None:
    other = EvaluatorSpec(checkpoint=spec.checkpoint, digest="0", split=spec.split, cpus=1)
    with pytest.raises(ValueError, match="was replaced during the evaluation"):
        Evaluator(other)
