"""Error messages for a split without images: which splits and layouts are there instead.

Called only after no images were found, so valid arguments never pay for the extra listing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pipeline.data import storage
from pipeline.data.storage import join

Layout = Literal["voc", "cityscapes", "camvid", "folders", "table"]

TABLE_ENDINGS = (".parquet", ".csv")

# files that identify each layout, as named in messages
_MARKERS: dict[Layout, str] = {
    "voc": "ImageSets/Segmentation/SPLIT.txt",
    "cityscapes": "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png",
    "camvid": "SPLIT/images/*",
    "folders": "SPLIT/images/*",
    "table": "*.parquet or *.csv",
}

# objects listed at most: a wrong root may be a bucket of millions
_MAX_LISTED = 10_000


def guess_layout(root: str) -> Layout | None:
    """Return the layout that `root` seems to have, None if it is none of the known ones."""
    if root.lower().endswith(TABLE_ENDINGS):
        return "table"
    if _names(join(root, "ImageSets/Segmentation"), 1):
        return "voc"
    if _names(join(root, "leftImg8bit"), 1):
        return "cityscapes"
    return "folders" if _splits(root, "folders") else None


def wrong_layout_error(root: str, layout: Layout) -> ValueError:
    """Return the error for a root that is not of `layout`: what it looks like instead."""
    guess = guess_layout(root)
    if guess is not None and guess != layout:
        hint = f"it looks like layout {guess}: use that, or another root"
    elif first := _names(root, 1):
        hint = f"the first object there is {first[0]}: use another root or layout"
    else:
        hint = "nothing is there: check the path"
    return ValueError(f"{root} is not of layout {layout}: it has no {_MARKERS[layout]}; {hint}")


def unknown_split_error(root: str, split: str, known: list[str], layout: Layout) -> ValueError:
    """Return the error for a missing split; without `known` splits, the layout must be wrong."""
    if not known:
        return wrong_layout_error(root, layout)
    return ValueError(f"split {split!r} is not in {root}; choose from {', '.join(known)}")


def empty_split_error(
    root: str, split: str, layout: Layout, *, endings: tuple[str, ...]
) -> ValueError:
    """Return the error for a split without images: unknown, empty, or of another layout."""
    top = join(root, "leftImg8bit") if layout == "cityscapes" else root
    if _names(join(top, split), 1):
        wanted = _MARKERS[layout].replace("SPLIT", split)
        return ValueError(
            f"split {split!r} of {root} is empty: it has no {wanted} that ends in "
            f"{', '.join(endings)}; add images, or give another split"
        )
    return unknown_split_error(root, split, _splits(top, layout), layout)


def _splits(top: str, layout: Layout) -> list[str]:
    """Return the splits of Cityscapes or folders, from the first names under `top`."""
    paths = [name.split("/") for name in _names(top)]
    if layout == "cityscapes":
        return sorted({path[0] for path in paths if path[-1].endswith("_leftImg8bit.png")})
    return sorted({path[0] for path in paths if len(path) > 2 and path[1] == "images"})


def _names(folder: str, count: int = _MAX_LISTED) -> list[str]:
    """Return the relative keys of the first `count` objects under `folder`."""
    listed: Iterator[storage.Object] = islice(storage.list_objects(folder), count)
    return [storage.relative(folder, item.uri) for item in listed]
