"""What a person says about a bulk run, checked before anything starts."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from pipeline.data import storage
from pipeline.results.layout import check_run_id

IMAGE_PATTERNS = tuple(
    f"*.{ending}" for ending in ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
)


FORMER_IMAGE_PATTERNS: tuple[tuple[str, ...], ...] = ()
"""What `IMAGE_PATTERNS` was in earlier versions: an unfinished run keeps that of its plan."""

ADDED_LATER: Mapping[str, Any] = MappingProxyType({})
"""Fields added to `Inference` since its fingerprints are stored -> the default each was added with.
At that value a field is not hashed, so that adding it changes no fingerprint. An entry never
changes, even where the default does."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What decides a mask, given the photo and the checkpoint: together, the fingerprint."""

    scales: tuple[float, ...] = (1.0,)
    """Scales whose probabilities are averaged; the paper's are 0.5 0.75 1.0 1.25 1.5 1.75."""
    flip: bool = False
    """Average over the mirrored photo too."""
    output_stride: int | None = None
    """4, 8, 16 or 32 (a cascade's up to 256); the checkpoint's own by default."""
    window: int = 1025
    """Side of the sliding window for large photos, px."""
    window_overlap: int = 257
    """Pixels that neighbouring windows share."""
    window_above: int = 4_000_000
    """Photos of more pixels than this are segmented through the window."""
    max_pixels: int = 100_000_000
    """A photo of more pixels is an error row, refused before it is decoded."""
    max_object_bytes: int = 256 * 2**20
    """A larger object is an error row, and never fetched."""

    def __post_init__(self) -> None:
        if not self.scales or any(not 0 < scale <= 8 for scale in self.scales):
            raise ValueError(
                f"--scales {' '.join(map(str, self.scales))}: each must be over 0 and at most 8"
            )
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        if self.output_stride not in (None, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"--output-stride {self.output_stride}: take 4, 8, 16 or 32")
        if not 0 <= self.window_overlap < self.window:
            raise ValueError(
                f"--window-overlap {self.window_overlap} must be at least 0 "
                f"and under the --window of {self.window}"
            )
        _check_positive(self, "window", "window_above", "max_pixels", "max_object_bytes")

    def identity(self) -> dict[str, object]:
        """The values by which plans and fingerprints know these settings."""
        values: dict[str, object] = {**asdict(self), "scales": list(self.scales)}
        return {
            name: value
            for name, value in values.items()
            if name not in ADDED_LATER or value != ADDED_LATER[name]
        }

    def fingerprint(self) -> str:
        """What masks made with these settings are known by."""
        return fingerprint(self.identity())


@dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """Segment every photo below a URI with DeepLabv3; masks and per-class IoU become Parquet."""

    images: str
    """Where the photos are: s3://bucket/prefix or a folder."""
    results: str
    """Where the tables go: s3://bucket/prefix or a folder."""
    checkpoint: str
    """The model: our .safetensors, a .pth in torchvision's or VainF's layout, the TensorFlow zoo's
    .npz, or a public file by name, such as zoo:deeplabv3_resnet50_coco."""
    labels: str | None = None
    """Ground truth below this URI, matched by relative path without extension; gives IoU."""
    inventory: str | None = None
    """A Parquet or CSV file of the photos' uri, etag and size, or the manifest.json of an S3
    Inventory, instead of a listing; what does not lie below --images is left out."""
    include: tuple[str, ...] = IMAGE_PATTERNS
    """Patterns of the photos' relative paths, upper and lower case alike; '*' takes everything."""
    run_id: str | None = None
    """Name of the run. By default it follows from the arguments and the date."""
    only_new: bool = False
    """Leave out what earlier runs have done with the same model and settings."""
    on_model_change: Literal["reprocess", "new-only"] | None = None
    """With --only-new, photos that only another model or other settings have done: reprocess them,
    or leave them out (new-only). By default a run that meets any is refused."""
    limit: int | None = None
    """Segment only the first so many photos."""
    shard_images: int = 64
    """Photos a shard, which is one file of results and the unit that is done again."""
    shard_bytes: int = 64 * 2**20
    """Bytes of photos and their labels a shard, at most."""
    actors: tuple[int, int] = (1, 1)
    """How many processes segment at once: MIN and MAX."""
    gpus_per_actor: float = 0.0
    """GPUs for each; 0 runs on the CPU."""
    cpus_per_actor: int | None = None
    """CPUs, decoder processes and torch threads for each; by default they share this machine, and
    have 2 each on a cluster."""
    batch_images: int | None = None
    """Photos of one size that go through the network together; 8 on a GPU, 1 on a CPU."""
    start_timeout: int = 3600
    """Seconds to wait, at most, for a cluster that has no process of this run: one that grows."""
    stall_timeout: int = 1800
    """The run stops when processes run and no photo got through for so many seconds."""
    price_per_gpu_hour: float | None = None
    """What a GPU costs an hour, for the estimate of a dry run and the run's record."""
    max_error_fraction: float = 0.05
    """The run stops when more than this part of its photos are errors; 10 errors never stop it."""
    dry_run: bool = False
    """Say what would be done and about what it takes, and do nothing."""
    calibration_images: int = 24
    """Photos that a dry run segments on this machine to estimate time and size; 0 for none."""
    inference: Inference = field(default_factory=Inference)

    def __post_init__(self) -> None:
        for name in ("images", "results", "checkpoint", "labels", "inventory"):
            given = getattr(self, name)
            if given is not None and not given.startswith("zoo:"):
                object.__setattr__(self, name, storage.normalize(given))
        if self.run_id is not None:
            check_run_id(self.run_id)
        if not self.include:
            raise ValueError("--include needs at least one pattern; '*' takes everything")
        if self.on_model_change is not None and not self.only_new:
            raise ValueError(
                f"--on-model-change {self.on_model_change} means nothing without --only-new"
            )
        if not 1 <= self.actors[0] <= self.actors[1]:
            raise ValueError(f"--actors {self.actors[0]} {self.actors[1]}: take 1 <= MIN <= MAX")
        if not 0 <= self.max_error_fraction <= 1:
            raise ValueError(f"--max-error-fraction {self.max_error_fraction} is not in 0 to 1")
        gpus = self.gpus_per_actor
        if not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"--gpus-per-actor {gpus}: must be 0 to 1, or a whole number")
        price = self.price_per_gpu_hour
        if price is not None and not (gpus and 0 < price < float("inf")):
            raise ValueError(
                f"--price-per-gpu-hour {price:g}: must be over 0, with --gpus-per-actor over 0"
            )
        if self.calibration_images < 0:
            raise ValueError(f"--calibration-images {self.calibration_images}: must be at least 0")
        _check_positive(
            self,
            *("limit", "shard_images", "shard_bytes", "cpus_per_actor", "batch_images"),
            *("start_timeout", "stall_timeout"),
        )

    @property
    def included(self) -> re.Pattern[str]:
        """Matches the relative paths that `include` takes."""
        return re.compile("|".join(map(fnmatch.translate, self.include)), re.IGNORECASE)

    def work(self, *, model: str) -> str:
        """A fingerprint that runs share which could segment the same photos into the same masks."""
        names = ("images", "labels")
        same = {name: getattr(self, name) for name in names}
        return fingerprint({**same, "model": model, **self.inference.identity()})

    def identity(self, *, model: str) -> dict[str, object]:
        """What makes a run this run: other values under the same run id are refused."""
        return {
            "images": self.images,
            "labels": self.labels,
            **({"inventory": self.inventory} if self.inventory else {}),
            "include": sorted(self.include),
            "only_new": self.only_new,
            **({"model_changed": self.on_model_change} if self.on_model_change else {}),
            "limit": self.limit,
            "shard_images": self.shard_images,
            "shard_bytes": self.shard_bytes,
            "model": model,
            **self.inference.identity(),
        }


def former_identities(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """What `identity` was in earlier versions, whose --include had other defaults."""
    if identity["include"] != sorted(IMAGE_PATTERNS):
        return []
    return [{**identity, "include": sorted(patterns)} for patterns in FORMER_IMAGE_PATTERNS]


def fingerprint(values: dict[str, object]) -> str:
    """16 hexadecimal digits that differ where the values do."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_positive(settings: Inference | BulkSettings, *names: str) -> None:
    known = {each.name for each in fields(settings)}
    for name in names:
        assert name in known
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
