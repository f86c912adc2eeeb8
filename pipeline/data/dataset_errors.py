"""Why a split gave no photos, so that it can be mended: which splits and layouts are there.

Only who has found nothing asks here: a wrong argument may cost a listing, a right one never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pipeline.data import storage
from pipeline.data.storage import join

Layout = Literal["voc", "cityscapes", "camvid", "folders", "table"]

TABLE_ENDINGS = (".parquet", ".csv")

# what each layout is known by; the words are for messages
_MARKS: dict[Layout, str] = {
    "voc": "ImageSets/Segmentation/SPLIT.txt",
    "cityscapes": "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png",
    "camvid": "SPLIT/images/*",
    "folders": "SPLIT/images/*",
    "table": "*.parquet or *.csv",
}

# objects looked at: a wrong root may be a bucket of millions
_LOOKED_AT = 10_000


def guess_layout(root: str) -> Layout | None:
    """The layout that `root` seems to have, None where it is none of those known."""
    if root.lower().endswith(TABLE_ENDINGS):
        return "table"
    if _names(join(root, "ImageSets/Segmentation"), 1):
        return "voc"
    if _names(join(root, "leftImg8bit"), 1):
        return "cityscapes"
    return "folders" if _splits(root, "folders") else None


def wrong_layout_error(root: str, layout: Layout) -> ValueError:
    """The error for a root that is not of `layout`: what it looks like instead."""
    seen = guess_layout(root)
    if seen is not None and seen != layout:
        advice = f"it looks like layout {seen}: take that, or another root"
    elif first := _names(root, 1):
        advice = f"the first object there is {first[0]}: take another root or layout"
    else:
        advice = "nothing is there: check the path"
    return ValueError(f"{root} is not of layout {layout}, no {_MARKS[layout]} is there; {advice}")


def unknown_split_error(root: str, split: str, known: list[str], layout: Layout) -> ValueError:
    """The error for a split that does not exist, where `known` ones do; else for the layout."""
    if not known:
        return wrong_layout_error(root, layout)
    return ValueError(f"split {split!r} is not in {root}; give one of {', '.join(known)}")


def empty_split_error(
    root: str, split: str, layout: Layout, *, endings: tuple[str, ...]
) -> ValueError:
    """The error for a split whose folder gave no photo: unknown, empty, or another layout."""
    top = join(root, "leftImg8bit") if layout == "cityscapes" else root
    if _names(join(top, split), 1):
        wanted = _MARKS[layout].replace("SPLIT", split)
        return ValueError(
            f"split {split!r} of {root} is empty: no {wanted} is there that ends in "
            f"{', '.join(endings)}; add photos, or give another split"
        )
    return unknown_split_error(root, split, _splits(top, layout), layout)


def _splits(top: str, layout: Layout) -> list[str]:
    """The splits of Cityscapes or two folders that the first names below `top` tell."""
    paths = [name.split("/") for name in _names(top)]
    if layout == "cityscapes":
        return sorted({path[0] for path in paths if path[-1].endswith("_leftImg8bit.png")})
    return sorted({path[0] for path in paths if len(path) > 2 and path[1] == "images"})


def _names(folder: str, count: int = _LOOKED_AT) -> list[str]:
    """The relative keys of the first `count` objects below `folder`."""
    listed: Iterator[storage.Object] = islice(storage.list_objects(folder), count)
    return [storage.relative(folder, item.uri) for item in listed]
