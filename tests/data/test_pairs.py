"""Labels are matched to images by relative path, and ambiguous names are refused."""

import pytest

from pipeline.data.pairs import index_by_stem, parse_voc_split, stem


def test_stem_drops_only_the_last_extension_of_the_last_path_segment():
    keys = ["a.jpg", "a/b.c.jpg", "a.d/b", "a/.hidden", "a/b.JPG", "ü x.png"]
    assert [stem(key) for key in keys] == ["a", "a/b.c", "a.d/b", "a/.hidden", "a/b", "ü x"]


def test_index_keeps_the_values_of_a_stream():
    stream = ((f"{i}.png", (f"s3://b/{i}.png", f"etag{i}")) for i in range(3))
    assert index_by_stem(stream)["1"] == ("s3://b/1.png", "etag1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a/1.png", "a/1.tif"], r"'b/a/1\.png' and 'b/a/1\.tif' have the same path"),
        (["a/1.jpg", "a/1.JPG"], r"'b/a/1\.jpg' and 'b/a/1\.JPG' have the same path"),
    ],
)
def test_two_files_with_one_stem_are_both_named_in_the_error(keys, message):
    with pytest.raises(ValueError, match=message):
        index_by_stem((key, f"b/{key}") for key in keys)


def test_the_same_name_in_different_folders_or_cases_is_distinct():
    keys = ["a/1.jpg", "b/1.jpg", "A/1.jpg"]
    assert index_by_stem((key, key) for key in keys) == {stem(key): key for key in keys}


def test_a_voc_split_gives_its_names_in_order():
    text = "\ufeff2007_000033\r\n\r\n2007_000027 \n"
    assert parse_voc_split(text) == ["2007_000033", "2007_000027"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n\n", "names no image"),
        ("a\nb\na\n", "'a' is on lines 1 and 3"),
        ("a\n/JPEGImages/b.jpg /SegmentationClass/b.png", "line 2 .* must be one name"),
    ],
)
def test_a_malformed_voc_split_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_voc_split(text)
