"""Built-in class tables match their sources, and mistakes in custom classes are named."""

import json

import pytest

from pipeline.data.labels import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_TRAIN_IDS,
    KNOWN_CLASSES,
    VOC,
    Classes,
    from_json,
    get_classes,
    voc_colormap,
)


def test_voc_colors_are_those_of_the_development_kit():
    colors = dict(zip(VOC.names, VOC.palette, strict=True))
    assert colors["background"] == (0, 0, 0)
    assert colors["aeroplane"] == (128, 0, 0)
    assert colors["bottle"] == (128, 0, 128)
    assert colors["cat"] == (64, 0, 0)
    assert colors["person"] == (192, 128, 128)
    assert colors["tvmonitor"] == (0, 64, 128)
    assert voc_colormap(256)[255] == (224, 224, 192)


def test_the_voc_color_map_has_no_duplicates():
    assert len(set(voc_colormap(256))) == 256


def test_cityscapes_train_ids_map_nineteen_label_ids_and_ignore_the_rest():
    kept = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert [CITYSCAPES_TRAIN_IDS[i] for i in kept] == list(range(19))
    assert all(CITYSCAPES_TRAIN_IDS[i] == 255 for i in set(range(256)) - set(kept))
    assert CITYSCAPES.names[CITYSCAPES_TRAIN_IDS[26]] == "car"
    assert CITYSCAPES.palette[CITYSCAPES_TRAIN_IDS[26]] == (0, 0, 142)
    assert not CITYSCAPES_TRAIN_IDS.flags.writeable


def test_camvid_has_eleven_classes_and_ignores_the_twelfth_value():
    assert (CAMVID.num_classes, CAMVID.names[10], CAMVID.ignore_index) == (11, "Bicyclist", 11)


@pytest.mark.parametrize("classes", KNOWN_CLASSES.values(), ids=list(KNOWN_CLASSES))
def test_known_classes_survive_json(classes):
    assert from_json(json.dumps(classes.to_dict())) == classes
    assert len(set(classes.palette)) == classes.num_classes


def test_classes_are_found_by_name_in_any_case_or_given_as_json():
    assert get_classes("VOC") is VOC
    assert get_classes(' {"names": ["sky"], "ignore_index": 1}') == Classes(
        names=("sky",), palette=((0, 0, 0),), ignore_index=1
    )
    with pytest.raises(ValueError, match=r"'ade20k': must be voc, cityscapes, camvid, or JSON"):
        get_classes("ade20k")


def test_a_missing_palette_is_the_voc_color_map():
    assert from_json('{"names": ["a", "b", "c"]}').palette == VOC.palette[:3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "JSON list"),
        ("{}", "no names"),
        ('{"name": ["a"]}', "unknown key 'name'"),
        ('{"names": "abc"}', "must be a list"),
        ('{"names": []}', "0 class names"),
        ('{"names": [1]}', r"names\[0\] is 1"),
        ('{"names": ["a", " "]}', r"names\[1\] is ' '"),
        ('{"names": ["a", "b", "a"]}', "classes 0 and 2 are both called 'a'"),
        ('{"names": ["a"], "palette": []}', "0 colors, but there are 1 names"),
        ('{"names": ["a"], "palette": [[0, 0]]}', r"palette\[0\] is \(0, 0\)"),
        ('{"names": ["a"], "palette": [[0, 0, 256]]}', "0 to 255"),
        ('{"names": ["a"], "palette": [[0, 0, 0.5]]}', "0 to 255"),
        ('{"names": ["a"], "palette": ["red"]}', r"palette\[0\] of the classes is 'red'"),
        ('{"names": ["a"], "ignore_index": 0}', "is a class; use 1 to 255"),
        ('{"names": ["a"], "ignore_index": 256}', "0 to 255"),
        ('{"names": ["a"], "ignore_index": -1}', "0 to 255"),
        ('{"names": ["a"], "ignore_index": true}', "must be an integer"),
        ('{"names": ["a"], "ignore_index": "255"}', "must be an integer"),
    ],
)
def test_a_mistake_in_custom_classes_is_named(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_json(text)


def test_255_classes_fit_in_8_bits_and_256_do_not():
    names = [str(i) for i in range(256)]
    assert from_json(json.dumps({"names": names[:255]})).num_classes == 255
    with pytest.raises(ValueError, match="256 class names"):
        from_json(json.dumps({"names": names}))


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\x9b", "\u202egnp", "\0", "\ud800"])
def test_class_names_with_control_characters_are_refused(name):
    with pytest.raises(ValueError, match=r"names\[1\] is .*must not contain control") as error:
        Classes(names=("sky", name), palette=((0, 0, 0), (1, 1, 1)))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["[red]sky[/red]", "=1+1", "\u0646\u200c\u0645", "👩\u200d🚀", "été"]
)
def test_class_names_of_any_language_are_accepted(name):
    assert Classes(names=("sky", name), palette=((0, 0, 0), (1, 1, 1))).names[1] == name
