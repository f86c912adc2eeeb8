"""Distinguish failing objects from failing storage by probing other objects.

When storage refuses an object, one that it delivered before is read again: if that is refused
too, storage is at fault. When objects are not found, a listing shows whether they were deleted or
the whole prefix or mount has disappeared. The same applies to labels and their location.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from pipeline.data import storage
from pipeline.data.storage import Object, StorageError
from pipeline.results.layout import RunLayout, is_only_new_lease, run_id_of

_OTHERS = 3
"""Objects to probe when this process has not read any successfully yet."""


class StorageProbe:
    """Probes of one location: a URI prefix of images or of labels.

    `results` may be nested under it; objects that runs wrote there are excluded.
    """

    def __init__(self, location: str, results: str) -> None:
        self._location = location
        self._results = results
        self._delivered: Object | None = None

    def remember(self, item: Object) -> None:
        """Remember an object that storage delivered."""
        self._delivered = item

    def check_access(self, refused: Collection[str]) -> StorageError | None:
        """Return storage's error if it refuses other objects than `refused` too, else None."""
        last = None
        try:
            for item in self._probes(refused):
                try:
                    storage.read(item.uri, item.etag)
                except StorageError as error:
                    if error.kind in ("vanished", "changed"):  # healthy storage reports these too
                        return None
                    last = error
                else:
                    return None
        except StorageError as error:  # of the listing
            return error
        return last

    def check_exists(self, gone: Collection[str]) -> StorageError | None:
        """Return an error if the objects `gone`, which storage does not find, were not deleted.

        They were deleted (None) if a listing shows other objects and does not show them.
        """
        try:
            for item in self._listed_among(gone):
                if item.uri in gone:
                    return StorageError("vanished", f"{item.uri} is listed but cannot be read")
            if any(item.uri not in gone for item in self._listed()):
                return None
        except StorageError as error:
            return error
        return self._nothing_left()

    def _listed_among(self, gone: Collection[str]) -> Iterator[Object]:
        """List the range of keys from the first of `gone` to the last."""
        return storage.list_objects(self._location, between=(min(gone), max(gone)))

    def _listed(self) -> Iterator[Object]:
        items = storage.list_objects(self._location)
        return (item for item in items if not self._is_result(item.uri))

    def _is_result(self, uri: str) -> bool:
        """Return whether a run wrote the object."""
        return run_id_of(self._results, uri) is not None or is_only_new_lease(self._results, uri)

    def _nothing_left(self) -> StorageError:
        return StorageError("vanished", f"{self._location} no longer holds any other objects")

    def _probes(self, refused: Collection[str]) -> list[Object]:
        """Return the object delivered last or, if there is none, the smallest ones of a page."""
        if self._delivered is not None:
            return [self._delivered]
        page = list(itertools.islice(self._listed(), storage.PAGE_OBJECTS))
        if not page:
            raise self._nothing_left()
        others = (item for item in page if item.uri not in refused and item.size)
        return list(itertools.islice(sorted(others, key=lambda item: item.size), _OTHERS))


def check_access_here(layout: RunLayout, *locations: str | None) -> StorageError | None:
    """Return storage's error if this process too cannot write results or read a location.

    Locations that are None are skipped.
    """
    probe = f"{layout.singles}/probe"
    try:
        storage.write(probe, b"")
        storage.delete([probe], within=layout.results)
    except StorageError as error:
        return error
    probes = (StorageProbe(location, layout.results) for location in locations if location)
    return next(filter(None, (each.check_access(()) for each in probes)), None)
