"""A shard's objects become pixels: fetched by many threads, decoded ahead of who consumes them.

What comes out is in the plan's order. Bytes in flight are bounded by the shard's size, decoded
pixels by a budget, whatever the sizes of the photos.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.bulk.decode import DecodeError, Decoders, Pixels
from pipeline.bulk.listing import Listed
from pipeline.data import storage

AHEAD_BYTES = 256 * 2**20
"""Decoded pixels that may wait to be consumed."""

Fetched = tuple[bytes, bytes | storage.StorageError | None]
"""A photo's bytes, and its label's, or why there are none, or None where it has no label."""

Fetching = Future[Fetched]

_FETCHERS = 16
_FIRST_GUESS_BYTES = 3_000_000  # of a photo's pixels, until some were seen


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A photo of the plan with its pixels, or with why it has none."""

    listed: Listed
    image: Pixels | None = None  # (h, w, 3)
    label: Pixels | None = None  # (h, w)
    label_error: str | None = None
    error_kind: str | None = None
    error: str | None = None
    fetched_bytes: int = 0


class Loader:
    """Loads the photos of one shard at a time or of several, from as many threads."""

    def __init__(self, decoders: Decoders, decoder_count: int, *, max_object_bytes: int) -> None:
        self._decoders = decoders
        self._decoder_count = decoder_count
        self._max_object_bytes = max_object_bytes
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
        self._decoding = ThreadPoolExecutor(2 * decoder_count, "decode")

    def close(self) -> None:
        """Ends the threads; what is in flight is finished first."""
        self._fetchers.shutdown(cancel_futures=True)
        self._decoding.shutdown(cancel_futures=True)

    def stream(self, photos: Sequence[Listed]) -> Iterator[Loaded]:
        """The photos with their pixels, in the order given; loading begins with the call."""
        waiting = deque((photo, self._fetchers.submit(self._fetch, photo)) for photo in photos)
        decoding: deque[Future[Loaded]] = deque()
        self._decode_ahead(waiting, decoding, _FIRST_GUESS_BYTES)
        return self._decoded(waiting, decoding)

    def _decoded(
        self, waiting: deque[tuple[Listed, Fetching]], decoding: deque[Future[Loaded]]
    ) -> Iterator[Loaded]:
        guess = _FIRST_GUESS_BYTES
        while waiting or decoding:
            self._decode_ahead(waiting, decoding, guess)
            loaded = decoding.popleft().result()
            guess = max(guess, _size(loaded))
            yield loaded

    def _decode_ahead(
        self,
        waiting: deque[tuple[Listed, Fetching]],
        decoding: deque[Future[Loaded]],
        guess: int,
    ) -> None:
        while waiting and self._may_decode(decoding, guess):
            photo, fetched = waiting.popleft()
            decoding.append(self._decoding.submit(self._decode, photo, fetched))

    def _may_decode(self, decoding: deque[Future[Loaded]], guess: int) -> bool:
        held = sum(_size(each.result()) if each.done() else guess for each in decoding)
        return len(decoding) < self._decoder_count or held + guess <= AHEAD_BYTES

    def _fetch(self, photo: Listed) -> Fetched:
        """Raises StorageError where the photo cannot be read."""
        if photo.bytes > self._max_object_bytes:
            return b"", None
        image = storage.read(photo.uri, photo.etag)
        if photo.label_uri is None:
            return image, None
        try:
            return image, storage.read(photo.label_uri, photo.label_etag)
        except storage.StorageError as error:
            return image, error

    def _decode(self, photo: Listed, fetched: Fetching) -> Loaded:
        if photo.bytes > self._max_object_bytes:
            message = f"{photo.bytes} bytes are over the limit of {self._max_object_bytes}"
            return Loaded(listed=photo, error_kind="too_large", error=message)
        try:
            data, label_data = fetched.result()
            image = self._decoders.image(data)
        except (storage.StorageError, DecodeError) as error:
            return Loaded(listed=photo, error_kind=error.kind, error=str(error))
        label, label_error = self._label(label_data, (image.shape[0], image.shape[1]))
        return Loaded(
            listed=photo,
            image=image,
            label=label,
            label_error=label_error,
            fetched_bytes=len(data) + (len(label_data) if isinstance(label_data, bytes) else 0),
        )

    def _label(
        self, data: bytes | storage.StorageError | None, size: tuple[int, int]
    ) -> tuple[Pixels | None, str | None]:
        if isinstance(data, storage.StorageError):
            return None, str(data)
        try:
            return (None if data is None else self._decoders.label(data, size)), None
        except DecodeError as error:
            return None, str(error)


def _size(loaded: Loaded) -> int:
    return sum(pixels.nbytes for pixels in (loaded.image, loaded.label) if pixels is not None)
