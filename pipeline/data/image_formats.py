"""Families of image formats, and a version of the decoding of each.

`--only-new` compares an image's version with the one it was processed with, so an upgrade that
reads a format for the first time, or decodes it to other pixels, makes only its images new again.
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
"""Family -> file name extensions, in lower case. The name decides, not the bytes."""

VERSIONS: Mapping[str, int] = MappingProxyType({})
"""Family -> version; 0 for missing families, and for names without a family.

Increase it when more images of the family become readable, or when their pixels change. A family
added later starts at 1: with --include, its images may have been errors before.
"""


def version_of(uri: str) -> int:
    """Return the version of the format family of a name."""
    if not VERSIONS:  # fast path: called for millions of names
        return 0
    name = uri.lower()
    for family, version in VERSIONS.items():
        if name.endswith(FAMILIES[family]):
            return version
    return 0
