"""Batches: the same bytes from any number of processes, after any resume, on any workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import storage
from pipeline.data.augment import augment
from pipeline.data.datasets import open_split
from pipeline.data.samples import SampleError
from pipeline.train.recipes.experiment import AugmentConfig
from pipeline.train.worker import sampler
from pipeline.train.worker.loader import Batch, LoaderConfig, batches
from tests.train import tiny

MADE = AugmentConfig(crop_size=(33, 35), late_crop_size=(49, 33), late_from=0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    root = tmp_path_factory.mktemp("set")
    tiny.write_dataset(root, train=5, val=1)
    return LoaderConfig(
        split=open_split(str(root), "train", layout="folders", classes=tiny.CLASSES),
        indices=(0, 1, 2, 3, 4, 2),
        read=storage.read,
        config=MADE,
        fill=(124, 116, 104),
        batch_size=5,
        max_steps=6,
        seed=7,
    )


def made(source: LoaderConfig, start: int = 0, stop: int = 6, *, loaders: int = 0) -> list[Batch]:
    found = list(batches(source, start, stop, loaders=loaders))
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        a.uris == b.uris and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(found, expected, strict=True)
    )


def test_a_batch_is_what_reading_and_augmenting_its_draws_one_by_one_gives(
    source: LoaderConfig,
) -> None:
    for step, batch in enumerate(made(source)):
        crop = (33, 35) if step < 3 else (49, 33)
        draws = sampler.batch(source.indices, seed=7, step=step, batch_size=5)
        assert batch.images.shape == (5, *crop, 3)
        for place, draw in enumerate(draws):
            pair = source.split.pairs[draw.index]
            image, label = augment(
                np.array(Image.open(pair.image)),
                np.array(Image.open(pair.label)),
                np.random.default_rng(draw.seed),
                crop_size=crop,
                min_scale=0.5,
                max_scale=2.0,
                mirror=True,
                fill=(124, 116, 104),
                ignore_index=255,
            )
            assert batch.uris[place] == pair.image
            assert (batch.images[place].numpy() == image).all()
            assert (batch.labels[place].numpy() == label).all()


@pytest.mark.parametrize("loaders", [1, 2])
def test_loader_processes_change_no_byte(source: LoaderConfig, loaders: int) -> None:
    assert same(made(source, loaders=loaders), made(source))


def test_a_resume_goes_on_with_the_same_batches(source: LoaderConfig) -> None:
    whole = made(source)
    assert same(made(source, 4), whole[4:])
    assert made(source, 6) == []


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_workers_parts_are_together_the_batch(source: LoaderConfig, world_size: int) -> None:
    parts = [
        made(replace(source, rank=rank, world_size=world_size), 2, 4) for rank in range(world_size)
    ]
    for step, whole in enumerate(made(source, 2, 4)):
        for place in range(5):
            part = parts[place % world_size][step]
            assert part.uris[place // world_size] == whole.uris[place]
            assert torch.equal(part.images[place // world_size], whole.images[place])


@pytest.mark.parametrize("loaders", [0, 1])
def test_what_cannot_be_read_arrives_as_a_message_and_the_next_batch_comes(
    source: LoaderConfig, loaders: int, tmp_path: Path
) -> None:
    tiny.write_dataset(tmp_path, train=3, val=1)
    split = open_split(str(tmp_path), "train", layout="folders", classes=tiny.CLASSES)
    label = tmp_path / "train" / "labels" / "01.png"
    Image.fromarray(np.full((40, 42), 37, dtype=np.uint8)).save(label)
    broken = replace(source, split=split, indices=(0, 1, 2), batch_size=1)
    found = list(batches(broken, 0, 3, loaders=loaders))
    errors = [each for each in found if isinstance(each, SampleError)]
    assert len(found) == 3
    assert len(errors) == 1
    assert errors[0].uri == str(label)
    assert "holds class 37, but num_classes is 4; is ignore_index (255) set?" in str(errors[0])


def test_a_batch_says_how_long_it_was_waited_for(source: LoaderConfig) -> None:
    assert all(batch.waited_s > 0 for batch in made(source))


_TRAINER = """
import pickle, sys
from pipeline.train.worker.loader import batches
if __name__ == "__main__":
    for _ in batches(pickle.load(open(sys.argv[1], "rb")), 0, 6, loaders=2):
        print("made", flush=True)
        sys.stdin.read()
"""


def test_loaders_end_with_a_trainer_that_is_killed(source: LoaderConfig, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    (tmp_path / "trainer.py").write_text(_TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(tmp_path / "source")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(tmp_path)
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"made\n"
        helpers = _marked(tmp_path) - {trainer.pid}
        assert len(helpers) >= 3  # the forkserver and two loaders
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 30
    while (left := _marked(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


def _environment(mark: Path) -> dict[str, str]:
    path = os.pathsep.join(each for each in sys.path if each)
    return {**os.environ, "MARK": str(mark), "PYTHONPATH": path}


def _marked(mark: Path) -> set[int]:
    """Processes with that mark in their environment, and what they started."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found
