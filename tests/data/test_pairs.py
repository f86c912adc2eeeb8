"""Pairs: which label belongs to which image, and that no name can mean two."""

import pytest

from pipeline.data.pairs import Pair, index, match, stem, voc_pairs

ROOTS = {"image_root": "s3://b/photos", "label_root": "/data/labels/"}


def test_only_the_last_extension_of_the_last_segment_is_left_out():
    keys = ["a.jpg", "a/b.c.jpg", "a.d/b", "a/.hidden", "a/b.JPG", "ü x.png"]
    assert [stem(key) for key in keys] == ["a", "a/b.c", "a.d/b", "a/.hidden", "a/b", "ü x"]


def test_images_find_the_label_of_the_same_path_in_either_storage():
    found = match(["x/1.jpg", "y/1.jpeg", "2.png"], ["y/1.png", "x/1.png", "3.png"], **ROOTS)
    assert found.pairs == (
        Pair("s3://b/photos/x/1.jpg", "/data/labels/x/1.png"),
        Pair("s3://b/photos/y/1.jpeg", "/data/labels/y/1.png"),
        Pair("s3://b/photos/2.png", None),
    )
    assert found.labelled == found.pairs[:2]
    assert found.unlabelled == ("s3://b/photos/2.png",)
    assert found.unused == ("/data/labels/3.png",)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["a/1.jpg"], ["a/1.png", "a/1.tif"], r"labels/a/1\.png' and '/data/labels/a/1\.tif'"),
        (["a/1.jpg", "a/1.JPG"], [], r"photos/a/1\.jpg' and 's3://b/photos/a/1\.JPG'"),
    ],
)
def test_two_files_that_could_be_meant_are_both_named(images, labels, message):
    with pytest.raises(ValueError, match=message):
        match(images, labels, **ROOTS)


def test_the_same_name_in_another_folder_is_another_name():
    assert match(["a/1.jpg", "b/1.jpg", "A/1.jpg"], [], **ROOTS).unlabelled == (
        *("s3://b/photos/a/1.jpg", "s3://b/photos/b/1.jpg", "s3://b/photos/A/1.jpg"),
    )


def test_an_index_keeps_what_it_is_given_from_a_stream():
    stream = ((f"{i}.png", (f"s3://b/{i}.png", f"etag{i}")) for i in range(3))
    assert index(stream)["1"] == ("s3://b/1.png", "etag1")
    with pytest.raises(ValueError, match=r"b/1\.png.*b/1\.gif"):
        index([("1.png", "b/1.png"), ("1.gif", "b/1.gif")])


def test_a_voc_split_names_its_pairs_in_order():
    assert voc_pairs("\ufeff2007_000033\r\n\r\n2007_000027 \n", "s3://b/voc") == [
        Pair(
            "s3://b/voc/JPEGImages/2007_000033.jpg", "s3://b/voc/SegmentationClass/2007_000033.png"
        ),
        Pair(
            "s3://b/voc/JPEGImages/2007_000027.jpg", "s3://b/voc/SegmentationClass/2007_000027.png"
        ),
    ]
    assert voc_pairs("1", "/voc/", labels="SegmentationClassAug") == [
        Pair("/voc/JPEGImages/1.jpg", "/voc/SegmentationClassAug/1.png")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n\n", "names no image"),
        ("a\nb\na\n", "'a' is on lines 1 and 3"),
        ("a\n/JPEGImages/b.jpg /SegmentationClass/b.png", "line 2 .* must be one name"),
    ],
)
def test_a_split_that_is_not_understood_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        voc_pairs(text, "/voc")
