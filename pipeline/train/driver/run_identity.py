"""Run identity: the experiment, and the images and labels of its data.

It is written to run.json once. A run is resumed only if run.json has the same keys with the same
values. Two tables define what it means if a key is missing that earlier versions did not write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pipeline.data import storage
from pipeline.data.datasets import Split
from pipeline.data.survey import Survey
from pipeline.train.recipes.experiment import Experiment, differences
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker import checkpoints

Identity = dict[str, Any]

KEYS = (
    *("experiment", "photos", "labels"),
    *("train_photos", "train_labels", "val_photos", "val_labels"),
)
"""The keys of run.json. Any other key was written by a newer version."""

NOT_RECORDED = frozenset({"labels", "train_photos", "train_labels", "val_photos", "val_labels"})
"""Keys that the first versions did not write. They are not compared if they are missing."""

ADDED_LATER: Mapping[str, Any] = MappingProxyType({})
"""Fields that were added to `Experiment` later (dotted, such as "optimiser.max_steps") -> the value
that runs without the field used. Never change an entry, even if the field's default changes."""

_HASHED_COUNTS = ("fingerprint", "pixels", "photo_pixels", "ignored", "holds")
"""Keys of a survey, in order, whose hash is stored as `labels`. Keys added later are not hashed."""


def of_lists(settings: TrainingSettings, train: Split, val: Split) -> Identity:
    """Return what is known before reading a file: the experiment, and the names of the images."""
    names = hashlib.sha256()
    for split in (train, val):
        for pair in split.pairs:
            names.update(storage.relative(settings.data, pair.image).encode() + b"\0")
        names.update(b"\n")
    return {
        "experiment": json.loads(settings.experiment.to_json()),
        "photos": names.hexdigest()[:16],
    }


def of_contents(train: Survey, val: Survey) -> Identity:
    """Return the identity of the images' and labels' bytes, the same for every copy of the data.

    `labels` is a hash of the class counts of the training labels.
    """
    counts = json.loads(replace(train, fingerprint="").to_json())
    hashed = {name: counts[name] for name in _HASHED_COUNTS}
    held = json.dumps(hashed, separators=(",", ":"))
    return {
        "labels": hashlib.sha256(held.encode()).hexdigest()[:16],
        "train_photos": train.images_sha256[:16],
        "train_labels": train.labels_sha256[:16],
        "val_photos": val.images_sha256[:16],
        "val_labels": val.labels_sha256[:16],
    }


def check_experiment(settings: TrainingSettings) -> None:
    """Raise ValueError if --out holds a run of another experiment, on any data."""
    check_same(settings.out, {"experiment": json.loads(settings.experiment.to_json())})


def check_same(out: str, identity: Identity) -> None:
    """Raise ValueError if `out` holds another run, judged by the keys that `identity` has."""
    uri = storage.join(out, checkpoints.RUN)
    if not storage.exists(uri):
        # `exists` is False in a missing bucket too; a listing raises
        next(iter(storage.list_pages(out)), None)
        return
    stored = _stored(uri)
    mine = {key: identity[key] for key in identity if key in stored or key not in NOT_RECORDED}
    theirs = {key: stored[key] for key in stored if key in identity or key not in KEYS}
    found = differences(json.dumps(mine), json.dumps(theirs))
    if found:
        raise ValueError(
            f"{out} holds another run ({'; '.join(found[:3])}); give another --out, or the "
            "arguments and files that the run was started with"
        )


def _stored(uri: str) -> Identity:
    """Return the identity in run.json, completed from `ADDED_LATER`.

    Raises ValueError if this version cannot read its experiment.
    """
    stored: Identity = json.loads(storage.read(uri))
    experiment = stored.get("experiment", {})
    try:
        Experiment.from_json(json.dumps(experiment))
    except ValueError as error:
        raise ValueError(f"{uri} cannot be resumed: {error}") from None
    for path, value in ADDED_LATER.items():
        *groups, name = path.split(".")
        values = experiment
        for group in groups:
            values = values.setdefault(group, {})
        values.setdefault(name, value)
    return stored
