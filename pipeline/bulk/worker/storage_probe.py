"""Does storage refuse one photo, or everything? A photo that it gave before is asked for again.

And are photos that it does not find deleted, or gone with all that lay there? A listing tells.
Labels are asked about in the same way, where they lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from pipeline.data import storage
from pipeline.data.storage import Object, StorageError
from pipeline.results.layout import RunLayout, is_only_new_lease, run_id_of

_OTHERS = 3
"""Objects of the listing that are tried by who was given none yet."""


class Witness:
    """Remembers an object that could be read, for `refusal`; `place` is where they lie.

    `results` may lie below it: what is written there is none of them.
    """

    def __init__(self, place: str, results: str) -> None:
        self._place = place
        self._results = results
        self._given: Object | None = None

    def saw(self, item: Object) -> None:
        """Storage gave this one."""
        self._given = item

    def refusal(self, refused: Collection[str]) -> StorageError | None:
        """What storage says where it refuses others than those `refused` too."""
        last = None
        try:
            for item in self._asked(refused):
                try:
                    storage.read(item.uri, item.etag)
                except StorageError as error:
                    if error.kind in ("vanished", "changed"):  # it answers, as a healthy one does
                        return None
                    last = error
                else:
                    return None
        except StorageError as error:  # of the listing
            return error
        return last

    def loss(self, gone: Collection[str]) -> StorageError | None:
        """Why the objects `gone`, which storage does not find, are no deleted ones.

        None where a listing shows others, and none of them.
        """
        try:
            for item in self._listed_among(gone):
                if item.uri in gone:
                    return StorageError("vanished", f"{item.uri} is listed, and yet not there")
            if any(item.uri not in gone for item in self._listed()):
                return None
        except StorageError as error:
            return error
        return self._nothing_left()

    def _listed_among(self, gone: Collection[str]) -> Iterator[Object]:
        """What a listing shows from the first of `gone` to the last."""
        return storage.list_objects(self._place, between=(min(gone), max(gone)))

    def _listed(self) -> Iterator[Object]:
        items = storage.list_objects(self._place)
        return (item for item in items if not self._is_ours(item.uri))

    def _is_ours(self, uri: str) -> bool:
        """Whether a run wrote it."""
        return run_id_of(self._results, uri) is not None or is_only_new_lease(self._results, uri)

    def _nothing_left(self) -> StorageError:
        return StorageError("vanished", f"nothing else lies below {self._place} any more")

    def _asked(self, refused: Collection[str]) -> list[Object]:
        """The one that storage gave, or the smallest of a page that it has not refused."""
        if self._given is not None:
            return [self._given]
        page = list(itertools.islice(self._listed(), storage.PAGE_OBJECTS))
        if not page:
            raise self._nothing_left()
        others = (item for item in page if item.uri not in refused and item.size)
        return list(itertools.islice(sorted(others, key=lambda item: item.size), _OTHERS))


def refusal_here(layout: RunLayout, *places: str | None) -> StorageError | None:
    """What storage says where it refuses this process too: to write results, or to read a place.

    A place that is None is none.
    """
    probe = f"{layout.singles}/probe"
    try:
        storage.write(probe, b"")
        storage.delete([probe], within=layout.results)
    except StorageError as error:
        return error
    refusals = (Witness(place, layout.results).refusal(()) for place in places if place)
    return next(filter(None, refusals), None)
