"""Loading a pair gives an image and its label, or one error that names the file."""

import pickle

import numpy as np
import pytest

from pipeline.data import storage
from pipeline.data.datasets import open_split
from pipeline.data.labels import CITYSCAPES, VOC
from pipeline.data.samples import BrokenFileError, SampleError, load
from tests.data.tiny_datasets import cityscapes_files, encode, ids, image_file, put_all, voc_files


def voc(prefix, **replaced):
    files = voc_files(val=(0,))
    for folder, data in replaced.items():
        name = "JPEGImages/0000.jpg" if folder == "image" else "SegmentationClass/0000.png"
        files[name] = data
    put_all(prefix, files)
    return open_split(prefix, "val", layout="voc", classes=VOC)


def test_an_image_is_loaded_with_its_label(prefix):
    split = voc(prefix, image=image_file(0, "PNG"))
    image, label = load(split.pairs[0], split, storage.read)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(label, ids(0))
    assert (image.dtype, label.dtype) == (np.uint8, np.uint8)


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    files = cityscapes_files("labelIds", numbers=(0,))
    # road, car, license plate, out of roi; the last row in reverse order
    raw = np.array([[7, 26, 255, 3]] * 4 + [[3, 255, 26, 7]], dtype=np.uint8)
    files = {
        key: encode(raw) if "labelIds" in key else data
        for key, data in files.items()
        if not key.endswith("leftImg8bit.png")
    } | {
        "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png": encode(
            np.zeros((5, 4, 3), dtype=np.uint8)
        )
    }
    put_all(str(tmp_path), files)
    split = open_split(str(tmp_path), "train", layout="cityscapes", classes=CITYSCAPES)
    _, label = load(split.pairs[0], split, storage.read)
    assert label.tolist() == [[0, 13, 255, 255]] * 4 + [[255, 255, 13, 0]]


BAD = np.full((5, 7), 37, dtype=np.uint8)


@pytest.mark.parametrize(
    ("replaced", "name", "message"),
    [
        ({"label": encode(BAD)}, "0000.png", "class 37, but num_classes is 21; is ignore_index"),
        ({"label": encode(ids(1))}, "0000.png", r"9 x 4, but its image is 5 x 7 .*; replace the"),
        (
            {"label": image_file(0, "PNG")},
            "0000.png",
            "color .* is not a class; save it as class ids",
        ),
        ({"label": b"no"}, "0000.png", "label cannot be read as PNG.*; replace the file"),
        ({"image": image_file(0)[:-40]}, "0000.jpg", r"cannot be read \(truncated\): .*; replace"),
        ({"image": b""}, "0000.jpg", r"cannot be read \(empty\): .*; replace the file"),
    ],
)
def test_a_bad_file_is_named_in_the_error_with_a_way_out(tmp_path, replaced, name, message):
    split = voc(str(tmp_path), **replaced)
    with pytest.raises(SampleError, match=f"{name}: .*{message}") as caught:
        load(split.pairs[0], split, storage.read)
    assert caught.value.uri.endswith(name)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.uri) == (
        *(BrokenFileError, str(caught.value), caught.value.uri),
    )
    assert "\n" not in str(again)


def test_an_rgb_label_in_palette_colors_is_read(tmp_path):
    colors = np.array(VOC.palette, dtype=np.uint8)[ids(0, 3, ignore_index=15)]
    split = voc(str(tmp_path), label=encode(colors))
    np.testing.assert_array_equal(
        load(split.pairs[0], split, storage.read)[1], ids(0, 3, ignore_index=15)
    )


def test_a_vanished_or_changed_object_is_named_in_the_error(prefix):
    split = voc(prefix)
    pair = split.pairs[0]

    def read(uri):
        return storage.read(uri, split.objects[uri].etag)

    put_all(prefix, {"SegmentationClass/0000.png": encode(ids(3))})
    with pytest.raises(
        SampleError, match=r"0000\.png: was replaced after it was listed; .*start over"
    ):
        load(pair, split, read)
    storage.delete([pair.image])
    with pytest.raises(SampleError, match=r"0000\.jpg: does not exist; it existed .* restore"):
        load(pair, split, read)
