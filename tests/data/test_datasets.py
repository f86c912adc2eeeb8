"""Every layout gives its pairs in a fixed order, and missing files are reported at once."""

import io
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import storage
from pipeline.data.datasets import open_split
from pipeline.data.labels import CAMVID, CITYSCAPES, CITYSCAPES_TRAIN_IDS, VOC, Classes
from pipeline.data.pairs import Pair
from tests.data.tiny_datasets import (
    cityscapes_files,
    encode,
    folder_files,
    ids,
    image_file,
    put_all,
    voc_files,
)

CLASSES = Classes.from_dict({"names": ["ground", "cat", "dog"]})


def opened(prefix, split, layout="voc", classes=CLASSES):
    return open_split(prefix, split, layout=layout, classes=classes)


def names(split):
    return [storage.relative(split.root, pair.image) for pair in split.pairs]


def label_names(split):
    return [storage.relative(split.root, pair.label) for pair in split.pairs]


def test_voc_keeps_the_order_of_its_list_and_a_sum_has_each_image_once(prefix):
    put_all(prefix, voc_files(train=(5, 2), trainaug=(9, 2, 5), val=(1,)))
    assert names(opened(prefix, "trainaug")) == [f"JPEGImages/000{i}.jpg" for i in (9, 2, 5)]
    summed = opened(prefix, "train + trainaug+val")
    assert names(summed) == [f"JPEGImages/000{i}.jpg" for i in (5, 2, 9, 1)]
    assert label_names(summed) == [f"SegmentationClass/000{i}.png" for i in (5, 2, 9, 1)]
    assert summed.lookup is None


def test_voc_uses_augmented_labels_only_for_missing_official_ones(prefix):
    files = voc_files(trainaug=(0, 1))
    del files["SegmentationClass/0001.png"]
    files |= {f"SegmentationClassAug/000{i}.png": encode(ids(i)) for i in (0, 1)}
    put_all(prefix, files)
    assert label_names(opened(prefix, "trainaug")) == [
        *("SegmentationClass/0000.png", "SegmentationClassAug/0001.png"),
    ]


@pytest.mark.parametrize("layout", ["camvid", "folders"])
def test_folders_are_matched_and_ordered_by_path(prefix, layout):
    beside = {"train/images/.DS_Store": "x", "train/labels/notes.txt": "y"}
    put_all(prefix, folder_files(train=(3, 2, 0), val=(1,)) | beside)
    split = opened(prefix, "train", layout)
    assert names(split) == [f"train/images/{key}.jpg" for key in ("0/0000", "0/0002", "1/0003")]
    assert label_names(split)[0] == "train/labels/0/0000.png"
    assert names(opened(prefix, "train+val", layout))[3:] == ["val/images/1/0001.jpg"]


def test_cityscapes_train_ids_are_read_without_a_lookup(prefix):
    put_all(prefix, cityscapes_files("labelIds", "labelTrainIds"))
    split = opened(prefix, "train", "cityscapes", CITYSCAPES)
    assert [name.split("/", 2)[2] for name in names(split)] == [
        "aachen/aachen_000001_000019_leftImg8bit.png",
        *(f"ulm/ulm_00000{i}_000019_leftImg8bit.png" for i in (0, 2)),
    ]
    name = "gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png"
    assert label_names(split)[0] == name
    assert split.lookup is None


def test_cityscapes_label_ids_come_with_a_lookup_to_train_ids(prefix):
    both = cityscapes_files("labelIds", "labelTrainIds", split="train")
    put_all(prefix, both | cityscapes_files("labelIds", split="val"))
    for name in ("val", "train+val"):  # all splits of a sum use the same files
        split = opened(prefix, name, "cityscapes", CITYSCAPES)
        assert all(label.endswith("_gtFine_labelIds.png") for label in label_names(split))
        np.testing.assert_array_equal(split.lookup, CITYSCAPES_TRAIN_IDS)


def as_parquet(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def as_csv(columns):
    rows = zip(*columns.values(), strict=True)
    return "\n".join([",".join(columns), *(",".join(row) for row in rows)])


@pytest.mark.parametrize(("name", "form"), [("t.parquet", as_parquet), ("t.CSV", as_csv)])
def test_a_table_lists_files_relative_to_itself_or_by_uri(prefix, name, form):
    files = {f"data/pictures/{i}": image_file(i) for i in range(3)}
    files |= {f"data/masks/{i}.png": encode(ids(i)) for i in range(3)}
    columns = {
        "split": ["train", "val", "train"],
        "label": ["../data/masks/2.png", "../data/masks/1.png", "../data/masks/0.png"],
        "image": ["../data/pictures/2", "../data/pictures/1", f"{prefix}/data/pictures/0"],
    }
    put_all(prefix, {**files, f"tables/{name}": form(columns)})
    split = opened(f"{prefix}/tables/{name}", "train", "table")
    assert split.pairs == tuple(
        Pair(f"{prefix}/data/pictures/{i}", f"{prefix}/data/masks/{i}.png") for i in (2, 0)
    )
    assert len(opened(f"{prefix}/tables/{name}", "val+train", "table")) == 3


def test_numeric_names_in_a_csv_stay_text(tmp_path):
    put_all(str(tmp_path), {"0001": image_file(1), "0002": encode(ids(1))})
    put_all(str(tmp_path), {"t.csv": "image,label\n0001,0002\n"})
    split = opened(f"{tmp_path}/t.csv", "all", "table")
    assert split.pairs == (Pair(f"{tmp_path}/0001", f"{tmp_path}/0002"),)


def test_listed_etags_and_sizes_match_a_conditional_read(prefix):
    put_all(prefix, voc_files(train=(0, 1)))
    split = opened(prefix, "train")
    assert len(split.objects) == 4
    for uri, item in split.objects.items():
        assert len(storage.read(uri, item.etag)) == item.size


def test_each_folder_is_listed_once_and_no_file_is_requested(tmp_path, monkeypatch):
    put_all(str(tmp_path), voc_files(train=(0, 1), val=(2,)))
    listed, calls = storage.list_objects, Counter()
    monkeypatch.setattr(
        storage, "list_objects", lambda prefix: (calls.update([prefix]), listed(prefix))[1]
    )
    monkeypatch.setattr(storage, "stat_object", None)
    monkeypatch.setattr("os.path.exists", None)
    opened(str(tmp_path), "train+val")
    assert calls == {f"{tmp_path}/JPEGImages": 1, f"{tmp_path}/SegmentationClass": 1}


def test_the_fingerprint_depends_on_files_their_versions_and_classes(prefix):
    put_all(prefix, voc_files(train=(0, 1), val=(1,)))
    first = opened(prefix, "train")
    assert first.fingerprint == opened(prefix, "train").fingerprint
    others = [opened(prefix, "val"), opened(prefix, "train", classes=VOC)]
    put_all(prefix, {"SegmentationClass/0001.png": encode(ids(4)[:, ::-1].copy())})
    others.append(opened(prefix, "train"))
    assert len({split.fingerprint for split in (first, *others)}) == 4


def test_a_split_can_be_pickled(tmp_path):
    put_all(str(tmp_path), cityscapes_files("labelIds"))
    split = opened(str(tmp_path), "train", "cityscapes", CITYSCAPES)
    again = pickle.loads(pickle.dumps(split))
    assert again == split
    np.testing.assert_array_equal(again.lookup, split.lookup)


def table_files(text):
    return {"a.jpg": image_file(0), "b.png": encode(ids(0)), "t.csv": text}


WITHOUT_IMAGE = {
    key: data for key, data in voc_files(val=(1, 2)).items() if key != "JPEGImages/0002.jpg"
}
WITHOUT_LABEL = {
    key: data for key, data in voc_files(val=(1, 2)).items() if key != "SegmentationClass/0001.png"
}
UNLABELED = {
    key: data for key, data in folder_files(val=range(4)).items() if "/labels/1/" not in key
}
UNUSED = {key: data for key, data in folder_files(val=range(4)).items() if "/images/1" not in key}
CITY = {"classes": CITYSCAPES, "layout": "cityscapes"}
TWO = {"layout": "folders"}
TABLE = {"root": "t.csv", "layout": "table"}


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        (voc_files(val=(1,), train=(2,)), {"split": "tra"}, r"'tra' is not in .* train, val"),
        (voc_files(val=(1,)), {"split": "val+"}, r"'val\+': must be a name, or names joined"),
        (voc_files(val=()), {}, r"'val': .*val\.txt: the split names no image"),
        (WITHOUT_IMAGE, {}, r"1 of 2 images listed in val.txt .* JPEGImages .* first is 0002;"),
        (WITHOUT_LABEL, {}, r"1 of 2 labels listed in val.txt .* first is 0001; add"),
        (voc_files(val=(1,)), TWO, r"not of layout folders.* looks like layout voc"),
        (voc_files(val=(1,)), CITY, r"not of layout cityscapes.* looks like layout voc"),
        (voc_files(val=(1,)), {"layout": "table"}, r"layout table.* looks like layout voc"),
        (voc_files(val=(1,)), {"layout": "coco"}, r"layout 'coco': must be voc, cityscapes"),
        (
            folder_files(val=(1,)),
            {},
            r"not of layout voc: it has no ImageSets.* like layout folders",
        ),
        (cityscapes_files("labelIds"), {}, r"not of layout voc.* looks like layout cityscapes"),
        (table_files("image,label\n"), {"root": "t.csv"}, r"looks like layout table"),
        ({"x/y.txt": "z"}, {}, r"not of layout voc.* first object there is x/y.txt"),
        ({"up/val/images/a.jpg": "z"}, TWO, r"not of layout folders.* is up/val/images/a\.jpg"),
        ({}, TWO, r"not of layout folders.*nothing is there: check the path"),
        (folder_files(val=(1,), train=(2,)), TWO | {"split": "v"}, r"'v' is not .* train, val"),
        (
            {"val/images/a.pdf": "z"},
            TWO,
            r"'val' of .* is empty: it has no val/images/\* .* \.jpg,",
        ),
        (UNLABELED, TWO, r"2 of 4 images have no label in .*/val/labels, .*1/0001\.jpg; add"),
        (UNUSED, TWO, r"2 of 4 labels have no image in .*/val/images, .*1/0001\.png; add"),
        (
            folder_files(val=(1,)) | {"val/labels/1/0001.gif": "z"},
            TWO,
            r"1/0001\.gif' and .*1/0001\.png' have the same path",
        ),
        (cityscapes_files("labelIds"), CITY, r"'val' is not in .*; choose from train"),
        (cityscapes_files(split="val"), CITY, r"3 of 3 images have no label in .*_labelIds\.png"),
        (
            cityscapes_files("labelIds", split="val"),
            {"layout": "cityscapes", "classes": CAMVID},
            r"19 classes and ignore_index 255, but .* have 11 and 11; use classes cityscapes",
        ),
        ({}, TABLE, r"t\.csv does not exist; give"),
        (table_files("\0\x01"), TABLE, r"t\.csv (cannot be read|must have one column)"),
        (
            table_files("image,labels\na.jpg,b.png"),
            TABLE,
            r"must have one column 'label', but has .*'labels'",
        ),
        (table_files("image,label\n"), TABLE, r"has no rows; add"),
        (table_files("image,label\na.jpg,b.png"), TABLE, r"'val' is not in .*; choose from all"),
        (table_files("image,label,split\na.jpg,,val"), TABLE, r"row 1 .* has no label; fill"),
        (
            table_files("image,label,split\na.jpg,b.png,val\nb.png,c.png,val"),
            TABLE,
            r"1 of 3 files listed in .*t\.csv do not exist, the first is .*c\.png; add",
        ),
        (
            table_files("image,label,split\na.jpg,b.png,val\n./a.jpg,b.png,val"),
            TABLE,
            r"rows 1 and 2 of .* both list .*a\.jpg; keep one",
        ),
    ],
)
def test_errors_are_one_line_with_a_way_out(tmp_path, files, arguments, message):
    put_all(str(tmp_path), files)
    arguments = {"split": "val", "layout": "voc", "classes": CLASSES} | arguments
    root = f"{tmp_path}/{arguments.pop('root', '')}"
    with pytest.raises(ValueError, match=message) as caught:
        open_split(root, arguments.pop("split"), **arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_of_a_bucket_names_the_known_ones(s3_prefix):
    put_all(s3_prefix, voc_files(train=(0,)))
    with pytest.raises(ValueError, match=f"'val' is not in {s3_prefix}; choose from train"):
        opened(s3_prefix, "val")
    with pytest.raises(ValueError, match="looks like layout voc"):
        opened(s3_prefix, "train", "camvid")
