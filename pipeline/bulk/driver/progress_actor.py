"""The actor that workers report their progress to, and the driver reads it from."""

from __future__ import annotations

import time
from typing import Any

import ray

_TELL_EVERY_S = 2.0


class ProgressActor:
    """An actor that knows how many photos of each shard are through, for who watches the run."""

    def __init__(self) -> None:
        self._through: dict[int, int] = {}
        self._told = 0

    def tell(self, shard: int, photos: int) -> None:
        self._through[shard] = photos
        self._told += 1

    def forget(self, shard: int) -> None:
        self._through.pop(shard, None)

    def told(self) -> int:
        """A number that changes whenever a shard begins or gets on."""
        return self._told

    def shards(self) -> list[int]:
        """Those that began and are not forgotten."""
        return sorted(self._through)

    def photos(self) -> int:
        """Photos of shards that are not forgotten."""
        return sum(self._through.values())


def start_progress_actor() -> Any:
    """The handle of a board; it is started again where its node goes, and knows nothing then."""
    return ray.remote(ProgressActor).options(num_cpus=0, max_restarts=-1).remote()


class ProgressReporter:
    """Tells the board about one shard, not too often."""

    def __init__(self, board: Any, shard: int) -> None:
        self._board = board
        self._shard = shard
        self._next = time.monotonic() + _TELL_EVERY_S

    def __call__(self, photos: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TELL_EVERY_S
            self._board.tell.remote(self._shard, photos)
