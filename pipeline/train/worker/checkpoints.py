"""The files of a training run, all below its --out URI.

    run.json                              the run's identity; written once, put-if-absent
    survey.json, survey-val.json          class statistics of the splits' labels
    initial.safetensors                   the network before the first step
    checkpoints/step-00001200/state.safetensors    the last two training states, to resume from
    best.safetensors, model.safetensors   the network at its best val mIoU, and at the end
    curves.png, samples.png, tensorboard/ plots
    record.json                           written last: the run is finished

A checkpoint is one object, written whole or not at all, and a run resumes from the newest readable
one that a listing finds. So a partial checkpoint is never used, and no index of them can be stale.
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
    """Return the name of the folder that holds the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def save(out: str, snapshot: Snapshot) -> None:
    """Write the snapshot, then delete all earlier checkpoints except the last of them."""
    storage.write(_uri(out, snapshot.step), snapshot.to_bytes())
    older = sorted(entry for entry in _list_checkpoints(out) if entry[0] < snapshot.step)
    storage.delete([uri for _, uri in older[:-1]], within=storage.join(out, FOLDER))


def save_best(out: str, data: bytes) -> None:
    """Write the network with the best score; a checkpoint must hold that score already."""
    storage.write(storage.join(out, BEST), data)


def latest(out: str) -> Snapshot | None:
    """Return the newest readable checkpoint, None if there is none.

    An unreadable one is skipped with a warning: training then repeats its steps.
    """
    for _, uri in sorted(_list_checkpoints(out), reverse=True):
        try:
            return state.read(storage.read(uri), uri)
        except CheckpointError as error:
            logger.warning("%s; resuming from the checkpoint before it", error)
    return None


def load_step(out: str, step: int) -> Snapshot:
    """Return the checkpoint after `step` steps. Raises CheckpointError, StorageError."""
    uri = _uri(out, step)
    return state.read(storage.read(uri), uri)


def newest_step(out: str) -> int:
    """Return the step of the newest checkpoint, readable or not; 0 if there is none."""
    return max((step for step, _ in _list_checkpoints(out)), default=0)


def _uri(out: str, step: int) -> str:
    return storage.join(out, f"{FOLDER}/{folder_name(step)}/state.safetensors")


def _list_checkpoints(out: str) -> list[tuple[int, str]]:
    """Return (step, URI) of every checkpoint below `out`."""
    listed = storage.list_objects(storage.join(out, FOLDER))
    matches = [(_STATE.search(found.uri), found.uri) for found in listed]
    return [(int(match[1]), uri) for match, uri in matches if match]


@dataclass(frozen=True, kw_only=True)
class RayStorage:
    """`out` in the form that Ray Train takes: a path, and the filesystem unless it is local."""

    path: str
    filesystem: pyarrow.fs.FileSystem | None


def ray_storage(out: str) -> RayStorage:
    """Return the storage for Ray Train's own files, after deleting those of an earlier driver.

    Ray does not write its list of checkpoints atomically: one left by a killed driver may be
    broken. It is not needed, since checkpoints are listed.
    """
    stale = storage.join(out, f"{FOLDER}/checkpoint_manager_snapshot.json")
    storage.delete([stale])
    filesystem = storage.filesystem(out)
    if filesystem is None:
        return RayStorage(path=out, filesystem=None)
    handler = pyarrow.fs.FSSpecHandler(filesystem)
    return RayStorage(path=out.removeprefix("s3://"), filesystem=pyarrow.fs.PyFileSystem(handler))
