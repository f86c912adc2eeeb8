"""Recipes: the tables of the paper, typed in a second time, and networks that can be built."""

import dataclasses
import functools
import json

import pytest
import torch

from pipeline.data import labels
from pipeline.model import zoo
from pipeline.model.deeplab import DeepLabV3
from pipeline.train.recipes.experiment import DataConfig, Experiment
from pipeline.train.recipes.registry import OURS, PAPER, RECIPES, Recipe, by_name, describe

SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

# One line per score: recipe, output stride, scales (separated by commas), flip, mIoU.
SINGLE_SCORES = """
table4-mg121-block7      16  1                         -     76.66
table4-mg121-block7       8  1                         -     78.05
table4-mg121-block7       8  .5,.75,1,1.25,1.5,1.75    -     78.93
table4-mg121-block7       8  .5,.75,1,1.25,1.5,1.75    flip  79.35
table5-mg111             16  1                         -     75.36
table5-mg121             16  1                         -     75.93
table5-mg124             16  1                         -     76.58
table5-mg124-rate24      16  1                         -     76.46
table5-mg124-pooling     16  1                         -     77.21
table6-final             16  1                         -     77.21
table6-final              8  1                         -     78.51
table6-final              8  .5,.75,1,1.25,1.5,1.75    -     79.45
table6-final              8  .5,.75,1,1.25,1.5,1.75    flip  79.77
table6-coco               8  .5,.75,1,1.25,1.5,1.75    flip  82.70
table7-test               8  .5,.75,1,1.25,1.5,1.75    flip  85.7
table8-all               16  1                         -     77.21
table8-bn-frozen         16  1                         -     75.95
table8-small-labels      16  1                         -     76.01
table8-crop321           16  1                         -     67.22
table12-cityscapes       16  1                         -     77.23
table12-cityscapes        8  1                         -     77.82
table12-cityscapes        8  .75,1,1.25                -     79.06
table12-cityscapes        8  .75,1,1.25                flip  79.30
table13-cityscapes-test   4  .75,1,1.25,1.5,1.75,2     flip  81.3
"""

# Tables of single-scale scores: in the recipe's name, {} is the column and {row} the row.
GRIDS = {
    "table2-{row}-block{}": """
              4      5      6      7
        r50   64.81  72.14  74.29  73.88
        r101  68.39  73.21  75.34  75.76
    """,
    "table3-mg{row}-block{}": """
              4      5      6      7
        111   68.39  73.21  75.34  75.76
        121   70.23  75.67  76.09  76.66
        123   73.14  75.78  75.96  76.11
        124   73.45  75.74  75.85  76.02
        222   71.45  74.30  74.70  74.62
    """,
    "table9-batch{}": """
              4      8      12     16
        -     64.43  75.76  76.49  77.21
    """,
    "table11-replicas{}": """
              1      2      4      8      16     32
        -     77.21  77.15  76.79  77.02  77.18  76.69
    """,
}

# Tables whose columns are strides: trained and evaluated there, or trained there and evaluated
# at the row's.
STRIDES = """
                8      16     32     64     128    256
    table1      75.18  73.88  70.06  59.99  42.34  20.29
    table10/16  74.45  77.21  75.90
    table10/8   75.62  78.51  75.75
"""


def published():
    """Return (recipe, output stride, scales, flip, mIoU) of every score of the paper."""
    found = set()
    for line in SINGLE_SCORES.split("\n")[1:-1]:
        name, stride, scales, flip, miou = line.split()
        several = tuple(float(scale) for scale in scales.split(","))
        found.add((name, int(stride), several, flip == "flip", float(miou)))
    for name, table in GRIDS.items():
        columns, *rows = [line.split() for line in table.strip().splitlines()]
        for row, *mious in rows:
            for column, miou in zip(columns, mious, strict=True):
                found.add((name.format(column, row=row), 16, (1.0,), False, float(miou)))
    columns, *rows = [line.split() for line in STRIDES.strip().splitlines()]
    for row, *mious in rows:
        table, _, evaluated = row.partition("/")
        for column, miou in zip(columns, mious, strict=False):
            stride = int(evaluated or column)  # type: ignore[assignment]
            found.add((f"{table}-os{column}", stride, (1.0,), False, float(miou)))
    return found


@functools.cache
def weightless(config):
    """Return a network on the meta device, which allocates no weights."""
    with torch.device("meta"):
        return DeepLabV3(config)


def shell(recipe: Recipe, **fields):
    """Return the recipe's network, valid until the next call: it is reused with other rates."""
    config = dataclasses.replace(recipe.experiment.model, **fields)
    model = weightless(dataclasses.replace(config, output_stride=16, multi_grid=(1, 1, 1)))
    model.config = config
    model.set_output_stride(config.output_stride)
    return model


def block_rates(model, block):
    """Return the rates of the 3x3 convolutions of a ResNet's block (1 to 7)."""
    layers = getattr(model.backbone, f"layer{block}").modules()
    return [m.dilation[0] for m in layers if getattr(m, "kernel_size", None) == (3, 3)]


def test_the_scores_are_exactly_those_of_the_paper():
    ours = [
        (recipe.name, score.output_stride, score.scales, score.flip, score.miou)
        for recipe in PAPER
        for score in recipe.scores
    ]
    assert len(ours) == len(set(ours))
    assert set(ours) == published()
    assert [recipe.name for recipe in PAPER if not recipe.scores] == ["coco-pretraining"]


def test_scores_are_measured_on_val_except_those_of_a_test_server():
    elsewhere = {
        recipe.name: {score.on for score in recipe.scores}
        for recipe in PAPER
        if any(score.on != "VOC val" for score in recipe.scores)
    }
    assert elsewhere == {
        "table7-test": {"VOC test"},
        "table12-cityscapes": {"Cityscapes val"},
        "table13-cityscapes-test": {"Cityscapes test"},
    }


def test_no_two_recipes_share_a_name():
    assert len(RECIPES) == len(OURS) + len(PAPER)
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_survives_a_round_trip_through_json(name):
    experiment = RECIPES[name].experiment
    assert Experiment.from_json(experiment.to_json()) == experiment
    assert hash(Experiment.from_json(experiment.to_json())) == hash(experiment)


@pytest.mark.slow
def test_every_network_can_be_built_and_evaluated_at_the_strides_of_its_scores():
    for recipe in RECIPES.values():
        model = shell(recipe)
        strides = {score.output_stride for score in recipe.scores}
        for stride in (strides | {recipe.experiment.evaluation.eval_output_stride}) - {None}:
            model.set_output_stride(stride)


@pytest.mark.parametrize("name", RECIPES)
def test_classes_match_the_data_set_and_repeated_ones_exist(name):
    experiment = RECIPES[name].experiment
    classes = labels.get_classes(experiment.data.classes)
    assert experiment.model.num_classes == len(classes.names)
    assert set(experiment.data.repeat_classes) <= set(classes.names)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_from_a_public_file_or_from_another_recipe(name):
    recipe = RECIPES[name]
    if recipe.after:
        assert recipe.experiment.init is None
        before = RECIPES[recipe.after].experiment.model
        assert before.backbone == recipe.experiment.model.backbone
        return
    backbone = recipe.experiment.model.backbone.replace("mobilenet_v2", "mobilenet_v2-b")
    file = f"{recipe.experiment.init.removeprefix('zoo:')}-"
    assert file.startswith(backbone.partition("-")[0])
    assert any(known.startswith(file) for known in zoo.FILES)


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.name)
def test_a_run_ends_with_the_evaluation_of_one_of_its_scores(recipe):
    evaluation = recipe.experiment.evaluation
    stride = evaluation.eval_output_stride or recipe.experiment.model.output_stride
    mine = (stride, evaluation.eval_scales, evaluation.eval_flip)
    on_val = [score for score in recipe.scores if score.on.endswith(" val")]
    if on_val:
        assert mine in [(f.output_stride, f.scales, f.flip) for f in on_val]
    else:
        assert mine == (recipe.experiment.model.output_stride, (1.0,), False)


def test_multi_grid_multiplies_the_rate_of_a_block_as_in_the_paper():
    recipe = RECIPES["table3-mg124-block7"]
    paper = shell(recipe, style="paper")
    assert [block_rates(paper, block) for block in (4, 5, 6, 7)] == [
        [2, 4, 8],
        [4, 8, 16],
        [8, 16, 32],
        [16, 32, 64],
    ]


@pytest.mark.slow
def test_torchvision_style_differs_only_in_the_first_unit_of_a_block():
    # torchvision's files have the stride there: that unit was trained on the previous block's grid
    for recipe in PAPER:
        config = recipe.experiment.model
        mine, paper = shell(recipe), shell(recipe, style="paper", num_convs=None)
        for block in range(3, config.blocks + 1):
            (first, *rest), (wanted_first, *wanted) = (
                block_rates(model, block) for model in (mine, paper)
            )
            assert rest == wanted
            assert first in (wanted_first, wanted_first // 2)


def test_without_atrous_convolution_no_block_has_a_rate():
    for stride, rates in [(256, [1, 1, 1, 1]), (64, [1, 1, 2, 4]), (8, [4, 8, 16, 32])]:
        model = shell(RECIPES[f"table1-os{stride}"])
        assert [block_rates(model, block)[-1] for block in (4, 5, 6, 7)] == rates


def test_aspp_rates_at_each_stride_are_those_of_the_paper():
    rates = {name: recipe.experiment.model.rates for name, recipe in RECIPES.items()}
    assert rates["table6-final"] == (6, 12, 18)
    assert rates["table7-test"] == rates["table10-os8"] == (12, 24, 36)
    assert rates["table10-os32"] == (3, 6, 9)
    assert rates["table5-mg124-rate24"] == (6, 12, 18, 24)
    assert rates["table4-mg121-block7"] == ()


# How a run differs from the final model, according to the paper's Section 4.
DIFFERENCES = {
    "table6-final": {},
    "table5-mg124-pooling": {},
    "table8-all": {},
    "table9-batch16": {},
    "table11-replicas16": {},
    "table11-replicas32": {"optimiser.batch_size": 32},
    "table9-batch4": {"optimiser.batch_size": 4},
    "table8-bn-frozen": {"optimiser.freeze_bn": True},
    "table8-small-labels": {"optimiser.upsample_logits": False},
    "table8-crop321": {"augment.crop_size": [321, 321]},
    "table10-os32": {"model.output_stride": 32, "evaluation.eval_output_stride": 16},
    "table6-coco": {
        "init": None,
        "optimiser.base_lr": 1e-4,
        "evaluation.eval_output_stride": 8,
        "evaluation.eval_scales": list(SIX),
        "evaluation.eval_flip": True,
    },
    "table7-test": {
        "init": None,
        "model.output_stride": 8,
        "optimiser.base_lr": 1e-3,
        "optimiser.freeze_bn": True,
        "data.train_split": "trainval",
        "data.repeat_classes": ["bicycle", "chair", "diningtable", "pottedplant", "sofa"],
    },
    "coco-pretraining": {"data.layout": "table", "data.train_split": "train"},
    "table12-cityscapes": {
        "model.num_classes": 19,
        "data.layout": "cityscapes",
        "data.classes": "cityscapes",
        "data.train_split": "train",
        "augment.crop_size": [769, 769],
        "optimiser.max_steps": 90_000,
        "evaluation.eval_output_stride": 8,
        "evaluation.eval_scales": [0.75, 1.0, 1.25],
        "evaluation.eval_flip": True,
    },
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_differs_from_the_final_model_as_the_paper_states(name):
    mine, final = (json.loads(RECIPES[key].experiment.to_json()) for key in (name, "table6-final"))
    found = {}
    for key, value in mine.items():
        inner = value if isinstance(value, dict) else {"": value}
        for field, content in inner.items():
            theirs = final[key][field] if field else final[key]
            if content != theirs:
                found[f"{key}.{field}".rstrip(".")] = content
    assert found == DIFFERENCES[name]


def test_the_final_model_is_trained_as_in_section_4_1():
    optimizer = RECIPES["table6-final"].experiment.optimizer
    assert (optimizer.base_lr, optimizer.power, optimizer.max_steps) == (0.007, 0.9, 30_000)
    assert (optimizer.batch_size, 1 - optimizer.bn_momentum) == (16, pytest.approx(0.9997))
    assert (optimizer.ema_decay, optimizer.hard_share, optimizer.head_lr_factor) == (0, 1, 1)


@pytest.mark.parametrize(
    ("name", "base_lr", "max_steps", "batch_size"),
    [
        ("voc-mobilenetv2", 0.007, 6_100, 16),
        ("voc-mobilenetv2-cpu", 0.007, 4_800, 8),
        ("camvid-mobilenetv2", 0.01, 4_600, 16),
        ("camvid-mobilenetv2-cpu", 0.007, 3_600, 8),
        ("camvid-resnet50", 0.01, 4_600, 16),
    ],
)
def test_our_recipes_keep_the_values_of_earlier_runs(name, base_lr, max_steps, batch_size):
    """With another value, a run started by an earlier version would be refused."""
    optimizer = RECIPES[name].experiment.optimizer
    assert (optimizer.base_lr, optimizer.max_steps) == (base_lr, max_steps)
    assert optimizer.batch_size == batch_size


def test_our_recipes_have_a_cost_and_a_score_or_state_not_measured():
    for recipe in OURS:
        assert recipe.cost
        assert bool(recipe.scores) != ("not measured" in recipe.cost), recipe.name


def test_the_list_shows_every_recipe_and_score_within_100_columns():
    text = describe(RECIPES.values())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert names == list(RECIPES)
    rows = [line.split() for line in lines]
    for _, stride, _, _, miou in published():
        assert any(f"{miou:.2f}" in row and f"OS{stride}" in row for row in rows)
    assert len([line for line in lines if line.startswith("Table ")]) == 13
    assert " 79.30 OS8 + MS 0.75 1 1.25 + flip" in text
    assert " 81.30 OS4 + MS 0.75 to 2 + flip " in text
    assert " 79.77 OS8 + MS + flip" in text


def test_an_unknown_recipe_is_refused_with_the_closest_names():
    assert by_name("table6-final") is RECIPES["table6-final"]
    with pytest.raises(ValueError, match=r"--recipe voc-mobilenet:.*voc-mobilenetv2.*--list"):
        by_name("voc-mobilenet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "experiment is not valid JSON"),
        ("[]", "experiment must be a JSON object, got list"),
        ('{"data": 3}', "data must be a JSON object, got int"),
        ('{"data": {"splits": 1}}', r"data has unknown fields \['splits'\]"),
        ('{"optimiser": {"max_steps": 0}}', "--max-steps 0"),
        ('{"optimiser": {"max_steps": "many"}}', "value of the wrong type"),
    ],
)
def test_invalid_json_of_an_experiment_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Experiment.from_json(text)


def test_fields_that_an_older_experiment_lacks_get_their_defaults():
    old = '{"seed": 3, "data": {"repeat_classes": ["sofa"]}}'
    assert Experiment.from_json(old) == Experiment(
        seed=3, data=DataConfig(repeat_classes=("sofa",))
    )
