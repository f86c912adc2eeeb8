"""Open a split of a data set: pair every image with its label and check that all files exist.

A `Split` holds plain values and can be pickled. The labels' contents are checked by `survey`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.data import layouts, pair_table, storage
from pipeline.data.dataset_errors import TABLE_ENDINGS, Layout, wrong_layout_error
from pipeline.data.labels import Classes
from pipeline.data.layouts import DatasetFiles
from pipeline.data.pairs import Pair
from pipeline.data.storage import Object

__all__ = ["Layout", "Split", "open_split"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split's pairs of images and labels, in order.

    `lookup` (256,) uint8 maps the values in label files to class ids; None if they are ids.
    `objects` has each file's listing entry (etag, bytes) by URI.
    """

    root: str
    name: str
    classes: Classes
    pairs: tuple[Pair, ...]
    objects: Mapping[str, Object] = field(repr=False)
    lookup: npt.NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def fingerprint(self) -> str:
        """Hash of the classes and of every file's URI and etag, in order."""
        values = [
            self.classes.to_dict(),
            self.lookup is not None,
            [
                (uri, self.objects[uri].etag)
                for pair in self.pairs
                for uri in (pair.image, pair.label)
            ],
        ]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def open_split(root: str, split: str, *, layout: Layout, classes: Classes) -> Split:
    """Return the pairs of `split` under `root`; "train+val" concatenates splits, without repeats.

    The order is the list's for VOC, the rows' for a table, and otherwise by path, so it is the same
    on every storage. Raises ValueError if the split is unknown or empty, `root` has another layout,
    an image or label is missing, a label has no image, or layout cityscapes is used with other
    classes; StorageError if storage refuses.
    """
    root = storage.normalize(root)
    parts = list(dict.fromkeys(part.strip() for part in split.split("+")))
    if not all(parts):
        raise ValueError(f"split {split!r}: must be a name, or names joined by + such as train+val")
    found = _found(root, parts, layout, classes)
    by_image = {pair.image: pair for part in reversed(parts) for pair in found.pairs[part]}
    images = dict.fromkeys(pair.image for part in parts for pair in found.pairs[part])
    pairs = tuple(by_image[image] for image in images)
    wanted = [uri for pair in pairs for uri in (pair.image, pair.label)]
    return Split(
        root=root,
        name=split,
        classes=classes,
        pairs=pairs,
        objects={uri: found.objects[uri] for uri in wanted},
        lookup=found.lookup,
    )


def _found(root: str, parts: list[str], layout: Layout, classes: Classes) -> DatasetFiles:
    if layout != "table" and root.lower().endswith(TABLE_ENDINGS):
        raise wrong_layout_error(root, layout)
    if layout == "voc":
        return layouts.voc(root, parts)
    if layout == "cityscapes":
        if (classes.num_classes, classes.ignore_index) != (19, 255):
            raise ValueError(
                f"layout cityscapes has 19 classes and ignore_index 255, but the given classes "
                f"have {classes.num_classes} and {classes.ignore_index}; use classes cityscapes, "
                "or layout table for classes of your own"
            )
        return layouts.cityscapes(root, parts)
    if layout in ("camvid", "folders"):
        return layouts.folders(root, parts, layout=layout)
    if layout == "table":
        pairs, objects = pair_table.open_table(root, parts)
        return DatasetFiles(pairs=pairs, objects=objects)
    raise ValueError(f"layout {layout!r}: must be voc, cityscapes, camvid, folders or table")
