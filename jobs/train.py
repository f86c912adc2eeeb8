"""Train DeepLabv3 on Ray Train from a recipe: the paper's experiments, and ours.

    python jobs/train.py --recipe voc-mobilenetv2 --data s3://sets/voc --out s3://models/voc
    python jobs/train.py --list

--recipe NAME is required: its values are the defaults of the flags, and each can be overridden by a
flag. --list prints the recipes with their scores. --resume is accepted for compatibility; every run
resumes automatically.

Exits 0 if training finished, 1 if the run stopped early (the same command resumes it, unless the
last line names another), 2 on invalid arguments. The last line is machine-readable: `key=value`
pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.cli.arguments import ArgumentsError, parse
from pipeline.cli.exit import hard_exit, last_line, print_line, run_job
from pipeline.cli.training_progress import TrainingDisplay
from pipeline.cli.training_tables import dry_run, final_scores
from pipeline.data.storage import StorageError
from pipeline.runs import lease, ray_connection
from pipeline.runs.ray_connection import RunStoppedError
from pipeline.train.driver.estimate import estimate
from pipeline.train.driver.fit import TrainingResult, fit
from pipeline.train.recipes import registry
from pipeline.train.recipes.experiment import Experiment
from pipeline.train.recipes.registry import Recipe
from pipeline.train.settings import TrainingSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with the command line `argv` and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    if "--list" in given:
        print_line(registry.describe(registry.RECIPES.values()).removesuffix("\n"))
        return 0
    return run_job(
        "train",
        lambda: _train(given),
        expected=(StorageError, RunStoppedError, lease.HeldError),
        interrupted="interrupted; the same command resumes the run",
    )


def _train(argv: Sequence[str]) -> str:
    name, rest = _split_recipe(argv)
    recipe = _recipe(name, rest)
    settings = _settings(recipe, rest)
    if settings.dry_run:
        return dry_run(recipe, settings, estimate(settings, print_line))
    with ray_connection.disconnect_on_exit(), TrainingDisplay(settings) as display:
        ended = fit(settings, print_line, display)
    return _ended(settings, ended)


def _split_recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of --recipe, which sets the defaults of the other flags, and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--resume", action="store_true")  # accepted for compatibility
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ArgumentsError(f"{error}; --list prints all recipes") from None
    return given.recipe, rest


def _recipe(name: str | None, rest: Sequence[str]) -> Recipe:
    if name is not None:
        return registry.by_name(name)
    if {"-h", "--help"} & set(rest):
        return registry.OURS[0]
    raise ArgumentsError("missing: --recipe; --list prints all recipes")


def _settings(recipe: Recipe, argv: Sequence[str]) -> TrainingSettings:
    """Return the settings given on the command line; the recipe has the defaults."""

    @dataclass(frozen=True, kw_only=True)
    class RecipeSettings(TrainingSettings):
        experiment: Experiment = field(default_factory=lambda: recipe.experiment)

    about = (
        f"--recipe {recipe.name}: {recipe.about} ({recipe.source}). Its values are the defaults."
    )
    settings = parse(RecipeSettings, argv, description=f"{__doc__}\n{about}")
    if recipe.after and settings.experiment.init is None and "--init" not in argv:
        raise ArgumentsError(
            f"recipe {recipe.name} starts from the network of {recipe.after}: give --init, for "
            f"example OUT/{recipe.after}/model.safetensors"
        )
    return settings


def _ended(settings: TrainingSettings, ended: TrainingResult) -> str:
    record = ended.record
    if ended.nothing_to_do:
        print_line(f"{settings.out} is already finished; nothing to do")
    print_line(final_scores(record))
    facts: dict[str, object] = {"steps": record["steps"], "seconds": record["seconds"]}
    for which in ("last", "best"):
        if record[which]:
            facts[f"{which}_miou"] = f"{record[which]['miou']:.4f}"
    return last_line("train finished", {**facts, "out": settings.out})


if __name__ == "__main__":
    hard_exit(main())
