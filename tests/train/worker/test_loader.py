"""Batches do not depend on the number of loader processes, on resumes or on other workers."""

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
from pipeline.train.worker.loader import Batch, LoaderConfig, load_batches
from tests.train import tiny

AUGMENTATION = AugmentConfig(crop_size=(33, 35), late_crop_size=(49, 33), late_from=0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LoaderConfig:
    root = tmp_path_factory.mktemp("set")
    tiny.write_dataset(root, train=5, val=1)
    return LoaderConfig(
        split=open_split(str(root), "train", layout="folders", classes=tiny.CLASSES),
        indices=(0, 1, 2, 3, 4, 2),
        read=storage.read,
        augmentation=AUGMENTATION,
        fill=(124, 116, 104),
        batch_size=5,
        max_steps=6,
        seed=7,
    )


def load_all(
    config: LoaderConfig, start: int = 0, stop: int = 6, *, loaders: int = 0
) -> list[Batch]:
    found = list(load_batches(config, start, stop, loaders=loaders))
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


def equal(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        a.uris == b.uris and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(found, expected, strict=True)
    )


def test_a_batch_has_the_decoded_and_augmented_images_of_its_draws(
    config: LoaderConfig,
) -> None:
    for step, batch in enumerate(load_all(config)):
        crop = (33, 35) if step < 3 else (49, 33)
        draws = sampler.draw_batch(config.indices, seed=7, step=step, batch_size=5)
        assert batch.images.shape == (5, *crop, 3)
        for position, draw in enumerate(draws):
            pair = config.split.pairs[draw.index]
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
            assert batch.uris[position] == pair.image
            assert (batch.images[position].numpy() == image).all()
            assert (batch.labels[position].numpy() == label).all()


@pytest.mark.process
@pytest.mark.parametrize("loaders", [1, 2])
def test_loader_processes_do_not_change_a_byte(config: LoaderConfig, loaders: int) -> None:
    assert equal(load_all(config, loaders=loaders), load_all(config))


def test_a_resumed_run_gets_the_same_batches(config: LoaderConfig) -> None:
    whole = load_all(config)
    assert equal(load_all(config, 4), whole[4:])
    assert load_all(config, 6) == []


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_parts_of_all_workers_make_up_the_batch(config: LoaderConfig, world_size: int) -> None:
    parts = [
        load_all(replace(config, rank=rank, world_size=world_size), 2, 4)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(load_all(config, 2, 4)):
        for position in range(5):
            part = parts[position % world_size][step]
            assert part.uris[position // world_size] == whole.uris[position]
            assert torch.equal(part.images[position // world_size], whole.images[position])


@pytest.mark.parametrize("loaders", [0, pytest.param(1, marks=pytest.mark.process)])
def test_an_unusable_label_replaces_its_batch_by_an_error(
    config: LoaderConfig, loaders: int, tmp_path: Path
) -> None:
    tiny.write_dataset(tmp_path, train=3, val=1)
    split = open_split(str(tmp_path), "train", layout="folders", classes=tiny.CLASSES)
    label = tmp_path / "train" / "labels" / "01.png"
    Image.fromarray(np.full((40, 42), 37, dtype=np.uint8)).save(label)
    broken = replace(config, split=split, indices=(0, 1, 2), batch_size=1)
    found = list(load_batches(broken, 0, 3, loaders=loaders))
    errors = [item for item in found if isinstance(item, SampleError)]
    assert len(found) == 3
    assert len(errors) == 1
    assert errors[0].uri == str(label)
    assert "holds class 37, but num_classes is 4; is ignore_index (255) set?" in str(errors[0])


def test_a_batch_holds_the_time_spent_waiting_for_it(config: LoaderConfig) -> None:
    assert all(batch.waited_s > 0 for batch in load_all(config))


_TRAINER = """
import pickle, sys
from pipeline.train.worker.loader import load_batches
if __name__ == "__main__":
    for _ in load_batches(pickle.load(open(sys.argv[1], "rb")), 0, 6, loaders=2):
        print("made", flush=True)
        sys.stdin.read()
"""


@pytest.mark.process
def test_loader_processes_exit_when_their_trainer_is_killed(
    config: LoaderConfig, tmp_path: Path
) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    (tmp_path / "trainer.py").write_text(_TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(tmp_path / "config")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(tmp_path)
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"made\n"
        children = _marked(tmp_path) - {trainer.pid}
        assert len(children) >= 3  # the forkserver and two loaders
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 30
    while (left := _marked(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set()


def _environment(mark: Path) -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "MARK": str(mark), "PYTHONPATH": path}


def _marked(mark: Path) -> set[int]:
    """Return the processes that have inherited this mark in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found
