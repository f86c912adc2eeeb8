"""Which label belongs to which image: from lists of names, so that any storage can feed it.

An image and its label have the same path below their folders, up to the extension. Names are
relative keys with '/'; roots are URIs. A name that could mean two labels is an error, never a
guess.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.data.storage import join

Value = TypeVar("Value")


@dataclass(frozen=True)
class Pair:
    """The URI of an image and of its label; `label` is None where there is none."""

    image: str
    label: str | None


@dataclass(frozen=True)
class Labelled(Pair):
    """A pair that can be trained on: it has a label."""

    label: str


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What `match` found: a pair for each image, in order, and the labels that no image has."""

    pairs: tuple[Pair, ...]
    unused: tuple[str, ...]

    @property
    def labelled(self) -> tuple[Pair, ...]:
        """What can be trained on."""
        return tuple(pair for pair in self.pairs if pair.label is not None)

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The images without a label."""
        return tuple(pair.image for pair in self.pairs if pair.label is None)


def stem(key: str) -> str:
    """`key` without its extension: "a/b.c.jpg" gives "a/b.c"; a leading dot begins no extension."""
    return posixpath.splitext(key)[0]


def index(labels: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """stem -> value, from (relative key, value). Raises ValueError where two keys share a stem.

    `labels` may be a listing that streams by: only stems and values are kept.
    """
    found: dict[str, Value] = {}
    for key, value in labels:
        name = stem(key)
        if name in found:
            raise ValueError(
                f"{found[name]!r} and {value!r} have the same path without extension, {name!r}; "
                "keep one of them"
            )
        found[name] = value
    return found


def match(
    images: Iterable[str], labels: Iterable[str], *, image_root: str, label_root: str
) -> Matches:
    """The images below `image_root`, each with its label below `label_root` or None.

    `images` and `labels` are relative keys. Raises ValueError where two images, or two labels,
    share a stem.
    """
    by_stem = index((key, join(label_root, key)) for key in labels)
    images_by_stem = index((key, join(image_root, key)) for key in images)
    pairs = tuple(Pair(uri, by_stem.get(name)) for name, uri in images_by_stem.items())
    unused = tuple(uri for name, uri in by_stem.items() if name not in images_by_stem)
    return Matches(pairs=pairs, unused=unused)


def voc_names(split_text: str) -> list[str]:
    """The names of a VOC split, in order, from the text of ImageSets/Segmentation/<split>.txt.

    Raises ValueError where it names no image, one twice, or holds more than a name on a line.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(split_text.removeprefix("\ufeff").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) > 1:
            raise ValueError(f"line {number} of the split is {line!r:.80}; it must be one name")
        if words[0] in seen:
            raise ValueError(f"{words[0]!r} is on lines {seen[words[0]]} and {number} of the split")
        seen[words[0]] = number
    if not seen:
        raise ValueError("the split names no image; give ImageSets/Segmentation/<split>.txt")
    return list(seen)


def voc_pairs(split_text: str, root: str, *, labels: str = "SegmentationClass") -> list[Pair]:
    """The pairs of a split in VOC's layout: JPEGImages/<name>.jpg, <labels>/<name>.png below root.

    `split_text` and the errors are those of `voc_names`; whether the files exist is not asked.
    """
    return [
        Pair(join(root, f"JPEGImages/{name}.jpg"), join(root, f"{labels}/{name}.png"))
        for name in voc_names(split_text)
    ]
