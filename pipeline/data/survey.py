"""One look at every label of a split: are they right, and how often is each class there.

Enters: an opened split. Leaves: a `Survey`: counts, from which class weights and repeats are
derived, and digests of what was read. It can be kept as JSON, so that a run that goes on need not
look again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data import images
from pipeline.data.datasets import Split
from pipeline.data.images import ImageError
from pipeline.data.labels import Classes
from pipeline.data.pairs import Pair
from pipeline.data.prefetch import prefetch
from pipeline.data.samples import Read, broken_image_error, decode_label, fetch

_FETCHERS = 8
_AHEAD = 64  # photos whose bytes may wait
_MAX_PIXELS = 100_000_000  # as for `images.decode`

# in a PNG that has none of these no orientation can be; else its pixels would have to be read
_PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a split's labels hold. n photos, in the split's order; k classes.

    `pixels` (k,) int64: pixels of each class. `image_pixels` (k,) int64: labelled pixels of the
    photos that hold it. `ignored`: pixels without a label. `holds` (n, k) bool: which classes a
    photo has. `fingerprint` is the split's.
    `images_sha256` and `labels_sha256` are of all files' bytes, in order, wherever they lie: a copy
    of the split has the same. An older survey has none.
    """

    fingerprint: str
    pixels: npt.NDArray[np.int64]
    image_pixels: npt.NDArray[np.int64]
    ignored: int
    holds: npt.NDArray[np.bool_]
    images_sha256: str = ""
    labels_sha256: str = ""

    def to_json(self) -> str:
        """This survey as one line of JSON: for VOC's 10,582 photos about 90 KB."""
        values = {
            "fingerprint": self.fingerprint,
            "pixels": self.pixels.tolist(),
            "photo_pixels": self.image_pixels.tolist(),
            "ignored": self.ignored,
            "holds": [np.flatnonzero(row).tolist() for row in self.holds],
            "photos_sha256": self.images_sha256,
            "labels_sha256": self.labels_sha256,
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Survey:
        """The survey that `to_json` wrote; whether it is of the same split, `fingerprint` tells."""
        values = json.loads(text)
        holds = np.zeros((len(values["holds"]), len(values["pixels"])), dtype=np.bool_)
        for row, ids in zip(holds, values["holds"], strict=True):
            row[ids] = True
        return cls(
            fingerprint=values["fingerprint"],
            pixels=np.array(values["pixels"], dtype=np.int64),
            image_pixels=np.array(values["photo_pixels"], dtype=np.int64),
            ignored=values["ignored"],
            holds=holds,
            images_sha256=values.get("photos_sha256", ""),
            labels_sha256=values.get("labels_sha256", ""),
        )


def survey_split(
    split: Split, read: Read, *, progress: Callable[[int], None] | None = None
) -> Survey:
    """The counts of all labels of `split`, each checked, and its size against its photo's header.

    `progress` is called with the number of photos done. Photos' pixels are not decoded, where
    JPEG or PNG. Raises SampleError at the first file that is not as it must be.
    """
    num_classes, ignore_index = split.classes.num_classes, split.classes.ignore_index
    holds = np.zeros((len(split), num_classes), dtype=np.bool_)
    pixels, image_pixels = np.zeros((2, num_classes), dtype=np.int64)
    ignored = 0
    images_read, labels_read = hashlib.sha256(), hashlib.sha256()

    def fetch_pair(pair: Pair) -> tuple[bytes, bytes]:
        return fetch(pair.image, read), fetch(pair.label, read)

    fetched = prefetch(split.pairs, fetch_pair, threads=_FETCHERS, ahead=_AHEAD)
    for number, (image, label) in enumerate(fetched):
        pair = split.pairs[number]
        images_read.update(hashlib.sha256(image).digest())
        labels_read.update(hashlib.sha256(label).digest())
        size = _shown_size(pair.image, image)
        ids = decode_label(pair.label, label, split, size)
        counts = np.array(Image.fromarray(ids).histogram())  # a fifth of the time of bincount
        of_classes = counts[:num_classes]
        holds[number] = of_classes > 0
        pixels += of_classes
        image_pixels[holds[number]] += of_classes.sum()
        ignored += int(counts[ignore_index])
        if progress is not None:
            progress(number + 1)
    return Survey(
        fingerprint=split.fingerprint,
        pixels=pixels,
        image_pixels=image_pixels,
        ignored=ignored,
        holds=holds,
        images_sha256=images_read.hexdigest(),
        labels_sha256=labels_read.hexdigest(),
    )


def median_frequency_weights(survey: Survey) -> npt.NDArray[np.float64]:
    """(k,) the weight of each class: the median frequency over its own; rare classes weigh more.

    A class's frequency is its pixels over the labelled pixels of the photos that hold it. An absent
    class weighs 1: it has no pixel whose loss could be weighed, and the median is of the others.
    Source: arXiv 1511.00561 (SegNet), Sec. 4; arXiv 1411.4734, Sec. 6.3.1.
    """
    present = survey.pixels > 0
    weights = np.ones(len(survey.pixels))
    if present.any():
        frequency = survey.pixels[present] / survey.image_pixels[present]
        weights[present] = np.median(frequency) / frequency
    return weights


def repeat_positions(
    survey: Survey, classes: Classes, repeat_classes: Sequence[str], repeats: int
) -> list[int]:
    """Positions in the split: each once, then those that hold a class to be repeated, again.

    Those are in the list `repeats` times in all. Raises ValueError where a class is unknown or
    `repeats` is under 1. Source: arXiv 1706.05587, Sec. 4.1.1 (bootstrapping on hard images).
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1: 1 repeats nothing")
    check_repeat_classes(classes, repeat_classes)
    ids = [classes.names.index(name) for name in repeat_classes]
    hard = np.flatnonzero(survey.holds[:, ids].any(axis=1)).tolist()
    return [*range(len(survey.holds)), *(hard * (repeats - 1))]


def check_repeat_classes(classes: Classes, repeat_classes: Sequence[str]) -> None:
    """Raises ValueError where one of the classes to be repeated is unknown."""
    for name in repeat_classes:
        if name not in classes.names:
            raise ValueError(
                f"repeat_classes has {name!r}, which is no class; give some of "
                f"{', '.join(classes.names)}, or none to repeat nothing"
            )


def _shown_size(uri: str, data: bytes) -> tuple[int, int]:
    """(h, w) of the photo as `images.decode` shows it. Raises SampleError where it is none."""
    try:
        with images.guard(_MAX_PIXELS):
            image = images.open_image(data)
            if image.format == "JPEG" or (
                image.format == "PNG" and not any(mark in data for mark in _PNG_METADATA)
            ):
                turned = image.format == "JPEG" and images.orientation(image) >= 5
                return (image.width, image.height) if turned else (image.height, image.width)
        height, width, _ = images.decode(data, max_pixels=_MAX_PIXELS).shape
    except ImageError as error:
        raise broken_image_error(uri, error) from error
    return height, width
