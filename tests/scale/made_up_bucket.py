"""A made-up bucket of any number of images; image i is a function of i.

The stub server lists it, and the tests derive from it what a plan must hold. The prefix `<n>/` has
exactly n objects, whose names sort in the order of their numbers. Names and ETags are as long, and
compress as badly, as real ones.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

IMAGES, LABELS = "images", "labels"
"""The buckets of images and of their labels, n of each below `<n>/`."""


class MadeUp(NamedTuple):
    """An object as a listing shows it; `size` in bytes, `etag` without its quotes."""

    key: str
    etag: str
    size: int


def made_up(bucket: str, count: int, number: int) -> MadeUp:
    """Return object `number` (from 0) of the `<count>/` prefix."""
    ending = "jpg" if bucket == IMAGES else "png"
    key = f"{count}/camera-{number // 10_000:06d}/2026-11/IMG_{number:010d}.{ending}"
    etag = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
    return MadeUp(key, etag, 100_000 + number * 7919 % 800_000)
