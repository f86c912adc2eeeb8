"""Where a training run keeps what it has come to, below its --out URI.

    run.json                              what the run is; written once, put-if-absent
    survey.json, survey-val.json          what the labels of the splits hold
    initial.safetensors                   the network before the first step
    checkpoints/step-00001200/state.safetensors    the last two, to go on from
    best.safetensors, model.safetensors   the network at its best val mIoU, and at the end
    curves.png, samples.png, tensorboard/ what people look at
    record.json                           written last: the run is finished

A checkpoint is one object, put whole or not at all, and *resume is a listing*: the newest one that
can be read. So a half-written one is never picked up, and no list of them can go stale.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import pyarrow.fs

from pipeline.data import storage
from pipeline.model.formats import CheckpointError
from pipeline.train.worker import state
from pipeline.train.worker.state import Snapshot

logger = logging.getLogger(__name__)

RUN, RECORD = "run.json", "record.json"
SURVEY, SURVEY_VAL = "survey.json", "survey-val.json"
INITIAL = "initial.safetensors"
BEST, MODEL = "best.safetensors", "model.safetensors"
CURVES, SAMPLES, EVENTS = "curves.png", "samples.png", "tensorboard/events.out.tfevents.0"
FOLDER = "checkpoints"
_STATE = re.compile(r"step-(\d+)/state\.safetensors$")


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def save(out: str, snapshot: Snapshot) -> None:
    """Puts the snapshot, then deletes the checkpoints before it but for the one just before."""
    storage.write(_uri(out, snapshot.step), snapshot.to_bytes())
    older = sorted(each for each in _found(out) if each[0] < snapshot.step)
    storage.delete([uri for _, uri in older[:-1]], within=storage.join(out, FOLDER))


def save_best(out: str, data: bytes) -> None:
    """Puts the network at its best score, which a checkpoint has in its history."""
    storage.write(storage.join(out, BEST), data)


def latest(out: str) -> Snapshot | None:
    """The newest checkpoint that can be read, None where there is none.

    One that cannot is left out with a warning: training then repeats what it held.
    """
    for _, uri in sorted(_found(out), reverse=True):
        try:
            return state.read(storage.read(uri), uri)
        except CheckpointError as error:
            logger.warning("%s; going on from the one before", error)
    return None


def load_step(out: str, step: int) -> Snapshot:
    """The checkpoint after `step` steps. Raises CheckpointError, StorageError."""
    uri = _uri(out, step)
    return state.read(storage.read(uri), uri)


def newest_step(out: str) -> int:
    """Of the newest checkpoint, which need not be readable; 0 where there is none."""
    return max((step for step, _ in _found(out)), default=0)


def _uri(out: str, step: int) -> str:
    return storage.join(out, f"{FOLDER}/{folder_name(step)}/state.safetensors")


def _found(out: str) -> list[tuple[int, str]]:
    """(step, URI) of every checkpoint below `out`."""
    listed = storage.list_objects(storage.join(out, FOLDER))
    matches = [(_STATE.search(found.uri), found.uri) for found in listed]
    return [(int(match[1]), uri) for match, uri in matches if match]


@dataclass(frozen=True, kw_only=True)
class RayStorage:
    """`out` as Ray Train takes it: a path, and where it is not local, the filesystem below it."""

    path: str
    filesystem: pyarrow.fs.FileSystem | None


def ray_storage(out: str) -> RayStorage:
    """Where Ray Train keeps its notes; those of a driver before are deleted.

    Ray's list of checkpoints is not written whole or not at all, so that of a killed driver may
    be broken; ours is the listing.
    """
    notes = storage.join(out, f"{FOLDER}/checkpoint_manager_snapshot.json")
    storage.delete([notes])
    found = storage.filesystem(out)
    if found is None:
        return RayStorage(path=out, filesystem=None)
    handler = pyarrow.fs.FSSpecHandler(found)
    return RayStorage(path=out.removeprefix("s3://"), filesystem=pyarrow.fs.PyFileSystem(handler))
