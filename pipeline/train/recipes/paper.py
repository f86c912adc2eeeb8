"""The runs of "Rethinking Atrous Convolution for Semantic Image Segmentation", table by table.

Source: arXiv 1706.05587, Tables 1 to 13. `PAPER` holds the recipes in the order of the tables, each
derived from `FINAL` (Table 6) or `CASCADE` (Table 1). A run ends with the evaluation of one of its
scores, and jobs/evaluate.py computes the others. If the score is a test server's, the run ends with
a single-scale evaluation on val, although val is part of the training data there.

Two things differ from the paper, because its ImageNet checkpoints are not public in a format that
can be read here, and torchvision's are:
- In torchvision's files the stride of a block is in its first unit, in the paper's ResNet in its
  last. The style has to be the file's, "torchvision": a first unit was trained on the grid of the
  previous block and keeps that block's rate. Block4 at output stride 16 with multi-grid (1, 2, 4)
  therefore has rates 1, 4, 8 instead of the paper's 2, 4, 8, and the first unit of a cascaded block
  has half its rate. With the paper's rule, a network without multi-grid would differ from the
  pretrained one: the features of a ResNet-50 are off by 12 to 24 %. If you have weights with the
  stride in the last unit, pass them as `init` with `style` "paper".
- `num_convs` 0 gives the paper's head in that style: no 3x3 convolution before the logits.
The ImageNet accuracy of the starting weights is therefore not the paper's either, so do not expect
its scores to the second digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import (
    PAPER_SCALES,
    AugmentConfig,
    DataConfig,
    Experiment,
)
from pipeline.train.recipes.recipe import ExpectedScore, Recipe

CITYSCAPES_SCALES = (0.75, 1.0, 1.25)
CITYSCAPES_TEST_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)

DEPTHS = (4, 5, 6, 7)


def _model(experiment: Experiment, **fields: Any) -> Experiment:
    return replace(experiment, model=replace(experiment.model, **fields))


def _optimizer(experiment: Experiment, **fields: Any) -> Experiment:
    return replace(experiment, optimizer=replace(experiment.optimizer, **fields))


def _four_scores(
    plain: float,
    finer: float,
    scaled: float,
    flipped: float,
    *,
    scales: tuple[float, ...] = PAPER_SCALES,
    on: str = "VOC val",
) -> tuple[ExpectedScore, ...]:
    """Return the scores at OS16, at OS8, with several scales, and with flip."""
    return (
        ExpectedScore(miou=plain, output_stride=16, on=on),
        ExpectedScore(miou=finer, output_stride=8, on=on),
        ExpectedScore(miou=scaled, output_stride=8, scales=scales, on=on),
        ExpectedScore(miou=flipped, output_stride=8, scales=scales, flip=True, on=on),
    )


def _one_score(miou: float, output_stride: int = 16) -> ExpectedScore:
    return ExpectedScore(miou=miou, output_stride=output_stride)


FINAL = Experiment(model=ModelConfig(style="torchvision", num_convs=0), init="zoo:resnet101")
CASCADE = _model(
    FINAL, head="cascade", blocks=7, multi_grid=(1, 1, 1), atrous_rates=(), image_pooling=False
)
CASCADE50 = replace(_model(CASCADE, backbone="resnet50"), init="zoo:resnet50")
COCO = replace(
    FINAL, data=DataConfig(layout="table", classes="voc", train_split="train", val_split="val")
)
CITYSCAPES = replace(
    _optimizer(_model(FINAL, num_classes=19), max_steps=90_000),
    data=DataConfig(layout="cityscapes", classes="cityscapes", train_split="train"),
    augment=AugmentConfig(crop_size=(769, 769)),
)


def _row(
    table: int, row: str, about: str, experiment: Experiment, *scores: ExpectedScore
) -> Recipe:
    return Recipe(
        name=f"table{table}-{row}",
        source=f"Table {table}",
        about=about,
        experiment=experiment,
        scores=scores,
    )


def _after(name: str, recipe: Recipe) -> Recipe:
    """Return the recipe, starting from a checkpoint of the recipe `name`."""
    return replace(recipe, after=name, experiment=replace(recipe.experiment, init=None))


def _table1() -> Iterator[Recipe]:
    mious = {8: 75.18, 16: 73.88, 32: 70.06, 64: 59.99, 128: 42.34, 256: 20.29}
    for stride, miou in mious.items():
        about = f"ResNet-50 with block7, output stride {stride}"
        experiment = _model(CASCADE50, output_stride=stride)
        yield _row(1, f"os{stride}", about, experiment, _one_score(miou, stride))


def _table2() -> Iterator[Recipe]:
    rows = {
        "50": (CASCADE50, (64.81, 72.14, 74.29, 73.88)),
        "101": (CASCADE, (68.39, 73.21, 75.34, 75.76)),
    }
    for depth, (experiment, mious) in rows.items():
        for block, miou in zip(DEPTHS, mious, strict=True):
            about = f"cascade of ResNet-{depth} up to block{block}"
            shorter = _model(experiment, blocks=block)
            yield _row(2, f"r{depth}-block{block}", about, shorter, _one_score(miou))


def _table3() -> Iterator[Recipe]:
    rows = {
        (1, 1, 1): (68.39, 73.21, 75.34, 75.76),
        (1, 2, 1): (70.23, 75.67, 76.09, 76.66),
        (1, 2, 3): (73.14, 75.78, 75.96, 76.11),
        (1, 2, 4): (73.45, 75.74, 75.85, 76.02),
        (2, 2, 2): (71.45, 74.30, 74.70, 74.62),
    }
    for grid, mious in rows.items():
        for block, miou in zip(DEPTHS, mious, strict=True):
            row = f"mg{''.join(map(str, grid))}-block{block}"
            about = f"ResNet-101 up to block{block}, multi-grid {grid}"
            yield _row(
                3, row, about, _model(CASCADE, blocks=block, multi_grid=grid), _one_score(miou)
            )


def _table4() -> Iterator[Recipe]:
    about = "ResNet-101 with block7, multi-grid (1, 2, 1), by inference strategy"
    experiment = _model(CASCADE, multi_grid=(1, 2, 1))
    yield _row(4, "mg121-block7", about, experiment, *_four_scores(76.66, 78.05, 78.93, 79.35))


def _table5() -> Iterator[Recipe]:
    three = _model(FINAL, image_pooling=False)
    four = _model(three, atrous_rates=(6, 12, 18, 24))
    rows: dict[str, tuple[Experiment, float]] = {
        "mg111": (_model(three, multi_grid=(1, 1, 1)), 75.36),
        "mg121": (_model(three, multi_grid=(1, 2, 1)), 75.93),
        "mg124": (three, 76.58),
        "mg124-rate24": (four, 76.46),
        "mg124-pooling": (FINAL, 77.21),
    }
    for row, (experiment, miou) in rows.items():
        model = experiment.model
        pooling = " and pooling" if model.image_pooling else ""
        about = f"multi-grid {model.multi_grid}, ASPP {model.atrous_rates}{pooling}"
        yield _row(5, row, about, experiment, _one_score(miou))


def _table6() -> Iterator[Recipe]:
    about = "the final model, one stage at stride 16 on trainaug, by inference strategy"
    yield _row(6, "final", about, FINAL, *_four_scores(77.21, 78.51, 79.45, 79.77))
    score = ExpectedScore(miou=82.70, output_stride=8, scales=PAPER_SCALES, flip=True)
    experiment = replace(_optimizer(FINAL, base_lr=0.0001), evaluation=score.evaluation)
    yield _after(
        "coco-pretraining", _row(6, "coco", "the final model after COCO", experiment, score)
    )


def _coco() -> Iterator[Recipe]:
    yield Recipe(
        name="coco-pretraining",
        source="Before Tables 6 and 7",
        about="COCO trainval without minival (jobs/coco.py), images with 1000 annotated px or more "
        "of VOC's classes, others as background; steps and learning rate are not stated, so VOC's",
        experiment=COCO,
    )


def _table7() -> Iterator[Recipe]:
    about = "second stage on trainval, stride 8, BN frozen, images of hard classes repeated"
    hard = ("bicycle", "chair", "diningtable", "pottedplant", "sofa")
    second = replace(FINAL, data=DataConfig(train_split="trainval", repeat_classes=hard))
    second = _optimizer(_model(second, output_stride=8), base_lr=0.001, freeze_bn=True)
    score = ExpectedScore(miou=85.7, output_stride=8, scales=PAPER_SCALES, flip=True, on="VOC test")
    yield _after("table6-coco", _row(7, "test", about, second, score))


def _table8() -> Iterator[Recipe]:
    yield _row(8, "all", "crop 513, logits upsampled, BN tuned", FINAL, _one_score(77.21))
    yield _row(8, "bn-frozen", "BN not tuned", _optimizer(FINAL, freeze_bn=True), _one_score(75.95))
    small = _optimizer(FINAL, upsample_logits=False)
    yield _row(
        8, "small-labels", "labels downsampled, logits not upsampled", small, _one_score(76.01)
    )
    cropped = replace(FINAL, augment=AugmentConfig(crop_size=(321, 321)))
    yield _row(8, "crop321", "crop 321", cropped, _one_score(67.22))


def _table9() -> Iterator[Recipe]:
    for size, miou in {4: 64.43, 8: 75.76, 12: 76.49, 16: 77.21}.items():
        experiment = _optimizer(FINAL, batch_size=size)
        yield _row(9, f"batch{size}", f"batch {size}", experiment, _one_score(miou))


def _table10() -> Iterator[Recipe]:
    for stride, mious in {8: (74.45, 75.62), 16: (77.21, 78.51), 32: (75.90, 75.75)}.items():
        coarse, fine = _one_score(mious[0], 16), _one_score(mious[1], 8)
        experiment = replace(_model(FINAL, output_stride=stride), evaluation=coarse.evaluation)
        yield _row(
            10, f"os{stride}", f"trained at output stride {stride}", experiment, coarse, fine
        )


def _table11() -> Iterator[Recipe]:
    mious = {1: 77.21, 2: 77.15, 4: 76.79, 8: 77.02, 16: 77.18, 32: 76.69}
    for replicas, miou in mious.items():
        about = f"--workers {replicas}; the paper's replicas train asynchronously"
        # each worker needs an image
        optimizer = replace(FINAL.optimizer, batch_size=max(16, replicas))
        experiment = replace(FINAL, optimizer=optimizer)
        yield _row(11, f"replicas{replicas}", about, experiment, _one_score(miou))


def _table12() -> Iterator[Recipe]:
    about = "the final model on Cityscapes, crop 769, by inference strategy"
    scores = _four_scores(77.23, 77.82, 79.06, 79.30, scales=CITYSCAPES_SCALES, on="Cityscapes val")
    experiment = replace(CITYSCAPES, evaluation=scores[-1].evaluation)
    yield _row(12, "cityscapes", about, experiment, *scores)


def _table13() -> Iterator[Recipe]:
    about = (
        "trained on 3,475 fine labels and train_extra's 20,000 coarse ones, which must be "
        "stored in gtFine/train_extra under the names of gtFine"
    )
    data = replace(CITYSCAPES.data, train_split="train+val+train_extra")
    scales = CITYSCAPES_TEST_SCALES
    score = ExpectedScore(
        miou=81.3, output_stride=4, scales=scales, flip=True, on="Cityscapes test"
    )
    yield _row(13, "cityscapes-test", about, replace(CITYSCAPES, data=data), score)


PAPER: tuple[Recipe, ...] = (
    *_table1(), *_table2(), *_table3(), *_table4(), *_table5(), *_table6(), *_coco(), *_table7(),
    *_table8(), *_table9(), *_table10(), *_table11(), *_table12(), *_table13(),
)  # fmt: skip
