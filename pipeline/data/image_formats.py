"""Families of image formats, and versions of what this pipeline reads of each.

What is done of an image depends on its family's version (`--only-new`), so that an upgrade which
reads a format for the first time, or gives other pixels for it, makes only its images new again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "jpeg": (".jpg", ".jpeg"),
        "png": (".png",),
        "webp": (".webp",),
        "bmp": (".bmp",),
        "gif": (".gif",),
        "tiff": (".tif", ".tiff"),
    }
)
"""Family -> endings of names, in lower case. The name decides, whatever format the bytes have."""

VERSIONS: Mapping[str, int] = MappingProxyType({})
"""Family -> version; 0 for those that are missing, and for names of no family.

Raise it when images of the family become readable that were not, or get other pixels. A family
that is added later begins at 1: with --include its images may have been errors before.
"""


def version_of(uri: str) -> int:
    """The version of the family that the name belongs to."""
    if not VERSIONS:  # names are asked by the million
        return 0
    name = uri.lower()
    for family, version in VERSIONS.items():
        if name.endswith(FAMILIES[family]):
            return version
    return 0
