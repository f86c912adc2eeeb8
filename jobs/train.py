"""Trains DeepLabv3 on Ray Train, from a recipe: the paper's runs, and ours.

    python jobs/train.py --recipe voc-mobilenetv2 --data s3://sets/voc --out s3://models/voc
    python jobs/train.py --list

--recipe NAME is needed: its values are the defaults of all flags but the first few, and any of them
can be given as a flag. --list prints the recipes with their scores. --resume is a word for who
expects it: every run goes on where it stopped.

Exits 0 when the network is trained, 1 when the run stopped (the same command goes on with it,
unless the last line asks for another), 2 on arguments that cannot be right. The last line is for
log readers: `key=value` pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.cli.arguments import ArgumentsError, parse
from pipeline.cli.exit import hard_exit, last_line, run_job
from pipeline.cli.training_progress import TrainingDisplay
from pipeline.cli.training_tables import class_table, dry_run
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
    """Runs the job with the command line `argv`; its exit code."""
    given = sys.argv[1:] if argv is None else argv
    if "--list" in given:
        print(registry.describe(registry.RECIPES.values()), end="")
        return 0
    return run_job(
        "train",
        lambda: _train(given),
        expected=(StorageError, RunStoppedError, lease.HeldError),
        interrupted="interrupted; the same command goes on with the run",
    )


def _train(argv: Sequence[str]) -> str:
    name, rest = _first(argv)
    recipe = _recipe(name, rest)
    settings = _settings(recipe, rest)
    if settings.dry_run:
        return dry_run(recipe, settings, estimate(settings, _say))
    with ray_connection.disconnect_on_exit(), TrainingDisplay(settings) as display:
        ended = fit(settings, _say, display)
    return _ended(settings, ended)


def _first(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """--recipe, which decides what the other flags are, and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--resume", action="store_true")  # always so: a word for who expects it
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
    raise ArgumentsError("missing: --recipe; --list prints all of them")


def _settings(recipe: Recipe, argv: Sequence[str]) -> TrainingSettings:
    """The command line's settings; the flags' defaults are the recipe's."""

    @dataclass(frozen=True, kw_only=True)
    class Given(TrainingSettings):
        experiment: Experiment = field(default_factory=lambda: recipe.experiment)

    about = (
        f"--recipe {recipe.name}: {recipe.about} ({recipe.source}). Its values are the defaults."
    )
    settings = parse(Given, argv, description=f"{__doc__}\n{about}")
    if recipe.after and settings.experiment.init is None and "--init" not in argv:
        raise ArgumentsError(
            f"recipe {recipe.name} goes on from {recipe.after}'s network: give --init, for example "
            f"OUT/{recipe.after}/model.safetensors"
        )
    return settings


def _say(line: str) -> None:
    print(line, flush=True)


def _ended(settings: TrainingSettings, ended: TrainingResult) -> str:
    record = ended.record
    if ended.nothing_to_do:
        print(f"{settings.out} was finished before: there is nothing to do")
    print(class_table(record))
    facts: dict[str, object] = {"steps": record["steps"], "seconds": record["seconds"]}
    for which in ("last", "best"):
        if record[which]:
            facts[f"{which}_miou"] = f"{record[which]['miou']:.4f}"
    return last_line("train finished", {**facts, "out": settings.out})


if __name__ == "__main__":
    hard_exit(main())
