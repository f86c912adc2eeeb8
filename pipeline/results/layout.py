"""File layout under a results URI; every name follows from run id and number.

images/run=<id>/shard-000017.parquet   one row per image, one file per shard
classes/run=<id>/part-00000.parquet    one row per image and class, sorted over the run
done/run=<id>.parquet                  the last keys of images that --only-new skips
done/run=<id>/part-00000.parquet       the keys before them in large runs; valid once the last exist
runs/run=<id>.parquet                  the run's record, written last
plans/run=<id>/plan.json               the run's plan; its parts are in the same folder
singles/run=<id>/000017/00003.parquet  rows of a shard processed one image at a time
usage/run=<id>/<driver>.json           resources used by each driver of an unfinished run
leases/run=<id>.json                   the driver that works on the run
leases/only-new-<fingerprint>.json     the driver that processes new images of some prefix and model
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.data import storage

FOLDERS = ("images", "classes", "done", "runs", "plans", "singles", "usage", "leases")

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_SHARD = re.compile(r"/run=[^/]+/shard-(\d{6,})\.parquet\Z")
_PART = re.compile(r"/run=[^/]+/part-\d{5,}\.parquet\Z")
_RUN = re.compile(r"run=([A-Za-z0-9][A-Za-z0-9._-]{0,99}?)(?:\.parquet\Z|\.json\Z|/|\Z)")


def check_run_id(run_id: str) -> None:
    """Check that `run_id` can be part of an object's name everywhere. Raises ValueError."""
    if not _RUN_ID.match(run_id) or run_id.endswith((".parquet", ".json")):
        raise ValueError(
            f"run id {run_id!r}: must be 1 to 100 letters, digits, '.', '_' or '-', start with a "
            "letter or digit, and not end in .parquet or .json"
        )


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """URIs of one run under `results`."""

    results: str
    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    def _at(self, folder: str, ending: str = "") -> str:
        return storage.join(self.results, f"{folder}/run={self.run_id}{ending}")

    @property
    def images(self) -> str:
        return self._at("images")

    @property
    def classes(self) -> str:
        return self._at("classes")

    @property
    def plan(self) -> str:
        return self._at("plans")

    @property
    def singles(self) -> str:
        return self._at("singles")

    @property
    def usage(self) -> str:
        return self._at("usage")

    @property
    def done(self) -> str:
        return self._at("done", ".parquet")

    @property
    def done_parts(self) -> str:
        return self._at("done")

    @property
    def record(self) -> str:
        return self._at("runs", ".parquet")

    @property
    def lease(self) -> str:
        return self._at("leases", ".json")

    def shard(self, number: int) -> str:
        return f"{self.images}/shard-{number:06d}.parquet"

    def class_part(self, number: int) -> str:
        return f"{self.classes}/part-{number:05d}.parquet"

    def done_part(self, number: int) -> str:
        return f"{self.done_parts}/part-{number:05d}.parquet"

    def single(self, shard: int, position: int) -> str:
        return f"{self.singles}/{shard:06d}/{position:05d}.parquet"


def only_new_lease(results: str, fingerprint: str) -> str:
    """Return the URI of the lease shared by all --only-new runs of the same `fingerprint`."""
    return storage.join(results, f"leases/only-new-{fingerprint}.json")


def is_only_new_lease(results: str, uri: str) -> bool:
    """Return whether the object `uri` under `results` is a lease of --only-new runs."""
    return uri.startswith(storage.join(results, "leases/only-new-")) and uri.endswith(".json")


def shard_number(uri: str) -> int | None:
    """Return the shard number in a file name in a run's folder, None for other files."""
    found = _SHARD.search(uri)
    return int(found[1]) if found else None


def filter_shards(objects: Iterable[storage.Object]) -> Iterator[storage.Object]:
    """Yield the objects that are shards; users and tools put other files in the same folder."""
    return (item for item in objects if shard_number(item.uri) is not None)


def filter_parts(objects: Iterable[storage.Object]) -> Iterator[storage.Object]:
    """Yield the objects that are parts of `classes` or `done`."""
    return (item for item in objects if _PART.search(item.uri))


def run_id_of(results: str, uri: str) -> str | None:
    """Return the id of the run that the object `uri` under `results` belongs to, or None."""
    folder, _, rest = storage.relative(results, uri).partition("/")
    found = _RUN.match(rest)
    return found[1] if found and folder in FOLDERS else None
