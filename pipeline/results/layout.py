"""Where things lie below a results URI: every name is a function of run and number.

images/run=<id>/shard-000017.parquet   one row an image, one file a shard
classes/run=<id>/part-00000.parquet    one row an image and class, sorted over the run
done/run=<id>.parquet                  the keys that --only-new leaves out, the last of them
done/run=<id>/part-00000.parquet       those before, of large runs; with the last they count
runs/run=<id>.parquet                  the run's record, written last
plans/run=<id>/plan.json               what the run will do; its parts lie beside it
singles/run=<id>/000017/00003.parquet  rows of a shard that is done image by image
usage/run=<id>/<driver>.json           what each driver of an unfinished run has used
leases/run=<id>.json                   who works on the run
leases/only-new-<fingerprint>.json     who does what is new of some photos, with some model
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
    """Raises ValueError where `run_id` could not be part of an object's name everywhere."""
    if not _RUN_ID.match(run_id) or run_id.endswith((".parquet", ".json")):
        raise ValueError(
            f"run id {run_id!r} is not usable: take 1 to 100 letters, digits, '.', '_' or '-', "
            "the first a letter or digit"
        )


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """The URIs of one run below `results`."""

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


def only_new_lease(results: str, work: str) -> str:
    """The lease of all runs that do what is new of the same `work`, a fingerprint."""
    return storage.join(results, f"leases/only-new-{work}.json")


def is_only_new_lease(results: str, uri: str) -> bool:
    """Whether the object `uri` below `results` is such a lease."""
    return uri.startswith(storage.join(results, "leases/only-new-")) and uri.endswith(".json")


def shard_number(uri: str) -> int | None:
    """The shard's number in the name of its file in a run's folder, None for other files."""
    found = _SHARD.search(uri)
    return int(found[1]) if found else None


def filter_shards(objects: Iterable[storage.Object]) -> Iterator[storage.Object]:
    """Those of the objects that are shards: people and tools put other files beside them."""
    return (item for item in objects if shard_number(item.uri) is not None)


def filter_parts(objects: Iterable[storage.Object]) -> Iterator[storage.Object]:
    """Those of the objects that are parts of `classes` or `done`."""
    return (item for item in objects if _PART.search(item.uri))


def run_id_of(results: str, uri: str) -> str | None:
    """The run that the object `uri` below `results` belongs to, None where it is of none."""
    folder, _, rest = storage.relative(results, uri).partition("/")
    found = _RUN.match(rest)
    return found[1] if found and folder in FOLDERS else None
