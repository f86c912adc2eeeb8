"""Statistics of a split's labels, from reading and checking every file once.

Class weights and repeats are derived from them. A survey is stored as JSON, so that a resumed run
does not read the split again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.checks import check_at_least
from pipeline.data import images
from pipeline.data.datasets import Split
from pipeline.data.images import ImageError
from pipeline.data.labels import Classes
from pipeline.data.pairs import Pair
from pipeline.data.prefetch import prefetch
from pipeline.data.samples import Read, broken_image_error, decode_label, fetch

_FETCHERS = 8
_AHEAD = 64  # images fetched in advance
_MAX_PIXELS = 100_000_000  # as for `images.decode`

# a PNG without any of these has no orientation tag; otherwise Pillow must read the pixels first
_PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Label statistics of a split with n images, in the split's order, and k classes.

    `pixels` (k,) int64: pixels per class. `image_pixels` (k,) int64: labeled pixels in all images
    that contain the class. `ignored`: unlabeled pixels. `holds` (n, k) bool: whether the image
    contains the class. `fingerprint` is the split's.
    `images_sha256` and `labels_sha256` cover all files' bytes in order, independent of their URIs,
    so a copy of the split has the same digests. They are "" in surveys of older versions.
    """

    fingerprint: str
    pixels: npt.NDArray[np.int64]
    image_pixels: npt.NDArray[np.int64]
    ignored: int
    holds: npt.NDArray[np.bool_]
    images_sha256: str = ""
    labels_sha256: str = ""

    def to_json(self) -> str:
        """Return this survey as one line of JSON, about 90 KB for VOC's 10,582 images."""
        values = {  # stored keys: they stay when a field is renamed
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
        """Return the survey that `to_json` wrote; compare `fingerprint` to know if it applies."""
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
    """Return the label statistics of `split`, checking each label and its size against its image.

    Pixels of JPEG and PNG images are not decoded, only their headers. `progress` is called with
    the number of images finished so far. Raises SampleError at the first bad file.
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
        size = _upright_size(pair.image, image)
        ids = decode_label(pair.label, label, split, size)
        counts = np.array(Image.fromarray(ids).histogram())  # five times faster than bincount
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
    """Return class weights (k,): median frequency / class frequency, so rare classes weigh more.

    A class's frequency is its pixels over the labeled pixels of the images that contain it. Absent
    classes are left out of the median and get weight 1, which no pixel uses.
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
    """Return the positions in the split: all once, then again those with a repeated class.

    An image with any of `repeat_classes` appears `repeats` times in total. Raises ValueError if a
    class is unknown or `repeats` is less than 1.
    Source: arXiv 1706.05587, Sec. 4.1.1 (bootstrapping on hard images).
    """
    check_at_least("--repeats", repeats, 1, "1 repeats nothing")
    check_repeat_classes(classes, repeat_classes)
    ids = [classes.names.index(name) for name in repeat_classes]
    hard = np.flatnonzero(survey.holds[:, ids].any(axis=1)).tolist()
    return [*range(len(survey.holds)), *(hard * (repeats - 1))]


def check_repeat_classes(classes: Classes, repeat_classes: Sequence[str]) -> None:
    """Check that all classes to be repeated exist. Raises ValueError naming an unknown one."""
    for name in repeat_classes:
        if name not in classes.names:
            raise ValueError(
                f"--repeat-classes {name!r}: not a class; choose from {', '.join(classes.names)}, "
                "or leave it empty to repeat nothing"
            )


def _upright_size(uri: str, data: bytes) -> tuple[int, int]:
    """Return (h, w) of the image that `images.decode` would return. Raises SampleError."""
    try:
        with images.guard(_MAX_PIXELS):
            image = images.open_image(data)
            if image.format == "JPEG" or (
                image.format == "PNG" and not any(mark in data for mark in _PNG_METADATA)
            ):
                swapped = image.format == "JPEG" and images.orientation(image) >= 5
                return (image.width, image.height) if swapped else (image.height, image.width)
        height, width, _ = images.decode(data, max_pixels=_MAX_PIXELS).shape
    except ImageError as error:
        raise broken_image_error(uri, error) from error
    return height, width
