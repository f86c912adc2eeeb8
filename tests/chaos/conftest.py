"""The world that faults are injected into, created once, and the table of outcomes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data import storage
from tests.chaos.outcomes import OUTCOMES, as_table
from tests.chaos.world import BROKEN, GOOD, World
from tests.small_images import small_image

SEED = int(os.environ.get("CHAOS_SEED", "1"))


def put_images(prefix: str) -> None:
    """Store 600 objects, 18 of which are broken: empty, text, or truncated images."""
    for number in range(GOOD):
        name, data, _ = small_image(number)
        storage.write(f"{prefix}/{name}", data)
    cut = small_image(1)[1]
    for number in range(BROKEN):
        data = (b"", b"a letter", cut[: len(cut) // 2])[number % 3]
        storage.write(f"{prefix}/{number % 2}/broken-{number:02d}.jpg", data)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The S3 server, its proxy, and the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        made = World(tmp_path_factory.mktemp("chaos"), put_images)
        yield made
        made.close()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a test's random choices, from $CHAOS_SEED; it is printed."""
    print(f"CHAOS_SEED={SEED}")
    return SEED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it to the file $CHAOS_TABLE if set."""
    if OUTCOMES:
        table = as_table(OUTCOMES)
        terminalreporter.section(f"faults injected, seed {SEED}")
        terminalreporter.write_line(table)
        if path := os.environ.get("CHAOS_TABLE"):
            Path(path).write_text(table + "\n")
