"""Progress of a run: images done, rate, time left, and how long the network waited for images."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from pipeline.bulk.worker.summary import ShardSummary

_WINDOW_S = 60.0


class Progress:
    """Counts of one driver's work on a run; shards that were done before count as done.

    `images_in_work()` returns how many images are done in unfinished shards.
    """

    def __init__(
        self, *, images: int, images_before: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.images = images
        self.images_before = images_before
        self.images_now = 0  # by this driver, as the next four
        self.errors: Counter[str] = Counter()  # images by kind
        self.bytes_read = 0
        self.wait_seconds = 0.0  # over all networks: waiting for images
        self.infer_seconds = 0.0
        self.images_in_work: Callable[[], int] = lambda: 0
        self._in_work = 0
        self._actors: dict[str, float] = {}  # lifetimes in seconds
        self._lock = threading.Lock()
        self._clock = clock
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque([(self._started, 0)])

    def add(self, summary: ShardSummary) -> None:
        """Count a finished shard."""
        self.images_now += summary.images
        self.errors.update(summary.errors)
        self.bytes_read += summary.bytes_read
        self.wait_seconds += summary.wait_s
        self.infer_seconds += summary.infer_s
        lifetime = self._actors.get(summary.actor, 0.0)
        self._actors[summary.actor] = max(lifetime, summary.actor_s)
        self.refresh()

    def refresh(self) -> None:
        """Update the images in work; a display's thread may call this too."""
        in_work = self.images_in_work()
        with self._lock:
            self._in_work = in_work
            self._record(self._clock(), self.images_now + in_work)

    def _record(self, now: float, images: int) -> None:
        if not images:  # no rate while actors start
            self._recent[0] = (now, 0)
            return
        self._recent.append((now, images))
        # the oldest point stays until the next one leaves the window: slow shards give a rate too
        while len(self._recent) > 2 and now - self._recent[1][0] >= _WINDOW_S:
            self._recent.popleft()

    @property
    def actor_seconds(self) -> float:
        """Sum over actors of the time from their start to the end of their last shard."""
        return sum(self._actors.values())

    @property
    def wait_fraction(self) -> float | None:
        """Share of the networks' time in which they waited for images: 0 if never starved.

        None before the first shard is done.
        """
        total = self.wait_seconds + self.infer_seconds
        return self.wait_seconds / total if total else None

    @property
    def images_done(self) -> int:
        """Images done, at most all: what was done before is known by the shard only."""
        return min(self.images, self.images_before + self.images_now + self._in_work)

    @property
    def seconds(self) -> float:
        """Seconds since the start of this driver."""
        return self._clock() - self._started

    @property
    def images_per_second(self) -> float:
        """Rate over the last minute, or since the start."""
        (since, before), (until, now) = self._recent[0], self._recent[-1]
        # the count falls when a worker crashes with its shard
        return max(0, now - before) / (until - since) if until > since else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None while the rate is 0."""
        rate = self.images_per_second
        return (self.images - self.images_done) / rate if rate else None
