"""A bulk run on a GPU: the same images, and nearly the same masks, as on the CPU."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest

from jobs.segment import main
from pipeline.data import masks
from tests.small_images import small_image

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.slow]

CHECKPOINT = Path(__file__).parents[2] / "jobs" / "demo" / "tfzoo-voc-mobilenetv2.safetensors"


def masks_of(results: Path) -> dict[str, np.ndarray]:
    files = f"'{results}/images/run=a/*.parquet'"
    rows = duckdb.execute(f"select uri, mask from {files} where status = 'ok'").fetchall()
    return {uri: masks.decode(mask) for uri, mask in rows}


def test_a_run_on_a_gpu_gives_nearly_the_masks_of_a_run_on_the_cpu(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        name, data, _ = small_image(number)
        (images / Path(name).name).write_bytes(data)
    (images / "broken.jpg").write_bytes(b"not an image")
    found = {}
    for device, gpus in (("cpu", "0"), ("gpu", "1")):
        flags = ["--images", str(images), "--results", str(tmp_path / device), "--run-id", "a"]
        flags += ["--checkpoint", str(CHECKPOINT), "--shard-images", "8"]
        flags += ["--gpus-per-actor", gpus, "--cpus-per-actor", "1"]
        assert main(flags) == 0
        found[device] = masks_of(tmp_path / device)
    assert found["gpu"].keys() == found["cpu"].keys()
    assert len(found["gpu"]) == 24
    for uri, mask in found["gpu"].items():
        assert (mask == found["cpu"][uri]).mean() > 0.9, uri
    [(seconds,)] = duckdb.execute(
        f"select gpu_seconds from '{tmp_path}/gpu/runs/*.parquet'"
    ).fetchall()
    assert seconds > 0
