"""User-facing settings of a bulk run, validated."""

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
"""`IMAGE_PATTERNS` of earlier versions: an unfinished run keeps those of its plan."""

ADDED_LATER: Mapping[str, Any] = MappingProxyType({})
"""Fields added to `Inference` later, with the default that each was introduced with.

A field is not hashed at that value, so that adding it changes no stored fingerprint. An entry never
changes, even if the default does."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """The settings that determine a mask, given image and checkpoint; hashed as the fingerprint."""

    scales: tuple[float, ...] = (1.0,)
    """Scales whose probabilities are averaged; the paper's are 0.5 0.75 1.0 1.25 1.5 1.75."""
    flip: bool = False
    """Also average over the horizontally flipped image."""
    output_stride: int | None = None
    """4, 8, 16 or 32 (a cascade's up to 256); the checkpoint's own by default."""
    window: int = 1025
    """Side of the sliding window for large images, in pixels."""
    window_overlap: int = 257
    """Overlap of adjacent windows, in pixels."""
    window_above: int = 4_000_000
    """Images with more pixels than this are segmented by sliding window."""
    max_pixels: int = 100_000_000
    """An image with more pixels becomes an error row without being decoded."""
    max_object_bytes: int = 256 * 2**20
    """A larger object becomes an error row without being fetched."""

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
        """Return the values that plans and fingerprints are made of."""
        values: dict[str, object] = {**asdict(self), "scales": list(self.scales)}
        return {
            name: value
            for name, value in values.items()
            if name not in ADDED_LATER or value != ADDED_LATER[name]
        }

    def fingerprint(self) -> str:
        """Return the fingerprint that is stored with every mask."""
        return fingerprint(self.identity())


@dataclass(frozen=True, kw_only=True)
class BulkSettings:
    """Segment all images below a URI with DeepLabv3; write masks and per-class IoU as Parquet."""

    images: str
    """Location of the images: s3://bucket/prefix or a folder."""
    results: str
    """Location for the result tables: s3://bucket/prefix or a folder."""
    checkpoint: str
    """The model: a .safetensors of this project, a .pth in torchvision's or VainF's layout, the
    TensorFlow zoo's .npz, or a public file by name, such as zoo:deeplabv3_resnet50_coco."""
    labels: str | None = None
    """Location of ground truth, matched by relative path without extension; adds IoU."""
    inventory: str | None = None
    """A Parquet or CSV file with uri, etag and size of the images, or the manifest.json of an S3
    Inventory, used instead of a listing; objects that are not below --images are left out."""
    include: tuple[str, ...] = IMAGE_PATTERNS
    """Patterns of relative paths to include, case-insensitive; '*' matches everything."""
    run_id: str | None = None
    """Name of the run. By default it follows from the arguments and the date."""
    only_new: bool = False
    """Skip images that earlier runs have done with the same model and settings."""
    on_model_change: Literal["reprocess", "new-only"] | None = None
    """With --only-new, what to do with images done only with another model or other settings:
    reprocess them, or skip them (new-only). By default, a run that finds any is refused."""
    limit: int | None = None
    """Process at most this many images."""
    shard_images: int = 64
    """Images per shard: a shard is one results file and the unit of retries."""
    shard_bytes: int = 64 * 2**20
    """Maximum bytes of images and labels per shard."""
    actors: tuple[int, int] = (1, 1)
    """Number of processes that segment at once: MIN and MAX."""
    gpus_per_actor: float = 0.0
    """GPUs per actor; 0 runs on the CPU."""
    cpus_per_actor: int | None = None
    """CPUs, decoder processes and torch threads per actor; by default actors split this machine's
    CPUs evenly, and have 2 each on a cluster."""
    batch_images: int | None = None
    """Images of one size per network batch; by default 8 on a GPU, 1 on a CPU."""
    start_timeout: int = 3600
    """Maximum seconds to wait for the first process to start, for example while a cluster grows."""
    stall_timeout: int = 1800
    """Abort the run if no image is finished for this many seconds while processes run."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU per hour, for the estimate of a dry run and the run record."""
    max_error_fraction: float = 0.05
    """Abort the run if more than this fraction of its images fail; 10 errors never abort it."""
    dry_run: bool = False
    """Print what the run would do and an estimate of its time and cost; write nothing."""
    calibration_images: int = 24
    """Images that a dry run segments on this machine to estimate time and size; 0 for none."""
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
                f"--on-model-change {self.on_model_change} has no effect without --only-new; add it"
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
        """The pattern of the relative paths that `include` matches."""
        return re.compile("|".join(map(fnmatch.translate, self.include)), re.IGNORECASE)

    def work_fingerprint(self, *, model: str) -> str:
        """Return a fingerprint shared by runs that would make the same masks of the same images."""
        names = ("images", "labels")
        same = {name: getattr(self, name) for name in names}
        return fingerprint({**same, "model": model, **self.inference.identity()})

    def identity(self, *, model: str) -> dict[str, object]:
        """Return what identifies a run: other values under the same run id are refused."""
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
    """Return `identity` as earlier versions had it, with their defaults for --include."""
    if identity["include"] != sorted(IMAGE_PATTERNS):
        return []
    return [{**identity, "include": sorted(patterns)} for patterns in FORMER_IMAGE_PATTERNS]


def fingerprint(values: dict[str, object]) -> str:
    """Return 16 hexadecimal digits of a hash of the values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_positive(settings: Inference | BulkSettings, *names: str) -> None:
    known = {each.name for each in fields(settings)}
    for name in names:
        assert name in known
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
