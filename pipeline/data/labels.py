"""Class tables: names, colors, and the value of unlabeled pixels.

`Classes` are stored as JSON values in checkpoint metadata and Parquet footers; custom classes are
given as JSON text. A class id is an index into `names`; `ignore_index` is never a class id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a data set: id i has the name `names[i]` and color `palette[i]` (R, G, B).

    Label pixels of value `ignore_index` count neither in the loss nor in any score.
    Raises ValueError if the fields are inconsistent, TypeError if a value has another type.
    """

    names: tuple[str, ...]
    palette: tuple[Color, ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        _check_names(self.names)
        _check_palette(self.palette, len(self.names))
        _check_ignore_index(self.ignore_index, len(self.names))

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, object]:
        """Return JSON values: `{"names": [...], "palette": [[r, g, b], ...], ...}`."""
        return {
            "names": list(self.names),
            "palette": [list(color) for color in self.palette],
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Classes:
        """Return the classes of `{"names", "palette", "ignore_index"}`; only names are required.

        The palette defaults to VOC's color map, ignore_index to 255. Raises ValueError on an
        unknown key, TypeError on a value of another type.
        """
        unknown = sorted(set(values) - {"names", "palette", "ignore_index"})
        if unknown:
            raise ValueError(
                f"classes have an unknown key {unknown[0]!r}; use names, palette, ignore_index"
            )
        if "names" not in values:
            raise ValueError('classes have no names; give {"names": ["background", ...]}')
        names = tuple(_sequence(values["names"], "names"))
        palette = values.get("palette")
        colors: tuple[object, ...] = voc_colormap(len(names))
        if palette is not None:
            colors = tuple(
                tuple(_sequence(color, f"palette[{i}]"))
                for i, color in enumerate(_sequence(palette, "palette"))
            )
        # types are not known statically; __post_init__ checks them at run time
        return cls(
            names=names,  # type: ignore[arg-type]
            palette=colors,  # type: ignore[arg-type]
            ignore_index=values.get("ignore_index", 255),  # type: ignore[arg-type]
        )


def voc_colormap(n: int) -> tuple[Color, ...]:
    """Return VOC's first `n` colors: the bits of an id, dealt in turn to red, green and blue.

    Source: VOCdevkit, VOClabelcolormap.m.
    """
    return tuple((_spread(i), _spread(i >> 1), _spread(i >> 2)) for i in range(n))


def _spread(bits: int) -> int:
    """Return every third bit of `bits`, reversed into a byte: bit 0 -> 128, bit 3 -> 64."""
    return sum(((bits >> (3 * j)) & 1) << (7 - j) for j in range(8))


def from_json(text: str) -> Classes:
    """Return the classes in a JSON text. Raises ValueError or TypeError naming what to change."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"classes are not JSON: {error}") from None
    if not isinstance(values, dict):
        raise TypeError(f'classes are a JSON {type(values).__name__}; give {{"names": [...]}}')
    return Classes.from_dict(values)


def get_classes(name: str) -> Classes:
    """Return the classes called `name` (voc, cityscapes, camvid; any case) or given as JSON text.

    Raises ValueError if the name is unknown.
    """
    if name.lstrip().startswith("{"):
        return from_json(name)
    try:
        return KNOWN_CLASSES[name.lower()]
    except KeyError:
        known = ", ".join(KNOWN_CLASSES)
        raise ValueError(
            f'classes {name!r}: must be {known}, or JSON text {{"names": [...]}}'
        ) from None


def _sequence(value: object, what: str) -> Sequence[object]:
    if isinstance(value, list | tuple):
        return value
    raise TypeError(f"{what} of the classes is {value!r:.80}; it must be a list")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_names(names: Sequence[str]) -> None:
    if not 1 <= len(names) <= 255:
        raise ValueError(f"there are {len(names)} class names; an 8-bit mask holds 1 to 255")
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"names[{i}] is {name!r:.80}; it must be a string")
        if not name.strip():
            raise ValueError(f"names[{i}] is {name!r}; every class needs a name")
        # names are printed to terminals; joiners are part of words in some languages and of emoji
        if not re.sub("[\u200c\u200d]", "", name).isprintable():
            raise ValueError(
                f"names[{i}] is {name!r:.80}; a name must not contain control characters"
            )
        if name in first:
            raise ValueError(f"classes {first[name]} and {i} are both called {name!r}")
        first[name] = i


def _check_palette(palette: Sequence[Color], num_classes: int) -> None:
    if len(palette) != num_classes:
        raise ValueError(
            f"the palette has {len(palette)} colors, but there are {num_classes} names"
        )
    for i, color in enumerate(palette):
        if not (len(color) == 3 and all(_is_int(c) and 0 <= c <= 255 for c in color)):
            raise ValueError(f"palette[{i}] is {color!r:.80}; give red, green, blue from 0 to 255")


def _check_ignore_index(ignore_index: int, num_classes: int) -> None:
    if not _is_int(ignore_index):
        raise TypeError(f"ignore_index is {ignore_index!r:.80}; it must be an integer")
    if not 0 <= ignore_index <= 255:
        raise ValueError(f"ignore_index is {ignore_index}; an 8-bit label holds 0 to 255")
    if ignore_index < num_classes:
        raise ValueError(
            f"ignore_index {ignore_index} is a class; use {num_classes} to 255 "
            f"with {num_classes} classes"
        )


VOC = Classes(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    palette=voc_colormap(21),
)

# label id, name, color; in order of train ids. Source: cityscapesScripts, labels.py.
_CITYSCAPES: tuple[tuple[int, str, Color], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)

CITYSCAPES = Classes(
    names=tuple(name for _, name, _ in _CITYSCAPES),
    palette=tuple(color for _, _, color in _CITYSCAPES),
)


def _cityscapes_train_ids() -> np.ndarray:
    table = np.full(256, CITYSCAPES.ignore_index, dtype=np.uint8)
    for train_id, (label_id, _, _) in enumerate(_CITYSCAPES):
        table[label_id] = train_id
    table.setflags(write=False)
    return table


# (256,) uint8: `CITYSCAPES_TRAIN_IDS[label]` maps label ids to train ids; all other values (such
# as the license plate's -1, stored as 255) become 255, ignored
CITYSCAPES_TRAIN_IDS = _cityscapes_train_ids()

# name, color. Source: SegNet's eleven of CamVid's 32 classes, in CamVid's colors.
_CAMVID: tuple[tuple[str, Color], ...] = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (0, 0, 192)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)

CAMVID = Classes(
    names=tuple(name for name, _ in _CAMVID),
    palette=tuple(color for _, color in _CAMVID),
    ignore_index=11,  # its label files use 11, not 255, for unlabeled pixels
)

KNOWN_CLASSES = {"voc": VOC, "cityscapes": CITYSCAPES, "camvid": CAMVID}
