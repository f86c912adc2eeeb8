"""Rows of the `images` table: segmented images and images with errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import metrics
from pipeline.bulk.planning.listing import ImageRef
from pipeline.bulk.worker.load import DecodedImage
from pipeline.data import image_formats, masks
from pipeline.data.labels import Classes
from pipeline.text import one_line

_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """A builder of the rows of one run; `model` and `settings` are fingerprints."""

    run_id: str
    model: str
    settings: str
    classes: Classes

    def ok(
        self,
        shard: int,
        loaded: DecodedImage,
        mask: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
    ) -> dict[str, Any]:
        """Return the row of an image, given its mask and winning probabilities, (h, w) each."""
        return {
            **self._common(shard, loaded.listed),
            "status": "ok",
            "height": mask.shape[0],
            "width": mask.shape[1],
            "mask": masks.encode(mask),
            "confidence": confidence.mean(dtype=np.float64),
            "label_error": _message(loaded.label_error),
            "classes": self._class_rows(mask, confidence, loaded.label),
        }

    def error(self, shard: int, listed: ImageRef, kind: str, message: str) -> dict[str, Any]:
        """Return the row of an image that has no mask."""
        return {
            **self._common(shard, listed),
            "status": "error",
            "error_kind": kind,
            "error": _message(message),
        }

    def _common(self, shard: int, listed: ImageRef) -> dict[str, Any]:
        return {
            **listed._asdict(),
            "run_id": self.run_id,
            "shard": shard,
            "model": self.model,
            "settings": self.settings,
            "format_version": image_formats.version_of(listed.uri),
        }

    def _class_rows(
        self,
        mask: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
        label: npt.NDArray[np.uint8] | None,
    ) -> list[dict[str, Any]]:
        """Return a row per class that is in the mask or in the label, ordered by class id."""
        k = self.classes.num_classes
        pixels = np.bincount(mask.ravel(), minlength=k)
        summed = np.bincount(mask.ravel(), weights=confidence.ravel(), minlength=k)
        scores = None if label is None else self._scores(label, mask)
        present = pixels > 0
        if scores is not None:
            present = present | (scores.tp + scores.fn > 0)
        return [
            {
                "class_id": c,
                "class_name": self.classes.names[c],
                "pixels": int(pixels[c]),
                "fraction": pixels[c] / mask.size,
                "confidence": summed[c] / pixels[c] if pixels[c] else None,
                **_score(scores, c),
            }
            for c in map(int, np.flatnonzero(present))
        ]

    def _scores(
        self, label: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]
    ) -> metrics.ClassCounts:
        return metrics.ClassCounts.from_confusion(
            metrics.confusion_matrix(
                label,
                mask,
                num_classes=self.classes.num_classes,
                ignore_index=self.classes.ignore_index,
            )
        )


def _score(scores: metrics.ClassCounts | None, c: int) -> dict[str, Any]:
    if scores is None:
        return {}
    tp, fp, fn = (int(counts[c]) for counts in (scores.tp, scores.fp, scores.fn))
    union = tp + fp + fn
    return {"tp": tp, "fp": fp, "fn": fn, "iou": tp / union if union else None}


def _message(text: str | None) -> str | None:
    return None if text is None else one_line(text, _MESSAGE_CHARACTERS)
