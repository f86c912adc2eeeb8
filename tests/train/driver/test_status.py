"""What workers report reaches the user: scores, the best one, and each warning once."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from pipeline.cli.training_progress import TrainingDisplay
from pipeline.evaluation.score import Score
from pipeline.train.driver.status import Status, StatusActor, StatusReporter
from pipeline.train.recipes.experiment import AugmentConfig
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker.history import Step
from tests.train import tiny
from tests.train.driver.local_actor import LocalActor


def score(step: int, miou: float) -> Score:
    ious = (0.5, 0.25, None, 0.75)
    return Score(step=step, time=0.0, miou=miou, pixel_accuracy=0.9, ious=ious)


def test_a_warning_of_two_workers_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    actor = StatusActor()
    logger = logging.getLogger("pipeline.a_worker")
    reporters = [StatusReporter(LocalActor(actor)), StatusReporter(LocalActor(actor))]
    for reporter in reporters:
        logger.addHandler(reporter)
    try:
        logger.warning("%s normalize by their own images", "workers")
        logger.info("not a warning")
    finally:
        for reporter in reporters:
            logger.removeHandler(reporter)
    display = TrainingDisplay(TrainingSettings(data="d", out="o", experiment=tiny.experiment()))
    display(actor.status())
    actor.warn("another\x1b[2J")
    display(actor.status())
    assert capsys.readouterr().err.splitlines() == [
        "WARNING workers normalize by their own images",
        "WARNING another\\x1b[2J",
    ]


def test_a_score_shows_the_iou_of_every_class_in_val(capsys: pytest.CaptureFixture[str]) -> None:
    display = TrainingDisplay(TrainingSettings(data="d", out="o", experiment=tiny.experiment()))
    display(Status(latest=None, scores=(score(4, 0.5),)))
    printed = capsys.readouterr().err
    assert "ground 50.0%, square 25.0%, never 75.0%" in printed
    assert "mIoU 50.00% (best 50.00%)" in printed


def test_after_a_resume_the_best_score_and_the_time_left_are_those_of_the_whole_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = tiny.experiment(max_steps=100, batch_size=4)
    augment = AugmentConfig(crop_size=(100, 100), late_crop_size=(200, 200), late_from=0.9)
    display = TrainingDisplay(
        TrainingSettings(data="d", out="o", experiment=replace(experiment, augment=augment))
    )
    actor = StatusActor()
    actor.started(1, score(40, 0.75))
    latest = Step(80, 0.0, 0.1, 0.01, images_per_second=2.0, wait_share=0.0)
    actor.report_step(latest, score(80, 0.5))
    display(actor.status())
    printed = capsys.readouterr().err
    assert "mIoU 50.00% (best 75.00%)" in printed
    # ten steps of 2 s, and ten on late crops, which take four times as long
    assert "1 min 40 s left" in printed


def test_the_first_failure_is_kept() -> None:
    actor = StatusActor()
    assert actor.failure() is None
    actor.fail("the loss is nan")
    actor.fail("another worker failed")
    assert actor.failure() == "the loss is nan"
