"""Systemic faults abort a run within a minute; a resumed run has a row for every image."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data import storage
from tests.chaos.outcomes import check, watched
from tests.chaos.world import BUCKET, Run, World, results_of, wait_for_shards
from tests.proxy import Rule

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

WITHIN_S = 60.0
EVERYTHING = "GET PUT HEAD POST DELETE"


def _stops(world: World, run: Run, reason: str) -> None:
    """Check that the run aborts in time, with the reason on its last line."""
    since = time.monotonic()
    assert run.wait() == 1, run.log
    assert time.monotonic() - since < WITHIN_S * world.crowd
    assert reason in run.last_line, run.log


@pytest.mark.parametrize(
    ("fault", "name", "rule", "reason"),
    [
        (
            "results bucket read-only",
            "readonly",
            Rule(fault="denied", methods="PUT", path="^/results/", in_a_row=10**9),
            "access denied (AccessDenied); check the AWS credentials",
        ),
        (
            "credentials that expire",
            "expired",
            Rule(fault="expired", methods=EVERYTHING, in_a_row=10**9),
            "access denied (ExpiredToken); check the AWS credentials",
        ),
    ],
)
def test_storage_that_starts_to_refuse_all_requests_aborts_the_run(
    fault: str, name: str, rule: Rule, reason: str, world: World
) -> None:
    with watched(fault, results_of(name)) as line:
        run = world.run(name)
        wait_for_shards(run, results_of(name), name)
        with world.proxy.ruled(rule):
            _stops(world, run, reason)
            line.injected = 1
            assert rule.struck
        world.done(name)
    check(world, name, line)


def test_a_bug_in_the_segmenter_aborts_the_run(world: World) -> None:
    killer = world.killer()
    bug = killer.folder / "bug"
    with watched("an exception in the segmenter", results_of("bug")) as line:
        run = world.run("bug")
        wait_for_shards(run, results_of("bug"), "bug")
        bug.touch()
        _stops(world, run, "an injected bug")
        line.injected = 1
        bug.unlink()
        world.done("bug")
    check(world, "bug", line)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a disk of a size in KiB, or resizes it, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        again = ",remount" if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k{again}", "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_aborts_the_run(world: World, small_disk: Callable[[int], Path]) -> None:
    results = str(small_disk(256) / "disk")
    with watched("disk full", results) as line:
        run = world.run("disk", "--results", results)
        wait_for_shards(run, results, "disk")
        _stops(world, run, "No space left on device")
        line.injected = 1
        small_disk(64 << 10)
        world.done("disk", "--results", results)
    check(world, "disk", line, results=results)


def test_too_many_broken_images_abort_the_run(world: World) -> None:
    kinds = {}
    for number in range(50):
        uri = f"{BUCKET}/broken/{number:02d}.jpg"
        storage.write(uri, b"a letter" * (number % 2))
        kinds[uri] = ["not_an_image" if number % 2 else "empty"]
    images = ("--images", BUCKET, "--include", "broken/* night/*")
    with watched("10 % of the images broken", results_of("tenth")) as line:
        run = world.run("tenth", *images)
        _stops(world, run, "over --max-error-fraction 0.06")
        line.injected = len(kinds)
        world.done("tenth", *images, "--max-error-fraction", "0.2")
    check(world, "tenth", line, kinds=kinds)
