"""All recipes by name: the paper's runs, and ours.

A recipe of ours is derived like the paper's, with `dataclasses.replace`; a new one is one entry
of `OURS`. Where ours differ from the paper, the reason stands beside the value.
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
from pipeline.train.recipes.recipe import Figure, Recipe, describe

__all__ = ["OURS", "PAPER", "RECIPES", "Figure", "Recipe", "by_name", "describe"]

NOT_MEASURED = "cost and score: not measured yet"

# the style of torchvision's ImageNet file, with the paper's head
_MOBILENET = ModelConfig(
    backbone="mobilenet_v2", style="torchvision", multi_grid=(1, 1, 1), num_convs=0
)

# What all of ours share. Each says its own rate and length, so that a change for VOC leaves
# CamVid's as they were run.
_FINE_TUNED = OptimizerConfig(
    head_lr_factor=10.0,  # it is new, the backbone is not
    weight_decay=4e-5,  # MobileNetV2's own
    bn_momentum=0.01,  # a short run: at .0003 ImageNet's statistics would stay
    ema_decay=0.998,
)

_VOC = Experiment(
    # no 3x3 branches, and a decoder of one product: a mask is to be cheap on a CPU
    model=replace(_MOBILENET, atrous_rates=(), decoder=True, num_convs=0),
    init="zoo:mobilenet_v2",
    # the rarest of the nine classes that the part of VOC at hand has enough photos of
    data=DataConfig(repeat_classes=("chair", "sofa"), repeats=3),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=6_100,  # 41 epochs of 2,000 photos with their repeats
        base_lr=0.007,
    ),
    evaluation=EvaluationConfig(eval_every=1_525),
)

_CAMVID = Experiment(
    # poles and signs are lost at stride 16; one 3x3 convolution at stride 4 is what a CPU can pay
    model=replace(_MOBILENET, num_classes=11, decoder=True, num_convs=1),
    init="zoo:mobilenet_v2",
    data=DataConfig(layout="camvid", classes="camvid", train_split="train"),
    augment=AugmentConfig(crop_size=(360, 480), min_scale=0.75),
    optimizer=replace(
        _FINE_TUNED,
        max_steps=4_600,  # 200 epochs of 367 photos
        base_lr=0.01,
        hard_share=0.25,  # most pixels are road, sky and buildings, and soon easy
    ),
    evaluation=EvaluationConfig(eval_every=460, eval_scales=(1.0, 1.5, 2.0), eval_flip=True),
)

# What one CPU core can pay for: small crops.
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
        bn_momentum=0.02,  # the shorter a run, the shorter its memory
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
    # for a GPU, which can pay for stride 8 and the decoder's two convolutions
    model=replace(_CAMVID.model, backbone="resnet50", output_stride=8, num_convs=2),
    init="zoo:resnet50",
    optimizer=replace(_CAMVID.optimizer, weight_decay=1e-4),
)

OURS = (
    Recipe(
        name="voc-mobilenetv2",
        source="Ours",
        about="MobileNetV2 and a decoder on VOC; the checkpoint that ships, 61.5 over nine classes",
        experiment=_VOC,
        figures=(
            Figure(miou=40.80, output_stride=16, on="140 photos of VOC val"),
            Figure(miou=41.20, output_stride=8, flip=True, on="140 photos of VOC val"),
        ),
        cost="nine minutes of an H200, whose 16 CPU cores read the photos",
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
        about="MobileNetV2 and a decoder on VOC with small crops, for one core of a CPU",
        experiment=_VOC_CPU,
        figures=(
            Figure(miou=35.77, output_stride=16, on="140 photos of VOC val"),
            Figure(
                miou=36.14,
                output_stride=8,
                scales=PAPER_SCALES,
                flip=True,
                on="140 photos of VOC val",
            ),
        ),
        cost="2 hours of one core of a busy CPU with bf16",
    ),
    Recipe(
        name="camvid-mobilenetv2-cpu",
        source="Ours",
        about="MobileNetV2 on CamVid; the checkpoint that ships",
        experiment=_CAMVID_CPU,
        figures=(
            Figure(miou=69.95, output_stride=16, on="CamVid val"),
            Figure(miou=71.12, output_stride=16, scales=(1.0, 1.5), flip=True, on="CamVid val"),
        ),
        cost="an hour and a half of one core of a CPU with bf16",
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
    """The recipe called `name`. Raises ValueError where there is none, naming the nearest."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no recipe is called {name!r}; {hint}--list prints all of them")
    return RECIPES[name]
