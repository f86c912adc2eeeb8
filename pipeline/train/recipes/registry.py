"""All recipes by name: the paper's runs (`PAPER`) and this project's (`OURS`).

To add a recipe, derive an experiment with `dataclasses.replace` and add one entry to `OURS`. A
comment gives the reason where a value differs from the paper's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from pipeline.model.config import ModelConfig
from pipeline.train.recipes.experiment import (
    PAPER_SCALES,
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
)
from pipeline.train.recipes.paper import PAPER
from pipeline.train.recipes.recipe import ExpectedScore, Recipe, describe

__all__ = ["OURS", "PAPER", "RECIPES", "ExpectedScore", "Recipe", "by_name", "describe"]

NOT_MEASURED = "cost and score: not measured yet"

# the style of torchvision's ImageNet weights, with the paper's head
_MOBILENET = ModelConfig(
    backbone="mobilenet_v2", style="torchvision", multi_grid=(1, 1, 1), num_convs=0
)

# Common to all of ours. Each recipe sets its own learning rate and length, so that a change for VOC
# does not change CamVid's.
_FINE_TUNED = OptimizerConfig(
    head_lr_factor=10.0,  # the head is new, the backbone is pretrained
    weight_decay=4e-5,  # as in the MobileNetV2 paper
    bn_momentum=0.01,  # a short run: at 0.0003 it would keep ImageNet's statistics
    ema_decay=0.998,
)

_VOC = Experiment(
    # no 3x3 branches and a decoder without 3x3 convolutions, to be cheap on a CPU
    model=replace(_MOBILENET, atrous_rates=(), decoder=True, num_convs=0),
    init="zoo:mobilenet_v2",
    # the rarest of the nine classes with enough images in the part of VOC used here
    data=DataConfig(repeat_classes=("chair", "sofa"), repeats=3),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=6_100,  # 41 epochs of 2,000 images with their repeats
        base_lr=0.007,
    ),
    evaluation=EvaluationConfig(eval_every=1_525),
)

_CAMVID = Experiment(
    # poles and signs are lost at stride 16; a CPU can afford one 3x3 convolution at stride 4
    model=replace(_MOBILENET, num_classes=11, decoder=True, num_convs=1),
    init="zoo:mobilenet_v2",
    data=DataConfig(layout="camvid", classes="camvid", train_split="train"),
    augment=AugmentConfig(crop_size=(360, 480), min_scale=0.75),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=4_600,  # 200 epochs of 367 images
        base_lr=0.01,
        hard_share=0.25,  # most pixels are road, sky and buildings, which are learned early
    ),
    evaluation=EvaluationConfig(eval_every=460, eval_scales=(1.0, 1.5, 2.0), eval_flip=True),
)

# Small crops, which one CPU core can afford.
_VOC_CPU = Experiment(
    model=_VOC.model,
    init=_VOC.init,
    data=replace(_VOC.data, repeats=2),
    augment=AugmentConfig(
        crop_size=(257, 257), late_crop_size=(385, 385), late_from=0.8, max_scale=1.5
    ),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=4_800,  # 18 epochs with the repeats
        base_lr=0.007,
        batch_size=8,
        bn_momentum=0.02,  # a shorter run needs a shorter average
    ),
    evaluation=EvaluationConfig(eval_every=1_200),
)

_CAMVID_CPU = Experiment(
    model=replace(_CAMVID.model, atrous_rates=(), num_convs=0),
    init=_CAMVID.init,
    data=_CAMVID.data,
    augment=AugmentConfig(
        crop_size=(240, 320), late_crop_size=(360, 480), late_from=0.75, max_scale=1.25
    ),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=3_600,  # 78 epochs
        base_lr=0.007,
        batch_size=8,
        bn_momentum=0.02,
        hard_share=0.3,
    ),
    evaluation=EvaluationConfig(eval_every=900),
)

_CAMVID_RESNET = replace(
    _CAMVID,
    # a GPU can afford stride 8 and the decoder's two convolutions
    model=replace(_CAMVID.model, backbone="resnet50", output_stride=8, num_convs=2),
    init="zoo:resnet50",
    optimizer=replace(_CAMVID.optimizer, weight_decay=1e-4),
)

OURS = (
    Recipe(
        name="voc-mobilenetv2",
        source="Ours",
        about="MobileNetV2 with a decoder on VOC; the released checkpoint, 61.5 over nine classes",
        experiment=_VOC,
        scores=(
            ExpectedScore(miou=40.80, output_stride=16, on="140 images of VOC val"),
            ExpectedScore(miou=41.20, output_stride=8, flip=True, on="140 images of VOC val"),
        ),
        cost="nine minutes on an H200 with 16 CPU cores",
    ),
    Recipe(
        name="camvid-mobilenetv2",
        source="Ours",
        about="MobileNetV2 with a decoder on CamVid",
        experiment=_CAMVID,
        cost=NOT_MEASURED,
    ),
    Recipe(
        name="voc-mobilenetv2-cpu",
        source="Ours",
        about="MobileNetV2 with a decoder on VOC with small crops, for one CPU core",
        experiment=_VOC_CPU,
        scores=(
            ExpectedScore(miou=35.77, output_stride=16, on="140 images of VOC val"),
            ExpectedScore(
                miou=36.14,
                output_stride=8,
                scales=PAPER_SCALES,
                flip=True,
                on="140 images of VOC val",
            ),
        ),
        cost="2 hours on one core of a busy CPU with bf16",
    ),
    Recipe(
        name="camvid-mobilenetv2-cpu",
        source="Ours",
        about="MobileNetV2 on CamVid; the released checkpoint",
        experiment=_CAMVID_CPU,
        scores=(
            ExpectedScore(miou=69.95, output_stride=16, on="CamVid val"),
            ExpectedScore(
                miou=71.12, output_stride=16, scales=(1.0, 1.5), flip=True, on="CamVid val"
            ),
        ),
        cost="1.5 hours on one CPU core with bf16",
    ),
    Recipe(
        name="camvid-resnet50",
        source="Ours",
        about="ResNet-50 with a decoder on CamVid, for a GPU",
        experiment=_CAMVID_RESNET,
        cost=NOT_MEASURED,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*OURS, *PAPER)}
)


def by_name(name: str) -> Recipe:
    """Return the recipe called `name`. Raises ValueError with the closest names if none is."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"--recipe {name}: no such recipe; {hint}--list prints all recipes")
    return RECIPES[name]
