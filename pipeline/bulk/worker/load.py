"""A shard's objects become pixels: fetched by many threads, decoded ahead of who consumes them.

What comes out is in the plan's order. Bytes in flight are bounded by the shard's size, decoded
pixels by a budget, whatever the sizes of the photos.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.bulk.planning.listing import Listed
from pipeline.bulk.worker.decode import DecodeError, Decoders, Pixels
from pipeline.data import storage

AHEAD_BYTES = 256 * 2**20
"""Decoded pixels that may wait to be consumed."""

Fetched = tuple[bytes, bytes | storage.StorageError | DecodeError | None]
"""A photo's bytes, and its label's, or why there are none, or None where it has no label."""

Fetching = Future[Fetched]

_PASSING = ("access", "timeout")
"""What storage says that it may not say the next time."""

_FETCHERS = 16
_FIRST_GUESS_BYTES = 3_000_000  # of a photo's pixels, until some were seen


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A photo of the plan with its pixels, or with why it has none."""

    listed: Listed
    image: Pixels | None = None  # (h, w, 3)
    label: Pixels | None = None  # (h, w)
    label_error: str | None = None
    label_error_kind: str | None = None  # of storage; None too where the label's bytes are bad
    error_kind: str | None = None
    error: str | None = None
    refused: bool = False  # by storage, for a reason that may pass
    fetched_bytes: int = 0

    @property
    def label_refused(self) -> bool:
        """Whether storage gave the photo, and not its label, for a reason that may pass."""
        return self.label_error_kind in _PASSING


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
        fetching = [(photo, self._fetchers.submit(self._fetch, photo)) for photo in photos]
        ahead = _Ahead(fetching, self._decode_later, fewest=self._decoder_count)
        ahead.advance()
        return iter(ahead)

    def _decode_later(self, photo: Listed, fetched: Fetching) -> Future[Loaded]:
        return self._decoding.submit(self._decode, photo, fetched)

    def _fetch(self, photo: Listed) -> Fetched:
        """Raises StorageError where the photo cannot be read."""
        if photo.bytes > self._max_object_bytes:
            return b"", None
        image = storage.read(photo.uri, photo.etag)
        if photo.label_uri is None:
            return image, None
        if (photo.label_bytes or 0) > self._max_object_bytes:
            limit = f"{photo.label_bytes} bytes are over the limit of {self._max_object_bytes}"
            return image, DecodeError("too_large", f"label {photo.label_uri}: {limit}")
        try:
            return image, storage.read(photo.label_uri, photo.label_etag)
        except storage.StorageError as error:
            return image, error

    def _decode(self, photo: Listed, fetched: Fetching) -> Loaded:
        if photo.bytes > self._max_object_bytes:
            message = f"{photo.bytes} bytes are over the limit of {self._max_object_bytes}"
            return Loaded(listed=photo, error_kind="too_large", error=message)
        fetched_bytes = 0
        try:
            data, label_data = fetched.result()
            fetched_bytes = len(data) + (len(label_data) if isinstance(label_data, bytes) else 0)
            image = self._decoders.image(data)
        except (storage.StorageError, DecodeError) as error:
            return Loaded(
                listed=photo,
                error_kind=error.kind,
                error=str(error),
                refused=_kind_of_storage(error) in _PASSING,
                fetched_bytes=fetched_bytes,
            )
        label, label_error = self._label(label_data, (image.shape[0], image.shape[1]))
        return Loaded(
            listed=photo,
            image=image,
            label=label,
            label_error=label_error,
            label_error_kind=_kind_of_storage(label_data),
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


class _Ahead:
    """The photos of one shard: those being decoded, within the budget, and those that wait.

    Whenever one is decoded or consumed, as many are sent after it as the budget allows; the
    size of those in work is guessed as the largest one seen.
    """

    def __init__(
        self,
        waiting: Sequence[tuple[Listed, Fetching]],
        decode: Callable[[Listed, Fetching], Future[Loaded]],
        *,
        fewest: int,
    ) -> None:
        self._waiting = deque(waiting)
        self._decoding: deque[Future[Loaded]] = deque()
        self._decode = decode
        self._fewest = fewest  # so many are held whatever their sizes
        self._guess = _FIRST_GUESS_BYTES
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Loaded]:
        while True:
            self.advance()
            with self._lock:
                if not self._decoding:
                    return
                first = self._decoding.popleft()
            yield first.result()

    def advance(self, _: object = None) -> None:
        """Sends photos to be decoded, as many as may be held."""
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
        # beyond twice the decoders they would only wait, their sizes not yet known
        held = sum(done) + (in_work + 1) * self._guess
        return in_work < 2 * self._fewest and held <= AHEAD_BYTES


def _kind_of_storage(found: object) -> str | None:
    return found.kind if isinstance(found, storage.StorageError) else None


def _has_pixels(each: Future[Loaded]) -> bool:
    return each.done() and not each.cancelled() and each.exception() is None


def _size(loaded: Loaded) -> int:
    return sum(pixels.nbytes for pixels in (loaded.image, loaded.label) if pixels is not None)
