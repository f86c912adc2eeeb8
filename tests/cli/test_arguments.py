"""Command lines: former names of flags are accepted, and logged."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from pipeline.bulk.settings import BulkSettings as BulkSettings
from pipeline.cli.arguments import RENAMED_FLAGS, ArgumentsError, parse
from pipeline.train.settings import TrainingSettings

BULK = ["--images", "/i", "--results", "/r", "--checkpoint", "/c", "--only-new"]


def bulk(*argv: str) -> BulkSettings:
    return parse(BulkSettings, [*BULK, *argv], description=None)


@pytest.mark.parametrize(
    "former",
    [
        *(["--max-wait", "5"], ["--max-wait=5"], ["--max_wait", "5"], ["--max_wait=5"]),
        *(["--start-timeout", "5"], ["--start_timeout=5"]),
    ],
)
def test_every_spelling_of_a_renamed_flag_sets_the_same_field(former: list[str]) -> None:
    assert bulk(*former) == bulk("--start-timeout", "5")
    assert bulk(*former).start_timeout == 5


@pytest.mark.parametrize(
    ("former", "value"), [("--max-stall", "7"), ("--model-changed", "new-only")]
)
def test_a_former_name_is_accepted_with_a_warning(
    former: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = RENAMED_FLAGS[former]
    with caplog.at_level(logging.WARNING):
        settings = bulk(former, value)
    assert caplog.messages == [f"{former} is now called {now}; the old name still works"]
    caplog.clear()
    assert bulk(now, value) == settings != bulk()
    assert not caplog.messages


def test_a_training_run_takes_the_former_names_of_its_timeouts() -> None:
    argv = ["--data", "/d", "--out", "/o", "--max-wait=8", "--max-stall=9"]
    settings = parse(TrainingSettings, argv, description=None)
    assert (settings.start_timeout, settings.stall_timeout) == (8, 9)


def test_a_flag_that_a_job_never_had_is_still_unknown() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        timeout: int = 1

    with pytest.raises(ArgumentsError, match="--max-wait"):
        parse(Other, ["--max-wait", "5"], description=None)


def test_an_invalid_value_is_reported_under_the_current_name() -> None:
    with pytest.raises(ArgumentsError, match=r"--start-timeout.*soon.*; see --help$"):
        bulk("--max-wait", "soon")
