"""Progress of the shards in work: an actor that workers report to and the driver polls."""

from __future__ import annotations

from typing import Any

import ray


class ProgressActor:
    """An actor that knows how many images of each unfinished shard are done."""

    def __init__(self) -> None:
        self._images: dict[int, int] = {}
        self._reports = 0

    def report(self, shard: int, images: int) -> None:
        """Store how many images of the shard are done."""
        self._images[shard] = images
        self._reports += 1

    def remove(self, shard: int) -> None:
        """Forget a shard, which is finished."""
        self._images.pop(shard, None)

    def reports(self) -> int:
        """Return the number of reports so far: it grows whenever a shard starts or progresses."""
        return self._reports

    def shards(self) -> list[int]:
        """Return the numbers of the shards in work."""
        return sorted(self._images)

    def images(self) -> int:
        """Return the number of images that are done in shards in work."""
        return sum(self._images.values())


def start_progress_actor() -> Any:
    """Start a `ProgressActor` and return its handle.

    If its node is lost, Ray restarts it elsewhere, empty.
    """
    return ray.remote(ProgressActor).options(num_cpus=0, max_restarts=-1).remote()
