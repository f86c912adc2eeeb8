"""Matching labels to images by name, independent of where the files are stored.

An image and its label have the same relative path except for the extension. If a path could refer
to two files, that is an error, never a guess.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Pair:
    """The URIs of an image and of its label."""

    image: str
    label: str


def stem(key: str) -> str:
    """Return `key` without its extension: "a/b.c.jpg" -> "a/b.c"; a leading dot starts none."""
    return posixpath.splitext(key)[0]


def index_by_stem(entries: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Return {stem: value} from (relative key, value); `entries` may be a streamed listing.

    Raises ValueError if two keys share a stem.
    """
    found: dict[str, Value] = {}
    for key, value in entries:
        name = stem(key)
        if name in found:
            raise ValueError(
                f"{found[name]!r} and {value!r} have the same path without extension, {name!r}; "
                "keep one of them"
            )
        found[name] = value
    return found


def parse_voc_split(text: str) -> list[str]:
    """Return the image names in the text of ImageSets/Segmentation/SPLIT.txt, in order.

    Raises ValueError if the text has no names, a duplicate, or a line with more than one word.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) > 1:
            raise ValueError(f"line {number} of the split is {line!r:.80}; it must be one name")
        if words[0] in seen:
            raise ValueError(f"{words[0]!r} is on lines {seen[words[0]]} and {number} of the split")
        seen[words[0]] = number
    if not seen:
        raise ValueError("the split names no images; give ImageSets/Segmentation/SPLIT.txt")
    return list(seen)
