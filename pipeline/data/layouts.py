"""Where a data set keeps its photos and labels: one function for each layout that is known.

Enters: a root URI and the names of splits. Leaves: for each name its pairs, in an order that is
the same on every storage, and the objects as a listing showed them. Folders are listed once, no
file is asked for alone; what is missing or left over is a ValueError here, not in mid-training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.data import storage
from pipeline.data.dataset_errors import Layout, empty_split_error, unknown_split_error
from pipeline.data.labels import CITYSCAPES_TRAIN_IDS
from pipeline.data.pairs import Pair, index_by_stem, parse_voc_split
from pipeline.data.storage import Object, StorageError, join

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LABEL_ENDINGS = (".png", ".bmp", ".gif", ".tif", ".tiff")

_CITYSCAPES_IMAGE = "_leftImg8bit.png"
# preferred first: train ids are read as they are, label ids through a table
_CITYSCAPES_LABELS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


@dataclass(kw_only=True)
class DatasetFiles:
    """What a layout holds: the pairs of each split by name, and their objects by URI.

    `lookup` (256,) uint8 maps a label's values to class ids; None where they are class ids.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    objects: dict[str, Object] = field(default_factory=dict)
    lookup: npt.NDArray[np.uint8] | None = None


def voc(root: str, splits: list[str]) -> DatasetFiles:
    """ImageSets/Segmentation/SPLIT.txt names files of JPEGImages and SegmentationClass.

    A label that SegmentationClass lacks is taken from SegmentationClassAug, so the official
    outlines, with their border, go before the augmented ones. The order is the list's.
    """
    found = DatasetFiles()
    names = {split: _voc_names(root, split) for split in splits}
    images = _by_stem(found, join(root, "JPEGImages"), IMAGE_ENDINGS)
    labels = _by_stem(found, join(root, "SegmentationClass"), LABEL_ENDINGS)
    wanted = {name for listed in names.values() for name in listed}
    if not wanted <= labels.keys():
        labels = _by_stem(found, join(root, "SegmentationClassAug"), LABEL_ENDINGS) | labels
    for split, listed in names.items():
        for what, folder, files in (
            ("photos", "JPEGImages", images),
            ("labels", "SegmentationClass or SegmentationClassAug", labels),
        ):
            missing = [name for name in listed if name not in files]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(listed)} {what} that {split}.txt names are not in "
                    f"{folder} of {root}, the first is {missing[0]}; add the files, or take the "
                    f"names out of {split}.txt"
                )
        found.pairs[split] = [Pair(images[name], labels[name]) for name in listed]
    return found


def _voc_names(root: str, split: str) -> list[str]:
    lists = join(root, "ImageSets/Segmentation")
    uri = join(lists, f"{split}.txt")
    try:
        return parse_voc_split(storage.read(uri).decode())
    except StorageError as error:
        if error.kind != "vanished":
            raise
        names = (storage.relative(lists, item.uri) for item in storage.list_objects(lists))
        known = [name.removesuffix(".txt") for name in names if name.endswith(".txt")]
        raise unknown_split_error(root, split, known, "voc") from None
    except ValueError as error:
        raise ValueError(f"split {split!r}: {uri}: {error}") from None


def folders(root: str, splits: list[str], *, layout: Layout = "folders") -> DatasetFiles:
    """SPLIT/images and SPLIT/labels below root, matched by relative path without extension."""
    found = DatasetFiles()
    for split in splits:
        image_root, label_root = (join(root, f"{split}/{kind}") for kind in ("images", "labels"))
        images = _by_stem(found, image_root, IMAGE_ENDINGS)
        labels = _by_stem(found, label_root, LABEL_ENDINGS)
        if not images:
            raise empty_split_error(root, split, layout, endings=IMAGE_ENDINGS)
        found.pairs[split] = _matched(images, labels, image_root, label_root)
    return found


def cityscapes(root: str, splits: list[str]) -> DatasetFiles:
    """leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png.

    Where a split lacks those, all are read from *_gtFine_labelIds.png through the train ids.
    """
    found = DatasetFiles()
    images: dict[str, dict[str, str]] = {}
    labels: dict[str, dict[str, dict[str, str]]] = {ending: {} for ending in _CITYSCAPES_LABELS}
    for split in splits:
        image_root = join(root, f"leftImg8bit/{split}")
        images[split] = _by_name(found, image_root, _CITYSCAPES_IMAGE)
        if not images[split]:
            raise empty_split_error(root, split, "cityscapes", endings=(_CITYSCAPES_IMAGE,))
        listed = _listed(join(root, f"gtFine/{split}"), (".png",))
        found.objects |= {item.uri: item for item in listed.values()}
        for ending in _CITYSCAPES_LABELS:
            labels[ending][split] = _without(ending, listed)
    train_ids, label_ids = _CITYSCAPES_LABELS
    complete = all(images[split].keys() <= labels[train_ids][split].keys() for split in splits)
    ending = train_ids if complete else label_ids
    found.lookup = None if complete else CITYSCAPES_TRAIN_IDS
    for split in splits:
        image_root, label_root = (join(root, f"{k}/{split}") for k in ("leftImg8bit", "gtFine"))
        found.pairs[split] = _matched(
            images[split], labels[ending][split], image_root, f"{label_root}/*/*{ending}"
        )
    return found


def _listed(folder: str, endings: tuple[str, ...]) -> dict[str, Object]:
    """The objects below `folder` with one of the endings, by relative key, in the keys' order."""
    found = {
        storage.relative(folder, item.uri): item
        for item in storage.list_objects(folder)
        if item.uri.lower().endswith(endings)
    }
    return dict(sorted(found.items()))


def _by_stem(found: DatasetFiles, folder: str, endings: tuple[str, ...]) -> dict[str, str]:
    """stem -> URI of the objects below `folder`, which `found` remembers."""
    listed = _listed(folder, endings)
    found.objects |= {item.uri: item for item in listed.values()}
    return index_by_stem((key, item.uri) for key, item in listed.items())


def _by_name(found: DatasetFiles, folder: str, ending: str) -> dict[str, str]:
    listed = _listed(folder, (ending.lower(),))
    found.objects |= {item.uri: item for item in listed.values()}
    return _without(ending, listed)


def _without(ending: str, listed: dict[str, Object]) -> dict[str, str]:
    """key without `ending` -> URI, of the keys that have it."""
    return {
        key.removesuffix(ending): item.uri for key, item in listed.items() if key.endswith(ending)
    }


def _matched(
    images: dict[str, str], labels: dict[str, str], image_root: str, label_root: str
) -> list[Pair]:
    """Each image with its label. Raises ValueError where one of either has no partner."""
    for whose, others, mine, place in (
        ("photos", "label", images.keys() - labels.keys(), label_root),
        ("labels", "photo", labels.keys() - images.keys(), image_root),
    ):
        if mine:
            every = images if whose == "photos" else labels
            raise ValueError(
                f"{len(mine)} of {len(every)} {whose} have no {others} in {place}, the first is "
                f"{every[min(mine)]}; add the {others}s, or move these {whose} out"
            )
    return [Pair(uri, labels[name]) for name, uri in images.items()]
