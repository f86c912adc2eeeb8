"""Detect systemic failures: too many images, or labels, in a row that fail in the same way.

An image that was deleted, or that storage refuses, becomes an error row. If storage refuses
everything, or a whole prefix or mount has disappeared, the run aborts instead of writing an error
row for each image. The same applies to labels, which may be stored elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeline.bulk.worker.storage_probe import StorageProbe
from pipeline.results import tables

FAILURES_IN_A_ROW = 50
"""This many consecutive failures of one kind that is not about the image are systemic."""


class SystemicError(RuntimeError):
    """Continuing is pointless: the run aborts, and can be resumed."""


class CutOffError(SystemicError):
    """Storage delivers nothing to this process; the driver checks whether others can read it."""


class FailureStreak:
    """Consecutive failures of one kind that is not about the image itself."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self.uris: list[str] = []

    def __len__(self) -> int:
        return len(self.uris)

    def count(self, uri: str, kind: str | None) -> bool:
        """Count an object; return whether the streak has reached `FAILURES_IN_A_ROW`.

        The next object then starts a new streak.
        """
        if kind != self._kind or len(self) >= FAILURES_IN_A_ROW:
            self._kind, self.uris = kind, []
        # `changed` is about the object too: healthy storage reports it for a replaced object
        if kind is not None and kind != "changed" and kind not in tables.PERMANENT_ERRORS:
            self.uris.append(uri)
        return len(self) >= FAILURES_IN_A_ROW


class LocationMonitor:
    """The location of the images (or labels: `what`) as seen by one process."""

    def __init__(self, what: str, probe: StorageProbe) -> None:
        self._what = what
        self.probe = probe
        self._streak = FailureStreak()

    def count(self, uri: str, kind: str | None, error: str | None) -> None:
        """Count an object; `kind` is None if it is intact. Raises SystemicError after too many."""
        if not self._streak.count(uri, kind):
            return
        if kind == "vanished":
            self.check_vanished(self._streak.uris)
        else:
            failed = f"{len(self._streak)} {self._what}s in a row failed"
            raise SystemicError(f"{failed} ({kind}): {error}")

    def check_vanished(self, gone: Collection[str]) -> None:
        """Raise CutOffError if these objects disappeared together with all others."""
        loss = self.probe.check_exists(gone)
        if loss is not None:
            raise CutOffError(f"{len(gone)} {self._what}s in a row vanished: {loss}")

    def check_refused(self, refused: Collection[str]) -> None:
        """Raise CutOffError if storage refuses everything, not only these objects."""
        refusal = self.probe.check_access(refused)
        if refusal is not None:
            raise CutOffError(f"storage no longer delivers {self._what}s: {refusal}")
