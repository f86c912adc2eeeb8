"""What a job's progress line shows in a log."""

from __future__ import annotations

import pytest

from pipeline.bulk.driver.progress import Progress
from pipeline.bulk.worker.summary import ShardSummary
from pipeline.cli.progress import Display


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _line(progress: Progress, capsys: pytest.CaptureFixture[str]) -> str:
    with Display() as display:
        display(progress)
    line: str = capsys.readouterr().err
    return line


def test_a_line_shows_how_long_the_network_waited_for_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    progress = Progress(images=40, images_before=0, clock=clock)
    clock.now = 5.0
    progress.add(ShardSummary(shard=0, images=10, wait_s=3.0, infer_s=1.0))
    assert _line(progress, capsys) == (
        "10 of 40 images (25%) after 5 s, 2.0 images/s, 0 errors, 75% waiting for images, "
        "15 s left\n"
    )


def test_a_line_before_the_first_shard_does_not_mention_waiting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _line(Progress(images=40, images_before=0, clock=Clock()), capsys) == (
        "0 of 40 images (0%) after 0 s, 0.0 images/s, 0 errors, starting\n"
    )
