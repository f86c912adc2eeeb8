"""The version of an image's format follows from its name alone."""

from __future__ import annotations

import pytest

from pipeline.bulk.settings import IMAGE_PATTERNS
from pipeline.data import image_formats
from pipeline.data.image_formats import FAMILIES, version_of


@pytest.mark.parametrize(
    ("uri", "version"),
    [
        ("s3://b/x.jpg", 2),
        ("s3://b/x.jpeg", 2),
        ("s3://b/X.JPG", 2),
        ("/folder.png/x.jpg", 2),
        ("s3://b/x.tif", 7),
        ("s3://b/x.TIFF", 7),
        ("s3://b/x.png", 0),
        ("s3://b/x.jpg.png", 0),
        ("s3://b/xjpg", 0),
        ("s3://b/x.jpg/", 0),
        ("s3://b/x", 0),
    ],
)
def test_the_version_is_that_of_the_names_ending(
    monkeypatch: pytest.MonkeyPatch, uri: str, version: int
) -> None:
    assert version_of(uri) == 0
    monkeypatch.setattr(image_formats, "VERSIONS", {"jpeg": 2, "tiff": 7})
    assert version_of(uri) == version


def test_each_ending_belongs_to_one_family() -> None:
    endings = [ending for family in FAMILIES.values() for ending in family]
    assert len(endings) == len(set(endings))
    assert {pattern.removeprefix("*") for pattern in IMAGE_PATTERNS} <= set(endings)
