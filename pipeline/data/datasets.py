"""A data set's split, opened: every photo with its label, checked to be there before training.

Enters: a root URI, the name of a split, its layout and classes. Leaves: a `Split`, plain values
that travel to other processes. Whether the labels hold what they should is `survey`'s question.
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
    """The photos of a split in their order, each with its label.

    `lookup` (256,) uint8 maps the values in label files to class ids, None where they are ids.
    `objects` is what the listing said (etag, bytes) of each image and label, by URI.
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
        """Another one where another file, another version of a file, or a class differs."""
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
    """The pairs of `split` below `root`; "train+val" is one after the other, each photo once.

    VOC's order is that of its list, a table's that of its rows, else the paths' own: the same on
    every storage. Raises ValueError where the split is unknown or empty, the layout is another,
    a photo or a label is missing, a label has no photo, or the classes are not Cityscapes' there;
    StorageError where storage refuses.
    """
    root = storage.normalize(root)
    parts = list(dict.fromkeys(part.strip() for part in split.split("+")))
    if not all(parts):
        raise ValueError(f"split is {split!r}; give a name, or a sum of names such as train+val")
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
                f"layout cityscapes has 19 classes and ignore_index 255, but classes have "
                f"{classes.num_classes} and {classes.ignore_index}; take classes cityscapes, or "
                "layout table for classes of your own"
            )
        return layouts.cityscapes(root, parts)
    if layout in ("camvid", "folders"):
        return layouts.folders(root, parts, layout=layout)
    if layout == "table":
        pairs, objects = pair_table.open_table(root, parts)
        return DatasetFiles(pairs=pairs, objects=objects)
    raise ValueError(f"layout is {layout!r}; give voc, cityscapes, camvid, folders or table")
