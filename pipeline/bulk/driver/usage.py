"""Resources used by a run, over all of its drivers: each keeps a file until the record exists."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass

from pipeline.bulk.driver.progress import Progress
from pipeline.data import storage
from pipeline.results.layout import RunLayout
from pipeline.runs.artifacts import read_artifact

SAVE_EVERY_S = 60.0
_HINT = (
    "delete it, and run the same command again; the record will lack what one driver of the run "
    "used"
)


@dataclass(frozen=True, kw_only=True)
class ResourceUsage:
    """Sums over actors, each counted from its start to the end of its last shard.

    The fields are keys of the stored files and columns of the run's record.
    """

    actor_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_read: int = 0
    wait_seconds: float = 0.0  # the network waited for images
    infer_seconds: float = 0.0

    def __add__(self, other: ResourceUsage) -> ResourceUsage:
        return ResourceUsage(
            actor_seconds=self.actor_seconds + other.actor_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
            bytes_read=self.bytes_read + other.bytes_read,
            wait_seconds=self.wait_seconds + other.wait_seconds,
            infer_seconds=self.infer_seconds + other.infer_seconds,
        )

    def cost(self, price_per_gpu_hour: float | None) -> float | None:
        """Return the cost in the price's currency, or None without a price."""
        return price_per_gpu_hour and price_per_gpu_hour * self.gpu_seconds / 3600


class UsageLog:
    """One driver's resource usage; a driver that is killed loses at most a minute of it."""

    def __init__(self, layout: RunLayout, progress: Progress, gpus: float) -> None:
        self._layout = layout
        self._progress = progress
        self._gpus = gpus
        self._uri = f"{layout.usage}/{secrets.token_hex(8)}.json"
        self._next = time.monotonic() + SAVE_EVERY_S

    def save_if_due(self) -> None:
        """Save if the last save is `SAVE_EVERY_S` old."""
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Write this driver's usage, unless it has done nothing."""
        self._next = time.monotonic() + SAVE_EVERY_S
        if self._progress.images_now:
            storage.write(self._uri, json.dumps(asdict(self._own())).encode())

    def total(self) -> ResourceUsage:
        """Return the usage of this driver and all earlier ones.

        Raises RunStoppedError or StorageError if a file cannot be read.
        """
        total = self._own()
        for item in storage.list_objects(self._layout.usage):
            if item.uri != self._uri:
                total += read_artifact(item.uri, _parse, hint=_HINT)
        return total

    def _own(self) -> ResourceUsage:
        seconds = self._progress.actor_seconds
        return ResourceUsage(
            actor_seconds=seconds,
            gpu_seconds=seconds * self._gpus,
            bytes_read=self._progress.bytes_read,
            wait_seconds=self._progress.wait_seconds,
            infer_seconds=self._progress.infer_seconds,
        )


def _parse(data: bytes) -> ResourceUsage:
    return ResourceUsage(**json.loads(data))


def delete(layout: RunLayout) -> None:
    """Delete the usage files of all drivers; the record has their sum."""
    found = [item.uri for item in storage.list_objects(layout.usage)]
    storage.delete(found, within=layout.results)
