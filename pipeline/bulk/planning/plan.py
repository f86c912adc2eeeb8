"""The plan of a run, made once: a listing, cut into shards, written put-if-absent.

The listing is spooled to local disk page by page and joined there by DuckDB within a memory
limit, so a bucket of any size is planned in bounded memory. The plan is `plan.json`, which names
its parts: Parquet files of one batch of shards each, one row per shard. The name of a part holds a
hash of its bytes, so if two drivers plan at once, the first `plan.json` wins and is complete.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings, fingerprint, former_identities
from pipeline.data import storage
from pipeline.results.layout import RunLayout
from pipeline.runs.artifacts import read_artifact

MAX_PART_SHARDS = 10_000
"""Shards per part at most: a part is one Ray data set, bounded by the driver's memory."""

MAX_PART_IMAGES = 500_000
"""Images per part at most: its file must fit into one put."""

_START_OVER = "pass another --run-id to start over, or delete this run with jobs/clean.py"

_NOT_GIVEN = "not given"

_IMAGE = pa.struct(
    [
        pa.field("uri", pa.string()),
        pa.field("etag", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("label_uri", pa.string()),
        pa.field("label_etag", pa.string()),
        pa.field("label_bytes", pa.int64()),
    ]
)
SHARDS = pa.schema([pa.field("shard", pa.int32()), pa.field("images", pa.list_(_IMAGE))])
"""The schema of a part: one row per shard."""


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """A file of the plan: shards `first_shard` to `first_shard + shards - 1`."""

    name: str
    first_shard: int
    shards: int

    @property
    def numbers(self) -> range:
        """The numbers of the shards."""
        return range(self.first_shard, self.first_shard + self.shards)


@dataclass(frozen=True, kw_only=True)
class PlanCounts:
    """Counts of the plan's images and shards, and of the objects it leaves out."""

    images: int = 0
    bytes: int = 0
    shards: int = 0
    labels: int = 0  # images that have a label
    left_out: int = 0  # objects that --include does not match
    outside: int = 0  # objects of the inventory not below --images, or not the current version
    done_before: int = 0  # images that earlier runs processed
    done_otherwise: int = 0  # images processed only with another model or other settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of `plan.json`."""

    run_id: str
    started_at: str  # ISO 8601, UTC
    fingerprint: str  # of `identity`
    identity: dict[str, Any]
    model: str  # fingerprint of the checkpoint
    settings: str  # fingerprint of the inference settings
    counts: PlanCounts
    inventory_etag: str | None = None  # of the inventory that was read instead of a listing
    parts: list[PlanPart] = field(default_factory=list)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        values = json.loads(data)
        values["counts"] = PlanCounts(**values["counts"])
        values["parts"] = [PlanPart(**part) for part in values["parts"]]
        return cls(**values)


def run_id_of(settings: BulkSettings, identity: dict[str, Any]) -> str:
    """Return the given run id, or that of an unfinished run with these arguments, or today's.

    With --only-new, a number is appended from the second run of the day on.
    """
    if settings.run_id is not None:
        return settings.run_id
    suffix, *former = (
        fingerprint({**each, "checkpoint": settings.checkpoint})[:8]
        for each in (identity, *former_identities(identity))
    )
    today = f"{datetime.now(UTC):%Y-%m-%d}-{suffix}"
    planned = [
        run
        for run in _runs_planned(settings.results)
        if {suffix, *former}.intersection(run.split("-")[3:4])
    ]
    unfinished = [run for run in planned if not _is_finished(settings.results, run)]
    if unfinished:
        return today if today in unfinished else unfinished[0]
    if not settings.only_new or today not in planned:
        return today
    return next(run for n in itertools.count(2) if (run := f"{today}-{n}") not in planned)


def _is_finished(results: str, run_id: str) -> bool:
    return storage.exists(RunLayout(results=results, run_id=run_id).record)


def _runs_planned(results: str) -> Iterator[str]:
    plans = storage.join(results, "plans")
    for item in storage.list_objects(plans):
        folder, _, name = storage.relative(plans, item.uri).partition("/")
        if name == "plan.json":
            yield folder.removeprefix("run=")


def load(layout: RunLayout) -> Plan | None:
    """Return the plan of the run, or None if it has none. Raises RunStoppedError, StorageError."""
    uri = f"{layout.plan}/plan.json"
    try:
        return read_artifact(
            uri, Plan.from_json, hint=f"it is not a plan of this version; {_START_OVER}"
        )
    except storage.StorageError as error:
        if error.kind == "vanished":
            return None
        raise


def check_same(plan: Plan, identity: dict[str, Any]) -> None:
    """Raise ValueError if the plan was made for other settings or another checkpoint.

    A value that only one side has counts as different. A plan that an earlier version made with
    its default for --include keeps that default.
    """
    for former in former_identities(identity):
        if former["include"] == plan.identity.get("include"):
            identity = former
    for name in sorted(plan.identity.keys() | identity.keys()):
        before, now = (each.get(name, _NOT_GIVEN) for each in (plan.identity, identity))
        if before != now:
            raise ValueError(
                f"run id {plan.run_id} belongs to a run with another {_flag_of(name)} "
                f"({before}, now {now}); pass another --run-id"
            )


def _flag_of(name: str) -> str:
    """Return the flag, without dashes, of a value of an identity."""
    return {"model_changed": "on-model-change"}.get(name, name.replace("_", "-"))


def make(
    settings: BulkSettings,
    layout: RunLayout,
    identity: dict[str, Any],
    *,
    write: bool = True,
    observe: Callable[[Iterator[ImageRef]], Iterator[ImageRef]] = iter,
) -> Plan:
    """List the images, cut them into shards and, if `write` is true, store the plan.

    If another driver stored its plan first, that one is returned. `observe` wraps the images on
    their way into the plan.

    Raises ValueError if there is nothing to segment, labels are ambiguous, or the model changed and
    --on-model-change is not given; StorageError.
    """
    values: dict[str, Any] = {
        "run_id": layout.run_id,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "model": identity["model"],
        "settings": settings.inference.fingerprint(),
    }
    with Listing(settings, model=values["model"], settings_print=values["settings"]) as listing:
        if write and settings.on_model_change is None and listing.done_otherwise:
            raise ValueError(_model_changed_message(listing))
        counted, parts = _write_parts(settings, layout, observe(listing.images()), write=write)
        counts = PlanCounts(
            **counted,
            left_out=listing.left_out,
            outside=listing.outside,
            done_before=listing.done_before,
            done_otherwise=listing.done_otherwise,
        )
    values["inventory_etag"] = listing.inventory_etag
    plan = Plan(**values, counts=counts, parts=parts)
    if write and not storage.create(f"{layout.plan}/plan.json", plan.to_json()):
        first = load(layout)
        assert first is not None
        check_same(first, identity)
        return first
    return plan


def _model_changed_message(listing: Listing) -> str:
    """Return the error for images that were already processed with other settings."""
    everything = "" if listing.done_before else ", so every image would be new"
    return (
        f"{listing.done_otherwise} of these images were processed with another model or other "
        f"settings{everything}: --on-model-change reprocess segments them again; "
        "--on-model-change new-only skips them"
    )


def _write_parts(
    settings: BulkSettings, layout: RunLayout, images: Iterator[ImageRef], *, write: bool
) -> tuple[dict[str, int], list[PlanPart]]:
    counts = dict.fromkeys(("images", "bytes", "shards", "labels"), 0)
    parts: list[PlanPart] = []
    for first, shards in _parts(cut(images, settings)):
        flat = [image for shard in shards for image in shard]
        counts["images"] += len(flat)
        counts["bytes"] += sum(image.bytes for image in flat)
        counts["labels"] += sum(image.label_uri is not None for image in flat)
        counts["shards"] += len(shards)
        data = _part_bytes(first, shards)
        name = f"part-{len(parts):05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        parts.append(PlanPart(name=name, first_shard=first, shards=len(shards)))
        if write:
            storage.create(f"{layout.plan}/{name}", data)
    return counts, parts


def cut(images: Iterator[ImageRef], settings: BulkSettings) -> Iterator[list[ImageRef]]:
    """Yield shards of at most `shard_images` images and `shard_bytes` bytes (labels included)."""
    shard: list[ImageRef] = []
    held = 0
    for image in images:
        size = _fetched_bytes(image, settings.inference.max_object_bytes)
        full = len(shard) == settings.shard_images or held + size > settings.shard_bytes
        if shard and full:
            yield shard
            shard, held = [], 0
        shard.append(image)
        held += size
    if shard:
        yield shard


def _fetched_bytes(image: ImageRef, max_object_bytes: int) -> int:
    """Return the bytes that are fetched for an image and its label.

    An object over the limit is never fetched; without the image, its label is not either.
    """
    if image.bytes > max_object_bytes:
        return 0
    label_bytes = image.label_bytes or 0
    return image.bytes + (label_bytes if label_bytes <= max_object_bytes else 0)


def _parts(shards: Iterator[list[ImageRef]]) -> Iterator[tuple[int, list[list[ImageRef]]]]:
    """Group shards into parts; yield the number of the first shard, and the shards."""
    part: list[list[ImageRef]] = []
    first = images = 0
    for shard in shards:
        if len(part) == MAX_PART_SHARDS or images + len(shard) > MAX_PART_IMAGES:
            yield first, part
            first, part, images = first + len(part), [], 0
        part.append(shard)
        images += len(shard)
    if part:
        yield first, part


def _part_bytes(first: int, shards: list[list[ImageRef]]) -> bytes:
    # by columns: half a million dictionaries would take half a gigabyte
    columns = zip(*itertools.chain.from_iterable(shards), strict=True)
    arrays = [pa.array(each, field.type) for each, field in zip(columns, _IMAGE, strict=True)]
    starts = pa.array(itertools.accumulate(map(len, shards), initial=0), pa.int32())
    images = pa.ListArray.from_arrays(
        starts, pa.StructArray.from_arrays(arrays, fields=list(_IMAGE))
    )
    numbers = pa.array(range(first, first + len(shards)), pa.int32())
    buffer = io.BytesIO()
    table = pa.Table.from_arrays([numbers, images], schema=SHARDS)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_part(layout: RunLayout, part: PlanPart) -> pa.Table:
    """Return the shards of a part, one row each. Raises RunStoppedError, StorageError."""
    uri = f"{layout.plan}/{part.name}"
    return read_artifact(uri, lambda data: pq.read_table(io.BytesIO(data)), hint=_START_OVER)
