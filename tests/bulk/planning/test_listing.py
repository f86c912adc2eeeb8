"""Listings: every image once, with its label, without results and other objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.bulk.planning.listing import ImageRef, Listing
from pipeline.bulk.settings import BulkSettings
from pipeline.data import storage

SettingsFor = Callable[..., BulkSettings]
ListedBy = Callable[..., list[ImageRef]]

ODD_NAMES = [
    *("a b.jpg", 'it\'s "so".jpg', "[x]*?.jpg", "%2e%2F.jpg", "é.jpg", "e\u0301.jpg", "猫.jpg"),
    *("a+b&c=d.jpg", "#1.jpg", "$model.jpg", "{}.jpg", "x.tar.jpg", "-.jpg"),
    *("a/b/c/d.jpg", "a/b.jpg", "a.b/c.jpg", ".hidden.jpg", "\U0001f431.jpg", "Z.jpg", "~.JPG"),
]


def _put(prefix: str, *names: str) -> None:
    for name in names:
        storage.write(f"{prefix}/{name}", b"x")


def test_odd_names_are_listed_once_in_byte_order(
    prefix: str, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{prefix}/images", *ODD_NAMES)
    _put(f"{prefix}/labels", *(f"{name[:-4]}.png" for name in ODD_NAMES))
    found = listed(settings_for(prefix))
    names = sorted(ODD_NAMES, key=lambda name: name.encode())
    assert [image.uri for image in found] == [f"{prefix}/images/{name}" for name in names]
    assert [image.label_uri for image in found] == [
        f"{prefix}/labels/{name[:-4]}.png" for name in names
    ]
    for image in found:  # every listed object can be read
        assert storage.read(image.uri, image.etag) == b"x"
        assert storage.read(str(image.label_uri), image.label_etag) == b"x"


def test_names_with_line_breaks_and_backslashes_are_listed_too(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{tmp_path}/images", "two\nlines.jpg", "back\\slash.jpg", "\x7f.jpg")
    found = [image.uri for image in listed(settings_for(str(tmp_path)))]
    assert len(found) == 3
    assert f"{tmp_path}/images/two\nlines.jpg" in found


def test_labels_match_by_relative_path_without_extension(
    prefix: str, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{prefix}/images", "1.jpg", "a/1.jpg", "a/2.PNG", "b.c/3.jpeg", "4.d.jpg", "5.jpg")
    _put(
        f"{prefix}/labels", "a/1.png", "a/2.tif", "b.c/3.png", "4.d.PNG", "4.png", "5.txt", "6.png"
    )
    found = listed(settings_for(prefix))
    matched = {
        storage.relative(f"{prefix}/images", image.uri): image.label_uri
        and storage.relative(f"{prefix}/labels", image.label_uri)
        for image in found
    }
    assert matched == {
        "1.jpg": None,
        "a/1.jpg": "a/1.png",
        "a/2.PNG": "a/2.tif",
        "b.c/3.jpeg": "b.c/3.png",
        "4.d.jpg": "4.d.PNG",
        "5.jpg": None,
    }
    assert all((image.label_uri is None) == (image.label_etag is None) for image in found)


@pytest.mark.parametrize(
    ("images", "labels"),
    [(["a/1.jpg"], ["a/1.png", "a/1.tif"]), (["a/1.jpg", "a/1.png"], ["a/1.png"])],
)
def test_ambiguous_labels_and_images_are_refused_naming_both(
    tmp_path: Path,
    settings_for: SettingsFor,
    listed: ListedBy,
    images: list[str],
    labels: list[str],
) -> None:
    _put(f"{tmp_path}/images", *images)
    _put(f"{tmp_path}/labels", *labels)
    ambiguous = [f"labels/{name}" for name in labels] if len(labels) > 1 else images
    with pytest.raises(ValueError, match="differ only in their extension") as refused:
        listed(settings_for(str(tmp_path)))
    assert all(name in str(refused.value) for name in ambiguous)


def test_images_may_share_a_stem_if_they_share_no_label(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{tmp_path}/images", "1.jpg", "1.png", "2.jpg")
    _put(f"{tmp_path}/labels", "2.png")
    assert len(listed(settings_for(str(tmp_path)))) == 3


def test_objects_that_include_leaves_out_are_counted(
    tmp_path: Path, settings_for: SettingsFor
) -> None:
    _put(f"{tmp_path}/images", "1.jpg", "2.JPG", "3.txt", "sub/4.svg", "5")
    with Listing(settings_for(str(tmp_path)), model="m", settings_print="s") as listing:
        assert len(list(listing.images())) == 2
        assert listing.left_out == 3
    everything = settings_for(str(tmp_path), include=("*",))
    with Listing(everything, model="m", settings_print="s") as listing:
        assert (len(list(listing.images())), listing.left_out) == (5, 0)


def test_labels_and_results_nested_below_the_images_are_excluded(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(str(tmp_path), "1.jpg", "labels/1.png", "labels2/2.jpg", "results/report/overlay.png")
    found = listed(settings_for(str(tmp_path), images=str(tmp_path)))
    matched = {storage.relative(str(tmp_path), image.uri): image.label_uri for image in found}
    assert matched == {"1.jpg": f"{tmp_path}/labels/1.png", "labels2/2.jpg": None}


def test_images_and_labels_may_share_a_folder(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(str(tmp_path), "1.jpg", "1.png", "2.jpg")
    both = {"images": str(tmp_path), "labels": str(tmp_path), "include": ("*.jpg",)}
    found = listed(settings_for(str(tmp_path), **both))
    assert [image.label_uri for image in found] == [f"{tmp_path}/1.png", None]


@pytest.mark.parametrize("names", [[], ["a.txt", "b.svg"]])
def test_an_empty_listing_is_refused_with_the_count_of_skipped_objects(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy, names: list[str]
) -> None:
    _put(f"{tmp_path}/images", *names)
    with pytest.raises(ValueError, match=f"{tmp_path}/images") as refused:
        listed(settings_for(str(tmp_path)))
    assert ("--include matches none of its 2" if names else "it is empty") in str(refused.value)


def test_the_limit_takes_the_first_images(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{tmp_path}/images", *(f"{i}.jpg" for i in range(20)))
    found = listed(settings_for(str(tmp_path), limit=7))
    assert [Path(image.uri).name for image in found] == sorted(f"{i}.jpg" for i in range(20))[:7]
    assert len(listed(settings_for(str(tmp_path), limit=21))) == 20


def test_a_listing_of_many_pages_arrives_complete_and_in_order(
    tmp_path: Path,
    settings_for: SettingsFor,
    listed: ListedBy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.bulk.planning.listing._SPOOL_ROWS", 777)
    names = []
    for i in range(5000):
        names.append(f"{i % 13}/{i * 7919 % 5000:x}.jpg")
        path = tmp_path / "images" / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [
        storage.relative(f"{tmp_path}/images", p.uri) for p in listed(settings_for(str(tmp_path)))
    ]
    assert found == sorted(names)


def test_a_temporary_folder_with_an_odd_name_does_not_matter(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "it's [a]*"
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    _put(f"{tmp_path}/images", "1.jpg")
    assert len(listed(settings_for(str(tmp_path)))) == 1
    assert os.listdir(odd) == []


def test_only_regular_files_are_listed(
    tmp_path: Path, settings_for: SettingsFor, listed: ListedBy
) -> None:
    _put(f"{tmp_path}/images", "1.jpg")
    os.mkfifo(tmp_path / "images" / "2.jpg")  # reading it would block forever
    (tmp_path / "images" / "3.jpg").symlink_to(tmp_path / "images" / "1.jpg")
    found: list[Any] = [Path(image.uri).name for image in listed(settings_for(str(tmp_path)))]
    assert found == ["1.jpg", "3.jpg"]


def test_images_may_be_nested_below_the_results(
    tmp_path: Path, listed: ListedBy, settings_for: SettingsFor
) -> None:
    _put(str(tmp_path), "images/1.jpg", "images/run=a/shard-000000.parquet", "leases/run=a.json")
    below = settings_for(str(tmp_path), images=f"{tmp_path}/images", results=str(tmp_path))
    every = {"include": ("*",), "labels": None}
    same = settings_for(str(tmp_path), images=str(tmp_path), results=str(tmp_path), **every)
    for settings in (below, same):
        assert [image.uri for image in listed(settings)] == [f"{tmp_path}/images/1.jpg"]
