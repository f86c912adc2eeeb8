"""A survey agrees with counting pixels one by one, and stops at the first bad file."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images, storage
from pipeline.data.datasets import open_split
from pipeline.data.labels import CAMVID, Classes
from pipeline.data.samples import SampleError, load
from pipeline.data.survey import Survey, median_frequency_weights, repeat_positions, survey_split
from tests.data.tiny_datasets import SIZES, encode, ids, image_file, put_all, voc_files

CLASSES = Classes.from_dict({"names": ["ground", "cat", "dog", "unicorn"]})


def voc(prefix, count=6, replaced=None):
    put_all(prefix, voc_files(val=range(count)) | (replaced or {}))
    return open_split(prefix, "val", layout="voc", classes=CLASSES)


def made_up(pixels, image_pixels, holds):
    return Survey(
        fingerprint="",
        pixels=np.array(pixels, dtype=np.int64),
        image_pixels=np.array(image_pixels, dtype=np.int64),
        ignored=0,
        holds=np.array(holds, dtype=np.bool_),
    )


def test_counts_agree_with_counting_pixels_one_by_one(prefix):
    found = survey_split(voc(prefix), storage.read)
    pixels, image_pixels = Counter(), Counter()
    for number in range(6):
        values = Counter(value for row in ids(number).tolist() for value in row)
        pixels += values
        labeled = sum(count for value, count in values.items() if value != 255)
        image_pixels += dict.fromkeys(values, labeled)
        assert set(np.flatnonzero(found.holds[number])) == set(values) - {255}
    assert found.pixels.tolist() == [pixels[i] for i in range(4)]
    assert found.image_pixels.tolist() == [image_pixels[i] for i in range(4)]
    assert found.ignored == pixels[255]
    assert found.pixels.dtype == np.int64


def test_ignored_pixels_are_counted_by_their_own_value(tmp_path):
    label = np.array([[0, 11, 11], [10, 10, 11]], dtype=np.uint8)
    blank = np.zeros((2, 3, 3), np.uint8)
    put_all(str(tmp_path), {"val/images/a.png": encode(blank), "val/labels/a.png": encode(label)})
    split = open_split(str(tmp_path), "val", layout="camvid", classes=CAMVID)
    found = survey_split(split, storage.read)
    assert (found.ignored, found.pixels[0], found.pixels[10]) == (3, 1, 2)


def test_progress_is_reported_after_every_image(tmp_path):
    told = []
    survey_split(voc(str(tmp_path), 70), storage.read, progress=told.append)
    assert told == list(range(1, 71))


def test_a_survey_survives_json_also_of_older_versions(tmp_path):
    split = voc(str(tmp_path))
    found = survey_split(split, storage.read)
    again = Survey.from_json(found.to_json())
    for name in ("pixels", "image_pixels", "holds"):
        one, other = getattr(found, name), getattr(again, name)
        assert (one.dtype, one.tolist()) == (other.dtype, other.tolist())
    assert (again.ignored, again.fingerprint) == (found.ignored, split.fingerprint)
    assert (again.images_sha256, again.labels_sha256) == (found.images_sha256, found.labels_sha256)
    keys = ("fingerprint", "pixels", "photo_pixels", "ignored", "holds")
    stored = json.loads(found.to_json())
    # stored names: hashed by the run's identity, so neither names nor order may change
    assert tuple(stored) == (*keys, "photos_sha256", "labels_sha256")
    older = {k: v for k, v in stored.items() if not k.endswith("_sha256")}
    assert Survey.from_json(json.dumps(older)).labels_sha256 == ""


def test_digests_are_equal_for_a_copy_and_differ_for_other_bytes(tmp_path):
    def digests(name, replaced=None):
        found = survey_split(voc(str(tmp_path / name), replaced=replaced), storage.read)
        return found.images_sha256, found.labels_sha256

    first, labels = digests("first")
    assert digests("copy") == (first, labels)
    other = image_file(3)[:-3] + bytes([image_file(3)[-3] ^ 1]) + image_file(3)[-2:]
    found = digests("image", {"JPEGImages/0003.jpg": other})
    assert (found[0] != first, found[1]) == (True, labels)
    mirrored = digests("label", {"SegmentationClass/0003.png": encode(ids(3)[:, ::-1].copy())})
    assert (mirrored[0], mirrored[1] != labels) == (first, True)


def test_the_first_bad_file_in_split_order_is_raised(prefix):
    bad = np.full(SIZES[0], 37, dtype=np.uint8)
    name = "SegmentationClass/0003.png"
    split = voc(prefix, replaced={name: encode(bad), "SegmentationClass/0005.png": b""})
    with pytest.raises(SampleError, match=r"0003\.png: label holds class 37, .*num_classes is 4"):
        survey_split(split, storage.read)


def rotated(form, orientation):
    """Return a 9 x 4 image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_file(1, form, exif=exif)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_checked_after_exif_orientation(tmp_path, form, orientation):
    data = rotated(form, orientation)
    height, width, _ = images.decode(data).shape
    label = np.zeros((height, width), np.uint8)
    ending = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    for number, shape in enumerate([(height, width), (width, height)]):
        root = str(tmp_path / str(number))
        label = np.zeros(shape, np.uint8)
        put_all(root, {f"val/images/a.{ending}": data, "val/labels/a.png": encode(label)})
        split = open_split(root, "val", layout="folders", classes=CLASSES)
        if shape == (height, width):
            assert survey_split(split, storage.read).pixels[0] == 36
            assert load(split.pairs[0], split, storage.read)[0].shape == (*shape, 3)
        else:
            for check in (survey_split, lambda split, read: load(split.pairs[0], split, read)):
                with pytest.raises(SampleError, match=r"label is .*, but its image is"):
                    check(split, storage.read)


def test_the_pixels_of_jpeg_and_png_images_are_not_decoded(tmp_path, monkeypatch):
    split = voc(str(tmp_path), replaced={"JPEGImages/0001.jpg": image_file(1, "PNG")})
    monkeypatch.setattr(images, "decode", None)
    survey_split(split, storage.read)


@pytest.mark.parametrize(
    ("data", "message"), [(b"", r"\(empty\)"), (b"hello hello", r"\(not_an_image\)")]
)
def test_an_image_without_a_header_is_named_in_the_error(tmp_path, data, message):
    split = voc(str(tmp_path), replaced={"JPEGImages/0002.jpg": data})
    with pytest.raises(SampleError, match=rf"0002\.jpg: image cannot be read {message}.*replace"):
        survey_split(split, storage.read)


def test_a_deleted_object_is_named_in_the_error(prefix):
    split = voc(prefix)
    storage.delete([split.pairs[4].label])
    with pytest.raises(SampleError, match=r"0004\.png: does not exist; it existed"):
        survey_split(split, storage.read)


def test_class_weights_are_median_frequency_over_frequency():
    # frequencies 60/100, 30/60, 5/50 and none: the median of the three is 1/2
    found = made_up([60, 30, 5, 0], [100, 60, 50, 0], np.zeros((1, 4)))
    assert median_frequency_weights(found) == pytest.approx([0.5 / 0.6, 1, 5, 1])
    none = made_up([0, 0], [0, 0], np.zeros((1, 2)))
    assert median_frequency_weights(none).tolist() == [1, 1]


def test_images_with_a_named_class_are_repeated():
    holds = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]]
    found = made_up([1] * 3, [1] * 3, holds)
    classes = Classes.from_dict({"names": ["a", "b", "c"]})
    assert repeat_positions(found, classes, (), 2) == [0, 1, 2, 3]
    assert repeat_positions(found, classes, ("b",), 1) == [0, 1, 2, 3]
    assert repeat_positions(found, classes, ("b",), 2) == [0, 1, 2, 3, 1, 3]
    # an image with both classes is repeated as often as one with a single class
    assert Counter(repeat_positions(found, classes, ("b", "c"), 3)) == {0: 1, 1: 3, 2: 3, 3: 3}


def test_an_unknown_repeat_class_is_refused_with_the_known_ones():
    found = made_up([1] * 4, [1] * 4, np.ones((2, 4)))
    with pytest.raises(ValueError, match="'cow': not a class; choose from ground, cat, dog"):
        repeat_positions(found, CLASSES, ("cat", "cow"), 2)
    with pytest.raises(ValueError, match="repeats 0: must be at least 1"):
        repeat_positions(found, CLASSES, ("cat",), 0)
