"""Images that crash their process: each becomes an error row, and no other image is affected."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import storage
from tests.chaos.hooks.sitecustomize import DEADLY, GREED_BYTES, GREEDY
from tests.chaos.nodes import Nodes
from tests.chaos.outcomes import check, watched
from tests.chaos.world import BUCKET, Run, World, results_of
from tests.small_images import small_image

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(900)]

LONGER_S = 60.0  # at most, per image
POISON = {"crash": "worker_died", "eat": "out_of_memory", "hang": "timeout"}


@pytest.fixture(scope="module")
def control_s(world: World) -> float:
    """The duration of a run without faults, in seconds."""
    killer = world.killer()
    with watched("none: the control run", results_of("control")) as line:
        run = world.done("control")
    check(world, "control", line)
    assert _loads(run, killer.folder) == 1
    return line.seconds


def _loads(run: Run, folder: Path) -> int:
    """Return how often the model was loaded by processes other than the driver."""
    return sum(pid != run.process.pid for pid in _noted(folder / "loads"))


def _noted(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()]


def _png(first_pixels: tuple[int, ...]) -> bytes:
    """Return a PNG that starts with these pixel values."""
    pixels = np.asarray(Image.open(io.BytesIO(small_image(3)[1])).convert("RGB")).copy()
    pixels.reshape(-1)[: len(first_pixels)] = first_pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_that_crashes_fills_or_hangs_its_decoder_is_an_error(
    world: World, control_s: float
) -> None:
    kinds = {}
    for what, kind in POISON.items():
        uri = f"{BUCKET}/poison/{what}.jpg"
        storage.write(uri, small_image(4)[1] + f"faults:{what}".encode())
        kinds[uri] = [kind]
    killer = world.killer()
    images = ("--images", BUCKET, "--include", "night/* poison/*")
    with watched("decoder: segfault, out of memory, hang", results_of("poison")) as line:
        run = world.done("poison", *images)
        line.injected = len(_noted(killer.folder / "poisoned"))
    check(world, "poison", line, kinds=kinds)
    assert _loads(run, killer.folder) == 1
    assert line.injected == len(kinds) + 1  # a crash is retried once
    assert line.seconds < control_s + len(kinds) * LONGER_S * world.crowd


def test_an_image_that_kills_its_actor_is_an_error_and_queued_shards_are_not(
    world: World, control_s: float
) -> None:
    uri = f"{BUCKET}/deadly/0.png"
    storage.write(uri, _png(DEADLY))
    killer = world.killer()
    images = ("--images", BUCKET, "--include", "night/* deadly/*")
    with watched("an actor that crashes during inference", results_of("deadly")) as line:
        world.done("deadly", *images)
        line.injected = len(_noted(killer.folder / "poisoned"))
    check(world, "deadly", line, kinds={uri: ["worker_died"]})
    assert line.injected == 4  # with others, without a queue, and twice alone
    assert line.seconds < control_s + LONGER_S * world.crowd


@pytest.fixture
def small_node(world: World) -> Iterator[Nodes]:
    """A node where Ray kills a worker that allocates two thirds of GREED_BYTES."""
    total, free = _memory("MemTotal"), _memory("MemAvailable")
    if free < 1.5 * GREED_BYTES:
        pytest.skip("the machine has too little free memory")
    most = (total - free + 2 * GREED_BYTES / 3) / total
    watch = {"RAY_memory_usage_threshold": f"{most:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    nodes = Nodes(world.variables | watch)
    nodes.add(cpus=4)
    yield nodes
    nodes.close()


def _memory(name: str) -> int:
    """Return this value of /proc/meminfo in bytes."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if name in line]
    return int(line.split()[1]) << 10


def test_an_image_whose_actor_is_killed_for_memory_is_an_error(
    world: World, small_node: Nodes
) -> None:
    uri = f"{BUCKET}/greedy/0.png"
    storage.write(uri, _png(GREEDY))
    few = {name: row for name, row in world.rows.items() if "/night/0/000" in name}
    killer = world.killer()
    images = ("--images", BUCKET, "--include", "night/0/000* greedy/*", "--shard-images", "4")
    with watched("an actor killed for using too much memory", results_of("greedy")) as line:
        run = world.run("greedy", *images, nodes=small_node)
        assert run.wait() == 0, run.log
        line.injected = len(_noted(killer.folder / "poisoned"))
    check(world, "greedy", line, kinds={uri: ["out_of_memory"]}, rows=few)
    assert line.injected >= 2  # alone; with others, Ray may kill another worker
    assert line.seconds < 2 * LONGER_S * world.crowd
