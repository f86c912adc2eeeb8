"""Recipes: named experiments with the scores to expect, and their list for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest

from pipeline.train.recipes.experiment import PAPER_SCALES, EvaluationConfig, Experiment

WIDTH = 100
"""Width of the printed list, in columns."""

_LEGEND = (
    "mIoU in percent and how it is measured: OS is the output stride, MS averages over the scales "
    "0.5 to 1.75 or the ones listed (a range is in steps of 0.25), flip adds mirrored images. "
    "jobs/evaluate.py measures the same."
)
_HOW_WIDTH = len("OS8 + MS 0.75 1 1.25 + flip")


@dataclass(frozen=True, kw_only=True)
class ExpectedScore:
    """A score, `miou` in percent on the data set `on`, and how it was measured."""

    miou: float
    output_stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    on: str = "VOC val"

    @property
    def how(self) -> str:
        """How it was measured, in short: OS8 + MS + flip; scales are listed unless the paper's."""
        parts = [f"OS{self.output_stride}"]
        if len(self.scales) > 1:
            parts.append(" ".join(["MS", *self._named_scales()]))
        parts += ["flip"] if self.flip else []
        return " + ".join(parts)

    def _named_scales(self) -> list[str]:
        """Return nothing for the paper's usual scales, a short list whole, or a long one's ends."""
        if self.scales == PAPER_SCALES:
            return []
        named = [f"{scale:g}" for scale in self.scales]
        return named if len(named) < 4 else [named[0], "to", named[-1]]

    @property
    def evaluation(self) -> EvaluationConfig:
        """The evaluation at the end of a run that compares with this score."""
        return EvaluationConfig(
            eval_output_stride=self.output_stride, eval_scales=self.scales, eval_flip=self.flip
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named experiment, with a description, its source and the scores to expect.

    `source` is the paper's table, or "Ours"; `about` describes the row. `scores` are the published
    or measured scores, if any. `cost` is the cost of a run of ours, "" for the paper's. `after` is
    the recipe whose checkpoint has to be given as `init`; "" if the experiment names its own.
    """

    name: str
    source: str
    about: str
    experiment: Experiment
    scores: tuple[ExpectedScore, ...] = ()
    cost: str = ""
    after: str = ""


def describe(recipes: Iterable[Recipe]) -> str:
    """Return the recipes as text of at most 100 columns, with a paragraph per source.

    Columns: name, each score with how it was measured, description.
    """
    listed = list(recipes)
    name_width = max((len(recipe.name) for recipe in listed), default=0)
    paragraphs = [textwrap.fill(_LEGEND, WIDTH)]
    for source, group in groupby(listed, key=lambda recipe: recipe.source):
        lines = [_heading(source, rows := list(group))]
        lines += [line for recipe in rows for line in _lines(recipe, name_width)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def _heading(source: str, recipes: list[Recipe]) -> str:
    measured_on = dict.fromkeys(score.on for recipe in recipes for score in recipe.scores)
    return f"{source}: {', '.join(measured_on) or 'no score'}"


def _lines(recipe: Recipe, name_width: int) -> Iterator[str]:
    scores = [f"{score.miou:5.2f} {score.how:<{_HOW_WIDTH}}" for score in recipe.scores]
    about = recipe.about
    about += f"; starts from {recipe.after}'s checkpoint: give --init" if recipe.after else ""
    about += f"; {recipe.cost}" if recipe.cost else ""
    # two columns of indentation, and two between columns
    left = 2 + name_width + 2 + len("00.00 ") + _HOW_WIDTH + 2
    wrapped = textwrap.wrap(about, WIDTH - left, break_on_hyphens=False)
    blank = " " * (len("00.00 ") + _HOW_WIDTH)
    names = [recipe.name]
    for name, score, text in zip_longest(names, scores, wrapped):
        yield f"  {name or '':<{name_width}}  {score or blank}  {text or ''}".rstrip()
