"""Does storage refuse one photo, or everything? A photo that it gave before is asked for again."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from pipeline.bulk.listing import Listed
from pipeline.data import storage
from pipeline.data.storage import Object, StorageError
from pipeline.results.layout import RunLayout

_OTHERS = 3
"""Photos of the listing that are tried by who was given none yet."""


class Witness:
    """Remembers a photo that could be read, for `refusal`; `images` is where photos lie."""

    def __init__(self, images: str) -> None:
        self._images = images
        self._given: Object | None = None

    def saw(self, photo: Listed) -> None:
        """Storage gave this photo."""
        self._given = Object(photo.uri, photo.etag, photo.bytes)

    def refusal(self, refused: Collection[str]) -> StorageError | None:
        """What storage says where it refuses others than the photos `refused` too."""
        last = None
        try:
            for photo in self._asked(refused):
                try:
                    storage.read(photo.uri, photo.etag)
                except StorageError as error:
                    if error.kind in ("vanished", "changed"):  # it answers, as a healthy one does
                        return None
                    last = error
                else:
                    return None
        except StorageError as error:  # of the listing
            return error
        return last

    def _asked(self, refused: Collection[str]) -> list[Object]:
        """The photo that storage gave, or the smallest of a page that it has not refused."""
        if self._given is not None:
            return [self._given]
        page = next(storage.list_pages(self._images))
        others = (item for item in page if item.uri not in refused and item.size)
        return list(itertools.islice(sorted(others, key=lambda item: item.size), _OTHERS))


def refusal_here(layout: RunLayout, images: str) -> StorageError | None:
    """What storage says where it refuses this process too: photos, or a write of results."""
    probe = f"{layout.singles}/probe"
    try:
        storage.write(probe, b"")
        storage.delete([probe], within=layout.results)
    except StorageError as error:
        return error
    return Witness(images).refusal(())
