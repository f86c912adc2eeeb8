"""A pair of files becomes a photo and its label, or one error that names the file.

Whatever goes wrong on the way (storage, bytes, values) is a `SampleError`, which survives the way
back from a worker process. One thread of a process decodes at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data import images, masks
from pipeline.data.datasets import Split
from pipeline.data.images import ImageError, Pixels
from pipeline.data.masks import LabelError
from pipeline.data.pairs import Pair
from pipeline.data.storage import StorageError
from pipeline.text import one_line

Read = Callable[[str], bytes]
"""URI -> the object's bytes: `storage.read`, or a `NodeCache`."""

_REPLACE = "replace the file, or take it out of the split"


class SampleError(ValueError):
    """A photo or label that cannot be trained on; `uri` is the file. The message is one line."""

    def __init__(self, uri: str, message: str) -> None:
        super().__init__(uri, message)  # both, so that the error survives pickling
        self.uri = uri

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class BrokenFileError(SampleError):
    """A file that was read and cannot be trained on: only another one can."""


def load(pair: Pair, split: Split, read: Read) -> tuple[Pixels, Pixels]:
    """The photo (h, w, 3) uint8 RGB and its label (h, w) uint8, ids and ignore_index.

    Raises SampleError where one cannot be read or decoded, the label holds another value, or
    their sizes differ; MemoryError where memory is short.
    """
    image = decode_image(pair.image, fetch(pair.image, read))
    height, width, _ = image.shape
    return image, decode_label(pair.label, fetch(pair.label, read), split, (height, width))


def fetch(uri: str, read: Read) -> bytes:
    """The bytes at `uri`. Raises SampleError where storage does not give them."""
    try:
        return read(uri)
    except StorageError as error:
        ways_out = {
            "vanished": "it was there when the split was opened; put it back, or start again",
            "changed": "it was replaced after the split was opened; start again",
        }
        way_out = ways_out.get(error.kind, "check that it can be reached from this node")
        reason = one_line(str(error).removeprefix(f"{uri}: ").removeprefix(f"{uri} "))
        raise SampleError(uri, f"{reason}; {way_out}") from error


def decode_image(uri: str, data: bytes) -> Pixels:
    """The photo in `data`. Raises SampleError, naming `uri`, where it is none."""
    try:
        return images.decode(data)
    except ImageError as error:
        raise broken_image_error(uri, error) from error


def broken_image_error(uri: str, error: ImageError) -> BrokenFileError:
    """The error for a photo whose bytes cannot be decoded."""
    return BrokenFileError(uri, f"image cannot be read ({error.kind}): {error}; {_REPLACE}")


def decode_label(uri: str, data: bytes, split: Split, size: tuple[int, int]) -> Pixels:
    """The label in `data` for a photo of `size` (h, w). Raises SampleError, naming `uri`."""
    try:
        return masks.decode_label(data, split.classes, size=size, lookup=split.lookup)
    except LabelError as error:
        raise BrokenFileError(uri, f"{error}; {_REPLACE}") from error
