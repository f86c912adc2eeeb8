"""A bucket of any number of images that never were: the i-th is a function of i.

The stub server lists from it, and the tests know from it what a plan must hold. Below the prefix
`<n>/` lie exactly n objects, in the order of their names, which is that of their numbers. Names
and ETags are as long, and compress as badly, as real ones.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

PHOTOS, LABELS = "images", "labels"
"""The buckets: n images below `<n>/`, and a label for each of them."""


class MadeUp(NamedTuple):
    """An object as a listing shows it; `size` in bytes, `etag` without its quotes."""

    key: str
    etag: str
    size: int


def made_up(bucket: str, count: int, number: int) -> MadeUp:
    """The object `number`, from 0, of those below `<count>/`."""
    ending = "jpg" if bucket == PHOTOS else "png"
    key = f"{count}/camera-{number // 10_000:06d}/2026-11/IMG_{number:010d}.{ending}"
    etag = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
    return MadeUp(key, etag, 100_000 + number * 7919 % 800_000)
