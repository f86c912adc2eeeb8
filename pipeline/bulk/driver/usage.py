"""What a run has used, over all of its drivers: each keeps a file of its own until the record."""

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
_LOST = "delete it, and the same command ends the run without what one driver had used"


@dataclass(frozen=True, kw_only=True)
class ResourceUsage:
    """Sums over actors, each from its start to the end of its last shard."""

    actor_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_read: int = 0

    def __add__(self, other: ResourceUsage) -> ResourceUsage:
        return ResourceUsage(
            actor_seconds=self.actor_seconds + other.actor_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
            bytes_read=self.bytes_read + other.bytes_read,
        )

    def cost(self, price_per_gpu_hour: float | None) -> float | None:
        """In the price's currency; None without a price."""
        return price_per_gpu_hour and price_per_gpu_hour * self.gpu_seconds / 3600


class UsageLog:
    """One driver's account of a run; a driver that is killed loses a minute of it at most."""

    def __init__(self, layout: RunLayout, progress: Progress, gpus: float) -> None:
        self._layout = layout
        self._progress = progress
        self._gpus = gpus
        self._uri = f"{layout.usage}/{secrets.token_hex(8)}.json"
        self._next = time.monotonic() + SAVE_EVERY_S

    def save_sometimes(self) -> None:
        """Writes the account where it was not for a while."""
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Writes the account, if there is anything in it."""
        self._next = time.monotonic() + SAVE_EVERY_S
        if self._progress.images_now:
            storage.write(self._uri, json.dumps(asdict(self._own())).encode())

    def total(self) -> ResourceUsage:
        """This driver's and all earlier ones'. Raises RunStoppedError, StorageError."""
        total = self._own()
        for item in storage.list_objects(self._layout.usage):
            if item.uri != self._uri:
                total += read_artifact(item.uri, _used, hint=_LOST)
        return total

    def _own(self) -> ResourceUsage:
        seconds = self._progress.actor_seconds
        return ResourceUsage(
            actor_seconds=seconds,
            gpu_seconds=seconds * self._gpus,
            bytes_read=self._progress.bytes_read,
        )


def _used(data: bytes) -> ResourceUsage:
    return ResourceUsage(**json.loads(data))


def delete(layout: RunLayout) -> None:
    """Deletes all accounts: the record has their sum."""
    found = [item.uri for item in storage.list_objects(layout.usage)]
    storage.delete(found, within=layout.results)
