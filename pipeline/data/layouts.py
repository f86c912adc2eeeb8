"""Layouts of data sets: one function per layout finds the pairs of images and labels of splits.

The order is the same on every storage. Each folder is listed once and no file is requested by
itself. Missing or superfluous files raise ValueError here instead of in the middle of training.
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
# in order of preference: train ids are class ids already, label ids need a lookup table
_CITYSCAPES_LABELS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


@dataclass(kw_only=True)
class DatasetFiles:
    """Files of a data set: pairs by split name, and listing entries by URI.

    `lookup` (256,) uint8 maps the values in label files to class ids; None if they are ids.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    objects: dict[str, Object] = field(default_factory=dict)
    lookup: npt.NDArray[np.uint8] | None = None


def voc(root: str, splits: list[str]) -> DatasetFiles:
    """Return the pairs of JPEGImages and SegmentationClass that SPLIT.txt lists, in its order.

    A label missing from SegmentationClass is taken from SegmentationClassAug, so the official
    labels, which have a border, take precedence over the augmented ones.
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
            ("images", "JPEGImages", images),
            ("labels", "SegmentationClass or SegmentationClassAug", labels),
        ):
            missing = [name for name in listed if name not in files]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(listed)} {what} listed in {split}.txt are not in "
                    f"{folder} of {root}, the first is {missing[0]}; add the files, or remove the "
                    f"names from {split}.txt"
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
    """Return the pairs of SPLIT/images and SPLIT/labels, matched by path without extension."""
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
    """Return the pairs of leftImg8bit and gtFine, from *_gtFine_labelTrainIds.png if complete.

    If any is missing, all labels are *_gtFine_labelIds.png with a lookup table to train ids.
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
            labels[ending][split] = _without_ending(ending, listed)
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
    """Return the objects under `folder` with one of the endings, by relative key, sorted."""
    found = {
        storage.relative(folder, item.uri): item
        for item in storage.list_objects(folder)
        if item.uri.lower().endswith(endings)
    }
    return dict(sorted(found.items()))


def _by_stem(found: DatasetFiles, folder: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Return {stem: URI} of the objects under `folder`, and add them to `found`."""
    listed = _listed(folder, endings)
    found.objects |= {item.uri: item for item in listed.values()}
    return index_by_stem((key, item.uri) for key, item in listed.items())


def _by_name(found: DatasetFiles, folder: str, ending: str) -> dict[str, str]:
    listed = _listed(folder, (ending.lower(),))
    found.objects |= {item.uri: item for item in listed.values()}
    return _without_ending(ending, listed)


def _without_ending(ending: str, listed: dict[str, Object]) -> dict[str, str]:
    """Return {key without `ending`: URI} of the keys that have it."""
    return {
        key.removesuffix(ending): item.uri for key, item in listed.items() if key.endswith(ending)
    }


def _matched(
    images: dict[str, str], labels: dict[str, str], image_root: str, label_root: str
) -> list[Pair]:
    """Pair each image with its label. Raises ValueError if an image or a label is left over."""
    for whose, files, partner, others, place in (
        ("images", images, "label", labels, label_root),
        ("labels", labels, "image", images, image_root),
    ):
        if alone := files.keys() - others.keys():
            raise ValueError(
                f"{len(alone)} of {len(files)} {whose} have no {partner} in {place}, the first is "
                f"{files[min(alone)]}; add the {partner}s, or remove these {whose}"
            )
    return [Pair(uri, labels[name]) for name, uri in images.items()]
