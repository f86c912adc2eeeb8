"""How far a run is, how fast it goes, and how long it will take."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from pipeline.bulk.worker.summary import ShardSummary

_WINDOW_S = 60.0


class Progress:
    """Counts of one driver's work on a run; shards that were done before count as done."""

    def __init__(
        self, *, images: int, images_before: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.images = images
        self.images_before = images_before
        self.images_now = 0
        self.errors: Counter[str] = Counter()  # images of this driver, by kind
        self.bytes_read = 0
        self._actors: dict[str, float] = {}
        self.in_work: Callable[[], int] = lambda: 0  # images of shards that are not done yet
        self._images_in_work = 0
        self._lock = threading.Lock()
        self._clock = clock
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._started, 0)])

    def add(self, summary: ShardSummary) -> None:
        """Counts a shard that is done."""
        self.images_now += summary.images
        self.errors.update(summary.errors)
        self.bytes_read += summary.bytes_read
        lived = self._actors.get(summary.actor, 0.0)
        self._actors[summary.actor] = max(lived, summary.actor_s)
        self.look()

    def look(self) -> None:
        """Looks how far the shards in work are; a display's thread may call it too."""
        in_work = self.in_work()
        with self._lock:
            self._images_in_work = in_work
            self._note(self._clock(), self.images_now + in_work)

    def _note(self, now: float, through: int) -> None:
        if not through:  # what starts up has no rate yet
            self._recent[0] = (now, 0)
            return
        self._recent.append((now, through))
        # the oldest point stays until the next one is a window old: slow shards give a rate too
        while len(self._recent) > 2 and now - self._recent[1][0] >= _WINDOW_S:
            self._recent.popleft()

    @property
    def actor_seconds(self) -> float:
        """Over all actors, each from its start to the end of its last shard."""
        return sum(self._actors.values())

    @property
    def images_done(self) -> int:
        """At most all: what was done before is known by the shard, not by the image."""
        return min(self.images, self.images_before + self.images_now + self._images_in_work)

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def images_per_second(self) -> float:
        """Over the last minute, or since the start."""
        (since, before), (until, now) = self._recent[0], self._recent[-1]
        # fewer than before: a shard's process died
        return max(0, now - before) / (until - since) if until > since else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None until a shard is done."""
        rate = self.images_per_second
        return (self.images - self.images_done) / rate if rate else None
