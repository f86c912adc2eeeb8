"""What a recipe is, and how many of them are printed: an experiment with the score it has.

Enters: nothing but values. Leaves: frozen `Recipe`s, and lines for a terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest

from pipeline.train.recipes.experiment import PAPER_SCALES, EvaluationConfig, Experiment

WIDTH = 100
"""Columns of a terminal that the list is made for."""

_LEGEND = (
    "mIoU in percent and how it is measured: at output stride OS, MS as the mean over the scales "
    "0.5 to 1.75 or those named (a range is in steps of 0.25), flip and over mirrored copies. "
    "jobs/evaluate.py measures the same."
)
_HOW_WIDTH = len("OS8 + MS 0.75 1 1.25 + flip")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A score: `miou` in percent on the set `on`, and how the images were looked at."""

    miou: float
    output_stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    on: str = "VOC val"

    @property
    def how(self) -> str:
        """The evaluation in a few characters: OS8 + MS + flip; scales not the paper's are named."""
        parts = [f"OS{self.output_stride}"]
        if len(self.scales) > 1:
            parts.append(" ".join(["MS", *self._named_scales()]))
        parts += ["flip"] if self.flip else []
        return " + ".join(parts)

    def _named_scales(self) -> list[str]:
        """None of the paper's usual ones, the ends of another long list, or a short one whole."""
        if self.scales == PAPER_SCALES:
            return []
        named = [f"{scale:g}" for scale in self.scales]
        return named if len(named) < 4 else [named[0], "to", named[-1]]

    @property
    def evaluation(self) -> EvaluationConfig:
        """The evaluation, at the end of a run, that this score is to be compared with."""
        return EvaluationConfig(
            eval_output_stride=self.output_stride, eval_scales=self.scales, eval_flip=self.flip
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment called `name`: what it is `about`, and where it is from.

    `source` is the paper's table, or ours; `about` its row. `figures` are the published or
    measured scores, () where there are none. `cost` is what a run of ours costs, "" for the
    paper's. `after` is the recipe whose checkpoint this one starts from: `init` has to name it
    then; "" where the experiment says what it starts from.
    """

    name: str
    source: str
    about: str
    experiment: Experiment
    figures: tuple[Figure, ...] = ()
    cost: str = ""
    after: str = ""


def describe(recipes: Iterable[Recipe]) -> str:
    """The recipes as text of at most 100 columns, one paragraph a source, in their order.

    Columns: name, each figure with how it was measured, what the recipe is about.
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
    measured_on = dict.fromkeys(figure.on for recipe in recipes for figure in recipe.figures)
    return f"{source}: {', '.join(measured_on) or 'no figure'}"


def _lines(recipe: Recipe, name_width: int) -> Iterator[str]:
    figures = [f"{figure.miou:5.2f} {figure.how:<{_HOW_WIDTH}}" for figure in recipe.figures]
    about = recipe.about
    about += f"; from {recipe.after}'s checkpoint: give --init" if recipe.after else ""
    about += f"; {recipe.cost}" if recipe.cost else ""
    # two columns of indentation, and two between columns
    left = 2 + name_width + 2 + len("00.00 ") + _HOW_WIDTH + 2
    wrapped = textwrap.wrap(about, WIDTH - left, break_on_hyphens=False)
    blank = " " * (len("00.00 ") + _HOW_WIDTH)
    names = [recipe.name]
    for name, figure, text in zip_longest(names, figures, wrapped):
        yield f"  {name or '':<{name_width}}  {figure or blank}  {text or ''}".rstrip()
