"""Settings are validated, and all that affect a mask are in the fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest

from pipeline.bulk import settings as settings_module
from pipeline.bulk.settings import ADDED_LATER, BulkSettings, Inference, fingerprint

SettingsFor = Callable[..., BulkSettings]


@pytest.mark.parametrize(
    ("flag", "shown", "values"),
    [
        ("--scales", "0", {"scales": (1.0, 0.0)}),
        ("--scales", "nan", {"scales": (float("nan"),)}),
        ("--scales", "9.0", {"scales": (9.0,)}),
        ("--scales", "", {"scales": ()}),
        ("--output-stride", "12", {"output_stride": 12}),
        ("--window-overlap", "513", {"window": 513, "window_overlap": 513}),
        ("--window", "0", {"window": 0, "window_overlap": 0}),
        ("--max-pixels", "0", {"max_pixels": 0}),
        ("--max-object-bytes", "-1", {"max_object_bytes": -1}),
        ("--window-above", "0", {"window_above": 0}),
    ],
)
def test_a_bad_inference_setting_is_one_line_with_its_flag_and_value(
    flag: str, shown: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=flag) as refused:
        Inference(**values)
    assert shown in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "shown", "values"),
    [
        ("--include", "", {"include": ()}),
        ("--actors", "3 2", {"actors": (3, 2)}),
        ("--actors", "0 1", {"actors": (0, 1)}),
        ("--max-error-fraction", "1.5", {"max_error_fraction": 1.5}),
        ("--max-error-fraction", "nan", {"max_error_fraction": float("nan")}),
        ("--gpus-per-actor", "-1", {"gpus_per_actor": -1.0}),
        ("--gpus-per-actor", "nan", {"gpus_per_actor": float("nan")}),
        ("--on-model-change", "reprocess", {"on_model_change": "reprocess"}),
        ("--limit", "0", {"limit": 0}),
        ("--shard-images", "0", {"shard_images": 0}),
        ("--shard-bytes", "-5", {"shard_bytes": -5}),
        ("--cpus-per-actor", "0", {"cpus_per_actor": 0}),
        ("--batch-images", "0", {"batch_images": 0}),
        ("--price-per-gpu-hour", "2", {"price_per_gpu_hour": 2.0}),
        ("--price-per-gpu-hour", "nan", {"gpus_per_actor": 1, "price_per_gpu_hour": float("nan")}),
        ("--calibration-images", "-1", {"calibration_images": -1}),
        ("--start-timeout", "0", {"start_timeout": 0}),
        ("--stall-timeout", "-1", {"stall_timeout": -1}),
        ("run id", "'../x'", {"run_id": "../x"}),
        ("neither s3://", "gs://bucket", {"images": "gs://bucket/x"}),
        ("neither s3://", "''", {"results": ""}),
        ("neither s3://", "''", {"labels": ""}),
    ],
)
def test_a_bad_setting_is_one_line_with_its_flag_and_value(
    settings_for: SettingsFor, flag: str, shown: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=flag) as refused:
        settings_for("/nowhere", **values)
    assert shown in str(refused.value)
    assert "\n" not in str(refused.value)


OTHER_VALUES: dict[str, Any] = {
    "scales": (0.5, 1.0),
    "flip": True,
    "output_stride": 8,
    "window": 513,
    "window_overlap": 129,
    "window_above": 1_000_000,
    "max_pixels": 50_000_000,
    "max_object_bytes": 1000,
}


def test_any_inference_setting_changes_the_fingerprint() -> None:
    plain = Inference()
    assert set(OTHER_VALUES) == set(asdict(plain))
    prints = {replace(plain, **{name: value}).fingerprint() for name, value in OTHER_VALUES.items()}
    assert len(prints | {plain.fingerprint()}) == len(OTHER_VALUES) + 1


def test_equal_inference_settings_have_one_fingerprint() -> None:
    whole, real = Inference(scales=(1, 2)), Inference(scales=(1.0, 2.0))
    assert whole == real
    assert whole.fingerprint() == real.fingerprint()


@pytest.mark.parametrize(
    "values",
    [
        {"images": "/other"},
        {"labels": None},
        {"include": ("*.png",)},
        {"only_new": True},
        {"only_new": True, "on_model_change": "new-only"},
        {"limit": 3},
        {"shard_images": 3},
        {"shard_bytes": 3},
        *({"inference": Inference(**{name: value})} for name, value in OTHER_VALUES.items()),
    ],
)
def test_settings_that_change_plan_or_mask_change_the_identity(
    settings_for: SettingsFor, values: dict[str, Any]
) -> None:
    plain, other = settings_for("/x"), settings_for("/x", **values)
    assert plain.identity(model="m") != other.identity(model="m")
    assert plain.identity(model="m") != plain.identity(model="n")


def test_speed_and_timeouts_are_not_part_of_the_identity(
    settings_for: SettingsFor,
) -> None:
    plain = settings_for("/x").identity(model="m")
    fast = settings_for(
        "/x", actors=(1, 9), cpus_per_actor=3, max_error_fraction=0.5, start_timeout=9
    )
    assert fast.identity(model="m") == plain
    turned = settings_for("/x", include=tuple(reversed(BulkSettings.include)))
    assert turned.identity(model="m") == plain


@pytest.mark.parametrize("name", ["a.jpg", "A.JPG", "x/y.Jpeg", "x y/z.png", "\n.webp", "ü.TIFF"])
def test_images_are_included_in_either_case_at_any_depth(
    settings_for: SettingsFor, name: str
) -> None:
    assert settings_for("/x").included.match(name)


@pytest.mark.parametrize("name", ["a.jpg.txt", "jpg", "a.svg", "a.jpgx", ".jpg/readme"])
def test_names_of_other_files_are_not_included(settings_for: SettingsFor, name: str) -> None:
    assert not settings_for("/x").included.match(name)


def test_each_include_pattern_matches_independently(settings_for: SettingsFor) -> None:
    included = settings_for("/x", include=("a|b", "cats/*.[jp]*g")).included
    taken = ["a|b", "CATS/1.png", "cats/sub/2.JPG"]
    assert [name for name in (*taken, "a", "b", "dogs/1.png") if included.match(name)] == taken


def test_relative_folders_become_absolute(
    settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_for("here").images == os.path.join(tmp_path, "here", "images")


FINGERPRINTS: dict[str, dict[str, Any]] = {
    "6b1b69e76be0e107": {},
    "d2be70f6e3e241d7": {"scales": (0.5, 1.0)},
    "4fd21d542b09134f": {"flip": True},
    "91a51973bb3b1649": {"output_stride": 8},
    "76c4f5ce4597ebfe": {"window": 513},
    "0b59ef321f531edb": {"window_overlap": 129},
    "073f2da2a3f9aa9b": {"window_above": 1_000_000},
    "0f61e10870816e15": {"max_pixels": 50_000_000},
    "eda2cfb72cab727a": {"max_object_bytes": 1000},
    "3adbaa193c2d04e7": {"scales": (0.75, 1), "flip": True, "window": 513, "window_overlap": 0},
}
"""Fingerprints of the first version: a change would invalidate stored results."""

IDENTITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bec45ef777e3819f": ("c9366e926495234e", {}),
    "13bf6d7657ee00b9": ("70f0ca3b0157786a", {"labels": None}),
    "939403a8b02214fa": (
        "f898c7cf9af5344a",
        {
            **{"only_new": True, "on_model_change": "new-only", "limit": 7},
            **{"inventory": "s3://b/inventory.csv", "inference": Inference(flip=True)},
        },
    ),
}
"""Fingerprint of a plan's identity -> fingerprint in the name of its --only-new lease, settings."""


@pytest.mark.parametrize("known", FINGERPRINTS)
def test_the_fingerprint_of_inference_settings_is_pinned(known: str) -> None:
    assert Inference(**FINGERPRINTS[known]).fingerprint() == known


@pytest.mark.parametrize("known", IDENTITIES)
def test_the_identity_of_a_run_is_pinned(known: str) -> None:
    lease, values = IDENTITIES[known]
    common = {"images": "s3://b/photos", "labels": "s3://b/labels", "results": "s3://b/results"}
    settings = BulkSettings(**{**common, "checkpoint": "s3://b/model.safetensors", **values})
    assert fingerprint(settings.identity(model="m")) == known
    assert settings.work_fingerprint(model="m") == lease


def test_every_inference_setting_is_hashed_or_listed_as_added_later() -> None:
    first = {name for values in FINGERPRINTS.values() for name in values}
    assert first == set(OTHER_VALUES) - set(ADDED_LATER)
    assert first | set(ADDED_LATER) == {each.name for each in fields(Inference)}


def test_a_setting_added_later_is_hashed_if_not_at_its_first_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Newer(Inference):
        sharpness: int = 2
        """Added with the default 1, which was raised later."""

    monkeypatch.setattr(settings_module, "ADDED_LATER", {"sharpness": 1})
    assert Newer(sharpness=1).identity() == Inference().identity()
    assert Newer(sharpness=1).fingerprint() == "6b1b69e76be0e107"
    assert Newer(sharpness=1, flip=True).fingerprint() == "4fd21d542b09134f"
    others = {Newer().fingerprint(), Newer(sharpness=3).fingerprint()}
    assert len(others | {"6b1b69e76be0e107"}) == 3
