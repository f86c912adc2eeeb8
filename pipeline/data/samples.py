"""Loads an image and its label from a pair of files.

Every failure (storage, bytes, values) is a `SampleError` that names the file and can be pickled,
so it travels back from a worker process. Only one thread of a process may decode at a time.
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
"""Returns the bytes of a URI: `storage.read` or a `NodeCache`."""

_REPLACE = "replace the file, or remove it from the split"


class SampleError(ValueError):
    """An image or label that cannot be used; `uri` is the file. The message is one line."""

    def __init__(self, uri: str, message: str) -> None:
        super().__init__(uri, message)  # both, so that the error can be pickled
        self.uri = uri

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class BrokenFileError(SampleError):
    """A file that was read but is unusable: retrying does not help, only another file does."""


def load(pair: Pair, split: Split, read: Read) -> tuple[Pixels, Pixels]:
    """Return the image (h, w, 3) uint8 RGB and its label (h, w) uint8: class ids, ignore_index.

    Raises SampleError if a file cannot be read or decoded, the label holds any other value, or
    the sizes differ; MemoryError if memory is short.
    """
    image = decode_image(pair.image, fetch(pair.image, read))
    height, width, _ = image.shape
    return image, decode_label(pair.label, fetch(pair.label, read), split, (height, width))


def fetch(uri: str, read: Read) -> bytes:
    """Return the bytes at `uri`. Raises SampleError if storage fails."""
    try:
        return read(uri)
    except StorageError as error:
        hints = {
            "vanished": "it existed when the split was opened; restore it, or start over",
            "changed": "restore it, or start over",
        }
        hint = hints.get(error.kind, "check that this node can reach it")
        reason = one_line(str(error).removeprefix(f"{uri}: ").removeprefix(f"{uri} "))
        raise SampleError(uri, f"{reason}; {hint}") from error


def decode_image(uri: str, data: bytes) -> Pixels:
    """Return the image in `data`. Raises SampleError naming `uri` if it cannot be decoded."""
    try:
        return images.decode(data)
    except ImageError as error:
        raise broken_image_error(uri, error) from error


def broken_image_error(uri: str, error: ImageError) -> BrokenFileError:
    """Return the error for an image whose bytes cannot be decoded."""
    return BrokenFileError(uri, f"image cannot be read ({error.kind}): {error}; {_REPLACE}")


def decode_label(uri: str, data: bytes, split: Split, size: tuple[int, int]) -> Pixels:
    """Return the label in `data` for an image of `size` (h, w). Raises SampleError naming `uri`."""
    try:
        return masks.decode_label(data, split.classes, size=size, lookup=split.lookup)
    except LabelError as error:
        raise BrokenFileError(uri, f"{error}; {_REPLACE}") from error
