"""What makes two runs the same: the experiment, and the photos and labels that it is made on.

Enters: settings, splits and what a look at them found. Leaves: plain values for run.json, which is
written once. A run goes on where it is the same as far as both say what they are: one that an
older version began says less, and what it does not say is not compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from pipeline.data import storage
from pipeline.data.datasets import Split
from pipeline.data.survey import Survey
from pipeline.train.recipes.experiment import Experiment, differences
from pipeline.train.settings import TrainingSettings
from pipeline.train.worker import checkpoints

Identity = dict[str, Any]


def of_lists(settings: TrainingSettings, train: Split, val: Split) -> Identity:
    """What is known before a file is read: the experiment, and the names of the photos."""
    known = hashlib.sha256()
    for split in (train, val):
        for pair in split.pairs:
            known.update(storage.relative(settings.data, pair.image).encode() + b"\0")
        known.update(b"\n")
    return {
        "experiment": json.loads(settings.experiment.to_json()),
        "photos": known.hexdigest()[:16],
    }


def of_contents(train: Survey, val: Survey) -> Identity:
    """What the files hold: the bytes of photos and labels, the same for every copy of the set.

    `labels` are the counts of those to train on, all that runs of older versions know.
    """
    counts = json.loads(replace(train, fingerprint="").to_json())
    del counts["photos_sha256"], counts["labels_sha256"]
    held = json.dumps(counts, separators=(",", ":"))
    return {
        "labels": hashlib.sha256(held.encode()).hexdigest()[:16],
        "train_photos": train.images_sha256[:16],
        "train_labels": train.labels_sha256[:16],
        "val_photos": val.images_sha256[:16],
        "val_labels": val.labels_sha256[:16],
    }


def check_experiment(settings: TrainingSettings) -> None:
    """Raises ValueError where --out holds a run of another experiment, on whatever photos."""
    check_same(settings.out, {"experiment": json.loads(settings.experiment.to_json())})


def check_same(out: str, identity: Identity) -> None:
    """Raises ValueError where `out` holds another run, as far as both say what they are."""
    uri = storage.join(out, checkpoints.RUN)
    if not storage.exists(uri):
        # nothing exists in a bucket that is not there, but only a listing says so
        next(iter(storage.list_pages(out)), None)
        return
    before = _before(uri)
    both = identity.keys() & before.keys()
    mine, theirs = ({name: each[name] for name in both} for each in (identity, before))
    found = differences(json.dumps(mine), json.dumps(theirs))
    if found:
        raise ValueError(
            f"{out} holds another run ({'; '.join(found[:3])}): give it another --out, or the "
            "arguments and files that it was begun with"
        )


def _before(uri: str) -> Identity:
    """What the run at `uri` says it is; fields that its version did not have are their defaults.

    Raises ValueError where its experiment is none that this version knows.
    """
    before: Identity = json.loads(storage.read(uri))
    try:
        experiment = Experiment.from_json(json.dumps(before["experiment"]))
    except ValueError as error:
        raise ValueError(f"{uri} cannot be gone on with: {error}") from None
    return before | {"experiment": json.loads(experiment.to_json())}
