"""Load a shard's images and labels: threads fetch them, and decoders work ahead of the consumer.

Images are returned in the order of the plan. Bytes in flight are bounded by the size of the shard,
decoded pixels by a budget, whatever the sizes of the images.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.decode import DecodeError, DecoderPool, Pixels
from pipeline.data import storage

AHEAD_BYTES = 256 * 2**20
"""Bytes of decoded pixels that may wait for the consumer."""

Fetched = tuple[bytes, bytes | storage.StorageError | DecodeError | None]
"""Bytes of an image, and of its label: bytes, an error, or None if it has no label."""

Fetching = Future[Fetched]

_TRANSIENT = ("access", "timeout")
"""Storage errors that may not occur on the next attempt."""

_FETCHERS = 16
_FIRST_GUESS_BYTES = 3_000_000  # of an image's pixels, before any is decoded


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An image of the plan with its pixels, or with the error that prevented decoding."""

    listed: ImageRef
    image: Pixels | None = None  # (h, w, 3)
    label: Pixels | None = None  # (h, w)
    label_error: str | None = None
    label_error_kind: str | None = None  # of storage; None also if the label's bytes are invalid
    error_kind: str | None = None
    error: str | None = None
    refused: bool = False  # by storage, for a transient reason
    fetched_bytes: int = 0

    @property
    def label_refused(self) -> bool:
        """Whether storage delivered the image but refused its label, for a transient reason."""
        return self.label_error_kind in _TRANSIENT


class Loader:
    """A loader of images; several threads may load a shard each."""

    def __init__(self, decoders: DecoderPool, decoder_count: int, *, max_object_bytes: int) -> None:
        self._decoders = decoders
        self._decoder_count = decoder_count
        self._max_object_bytes = max_object_bytes
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
        self._decoding = ThreadPoolExecutor(2 * decoder_count, "decode")

    def close(self) -> None:
        """Stop the threads once the work in flight is finished."""
        self._fetchers.shutdown(cancel_futures=True)
        self._decoding.shutdown(cancel_futures=True)

    def stream(self, images: Sequence[ImageRef]) -> Iterator[DecodedImage]:
        """Return the images with their pixels, in the given order; loading starts at once."""
        fetching = [(ref, self._fetchers.submit(self._fetch, ref)) for ref in images]
        ahead = PrefetchQueue(fetching, self._decode_later, fewest=self._decoder_count)
        ahead.advance()
        return iter(ahead)

    def _decode_later(self, ref: ImageRef, fetched: Fetching) -> Future[DecodedImage]:
        return self._decoding.submit(self._decode, ref, fetched)

    def _fetch(self, ref: ImageRef) -> Fetched:
        """Return the bytes of image and label. Raises StorageError if the image cannot be read."""
        if ref.bytes > self._max_object_bytes:
            return b"", None
        image = storage.read(ref.uri, ref.etag)
        if ref.label_uri is None:
            return image, None
        if (ref.label_bytes or 0) > self._max_object_bytes:
            limit = f"{ref.label_bytes} bytes are over the limit of {self._max_object_bytes}"
            return image, DecodeError("too_large", f"label {ref.label_uri}: {limit}")
        try:
            return image, storage.read(ref.label_uri, ref.label_etag)
        except storage.StorageError as error:
            return image, error

    def _decode(self, ref: ImageRef, fetched: Fetching) -> DecodedImage:
        if ref.bytes > self._max_object_bytes:
            message = f"{ref.bytes} bytes are over the limit of {self._max_object_bytes}"
            return DecodedImage(listed=ref, error_kind="too_large", error=message)
        fetched_bytes = 0
        try:
            data, label_data = fetched.result()
            fetched_bytes = len(data) + (len(label_data) if isinstance(label_data, bytes) else 0)
            image = self._decoders.image(data)
        except (storage.StorageError, DecodeError) as error:
            return DecodedImage(
                listed=ref,
                error_kind=error.kind,
                error=str(error),
                refused=_storage_error_kind(error) in _TRANSIENT,
                fetched_bytes=fetched_bytes,
            )
        label, label_error = self._label(label_data, (image.shape[0], image.shape[1]))
        return DecodedImage(
            listed=ref,
            image=image,
            label=label,
            label_error=label_error,
            label_error_kind=_storage_error_kind(label_data),
            fetched_bytes=fetched_bytes,
        )

    def _label(
        self, data: bytes | storage.StorageError | DecodeError | None, size: tuple[int, int]
    ) -> tuple[Pixels | None, str | None]:
        if isinstance(data, storage.StorageError | DecodeError):
            return None, str(data)
        try:
            return (None if data is None else self._decoders.label(data, size)), None
        except DecodeError as error:
            return None, str(error)


class PrefetchQueue:
    """The images of one shard: those being decoded, within the budget, and those waiting.

    When one is decoded or consumed, as many more are submitted as the budget allows; the size of
    an image that is being decoded is estimated as the largest one seen.
    """

    def __init__(
        self,
        waiting: Sequence[tuple[ImageRef, Fetching]],
        decode: Callable[[ImageRef, Fetching], Future[DecodedImage]],
        *,
        fewest: int,
    ) -> None:
        self._waiting = deque(waiting)
        self._decoding: deque[Future[DecodedImage]] = deque()
        self._decode = decode
        self._fewest = fewest  # this many are held whatever their sizes
        self._guess = _FIRST_GUESS_BYTES
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[DecodedImage]:
        while True:
            self.advance()
            with self._lock:
                if not self._decoding:
                    return
                first = self._decoding.popleft()
            yield first.result()

    def advance(self, _: object = None) -> None:
        """Submit as many images for decoding as may be held."""
        with self._lock:
            while self._waiting and self._has_room():
                future = self._decode(*self._waiting.popleft())
                self._decoding.append(future)
                future.add_done_callback(self.advance)

    def _has_room(self) -> bool:
        done = [_size(each.result()) for each in self._decoding if _has_pixels(each)]
        self._guess = max(self._guess, *done, 0)
        in_work = len(self._decoding) - len(done)
        if len(self._decoding) < self._fewest:
            return True
        # more than two per decoder would only wait, at unknown sizes
        held = sum(done) + (in_work + 1) * self._guess
        return in_work < 2 * self._fewest and held <= AHEAD_BYTES


def _storage_error_kind(found: object) -> str | None:
    return found.kind if isinstance(found, storage.StorageError) else None


def _has_pixels(each: Future[DecodedImage]) -> bool:
    return each.done() and not each.cancelled() and each.exception() is None


def _size(loaded: DecodedImage) -> int:
    return sum(pixels.nbytes for pixels in (loaded.image, loaded.label) if pixels is not None)
