"""Are failures the photos' own, or those of what they lie in? Too many in a row are the latter.

A photo that was deleted is a row, and so is one that storage refuses; a storage that refuses
everything, or a prefix or a mount that is gone, stops the run before it becomes so many rows. What
holds for photos holds for their labels, which may lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeline.bulk.worker.storage_probe import Witness
from pipeline.results import tables

FAILURES_IN_A_ROW = 50
"""So many photos in a row that fail in one way which is not theirs are a fault of the system."""


class SystemicError(RuntimeError):
    """Nothing is to be gained by going on: the run stops, and can be continued."""


class CutOffError(SystemicError):
    """Storage has nothing for this process; whether for others too, the driver looks."""


class Streak:
    """Failures in a row of one kind that is not the photo's own fault."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self.uris: list[str] = []

    def __len__(self) -> int:
        return len(self.uris)

    def count(self, uri: str, kind: str | None) -> bool:
        """Whether they are `FAILURES_IN_A_ROW` now; what comes then begins another streak."""
        if kind != self._kind or len(self) >= FAILURES_IN_A_ROW:
            self._kind, self.uris = kind, []
        # what a healthy storage says of an object that was replaced is its own too
        if kind is not None and kind != "changed" and kind not in tables.PERMANENT_ERRORS:
            self.uris.append(uri)
        return len(self) >= FAILURES_IN_A_ROW


class Source:
    """What photos lie in, or labels (`what` says which), as one process sees it."""

    def __init__(self, what: str, witness: Witness) -> None:
        self._what = what
        self.witness = witness
        self._streak = Streak()

    def count(self, uri: str, kind: str | None, error: str | None) -> None:
        """Counts an object, `kind` None where it is whole. Raises SystemicError after too many."""
        if not self._streak.count(uri, kind):
            return
        if kind == "vanished":
            self.check_vanished(self._streak.uris)
        else:
            failed = f"{len(self._streak)} {self._what}s in a row failed"
            raise SystemicError(f"{failed} ({kind}): {error}")

    def check_vanished(self, gone: Collection[str]) -> None:
        """Raises CutOffError where these are gone with all others: nobody deleted them."""
        loss = self.witness.loss(gone)
        if loss is not None:
            raise CutOffError(f"{len(gone)} {self._what}s in a row vanished: {loss}")

    def check_refused(self, refused: Collection[str]) -> None:
        """Raises CutOffError where storage refuses everything, and not these alone."""
        refusal = self.witness.refusal(refused)
        if refusal is not None:
            raise CutOffError(f"storage gives no {self._what} any more: {refusal}")
