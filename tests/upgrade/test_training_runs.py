"""Training runs that version 84b697e began or finished, in the hands of this one."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs import train
from pipeline.data import storage

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("inputs")]

Flags = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Upload = Callable[[str], str]
Stored = Callable[[str], dict[str, str]]

FOURTH, LAST = (f"checkpoints/step-{step:08d}/state.safetensors" for step in (4, 12))

# Of what the eight steps after the checkpoint change. Other CPUs' fp32 rounding moved the backbone,
# which changes least, by 3e-5, the head by 6e-8 and statistics by 1e-7 of it; without the
# checkpoint's momentum the first two are off by a half, and the last by 2e-3.
BOUNDS = {"backbone": 2e-3, "head": 1e-4, "statistics": 1e-4}


def tensors(uri: str) -> Tensors:
    return safetensors.torch.load(storage.read(uri))


def history(uri: str) -> dict[str, Any]:
    """What a training state says of the steps so far."""
    data = storage.read(uri)
    (size,) = struct.unpack("<Q", data[:8])
    printed: dict[str, Any] = json.loads(
        json.loads(data[8 : 8 + size])["__metadata__"]["deeplab-training"]
    )
    found: dict[str, Any] = printed["history"]
    return found


def part_of(name: str) -> str:
    if "running_" in name:
        return "statistics"
    return "backbone" if name.startswith("backbone.") else "head"


def distance(names: Iterable[str], one: Tensors, other: Tensors) -> float:
    squares = [(one[name].double() - other[name].double()).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_run_resumes_and_ends_with_the_same_network(
    upload: Upload, stored: Stored, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    out, reference = upload("trained-killed"), upload("trained")
    before, state = stored(out), tensors(f"{out}/{FOURTH}")
    first = history(f"{out}/{FOURTH}")
    # no step may be trained again: what a run starts from is of no use any more
    initial = tensors(f"{out}/initial.safetensors")
    assert train.main([*flags["training"], "--out", out]) == 0, capsys.readouterr().out
    after = stored(out)
    assert "lease.json" not in after
    for name in ("run.json", "survey.json", "survey-val.json", "initial.safetensors"):
        assert after[name] == before[name]
    last = history(f"{out}/{LAST}")
    for name in ("steps", "scores"):
        for key, values in first[name].items():  # the times of the first four steps too
            assert last[name][key][: len(values)] == values
    found = tensors(f"{out}/model.safetensors")
    expected = tensors(f"{reference}/model.safetensors")
    assert found.keys() == expected.keys() == initial.keys()
    average = {name: state[f"average.module.{name}"] for name in expected}
    parts: dict[str, list[str]] = {}
    for name, values in expected.items():
        if values.is_floating_point():
            parts.setdefault(part_of(name), []).append(name)
        else:
            assert torch.equal(found[name], values)
    assert parts.keys() == BOUNDS.keys()
    for part, names in parts.items():
        moved = distance(names, expected, average)
        assert distance(names, expected, found) <= BOUNDS[part] * moved, part
    mine, theirs = (json.loads(storage.read(f"{each}/record.json")) for each in (out, reference))
    same = ("steps", "workers", "classes", "experiment")
    assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
    for which in ("last", "best"):
        assert mine[which]["step"] == theirs[which]["step"]
        assert mine[which]["miou"] == pytest.approx(theirs[which]["miou"], abs=0.01)


def test_a_finished_run_is_left_as_it_is(
    upload: Upload, stored: Stored, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    out = upload("trained")
    before = stored(out)
    assert train.main([*flags["training"], "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert " steps=12 " in printed.splitlines()[-1]
    assert stored(out) == before


CHANGED: dict[str, tuple[list[str], str]] = {
    "another rate": (["--base-lr", "0.02"], "optimiser.base_lr"),
    "more steps": (["--max-steps", "13"], "optimiser.max_steps"),
    "another seed": (["--seed", "1"], "seed"),
    "micro-batches": (["--micro-batch", "2"], "optimiser.micro_batch"),
    "repeated images": (["--repeat-classes", "red"], "data.repeat_classes"),
    "late crops": (["--late-crop-size", "35", "37"], "augment.late_crop_size"),
    "another network": (["--output-stride", "8"], "model.output_stride"),
    "other first weights": (["--init", "None"], "init"),
    "another evaluation": (["--eval-flip"], "evaluation.eval_flip"),
}


@pytest.mark.parametrize(
    ("what", "place"),
    [*((what, "trained-killed") for what in CHANGED), ("another rate", "trained")],
)
def test_a_run_is_refused_with_one_value_changed_or_added(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    place: str,
    what: str,
) -> None:
    more, name = CHANGED[what]
    assert_refused([*flags["training"], *more], upload(place), f"experiment.{name}", stored, capsys)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("sharpness",), "sharpness"),
        (("experiment", "sharpness"), "sharpness"),
        (("experiment", "optimiser", "sharpness"), "sharpness"),
        (("experiment", "model", "sharpness"), "sharpness"),
    ],
)
@pytest.mark.parametrize("value", [3, None])
def test_a_run_with_a_value_that_is_unknown_here_is_refused(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    path: tuple[str, ...],
    name: str,
    value: int | None,
) -> None:
    out = upload("trained-killed")
    rewrite(out, path, lambda values, key: values.update({key: value}))
    assert_refused(flags["training"], out, name, stored, capsys)


@pytest.mark.parametrize(
    "path",
    [
        ("photos",),
        ("experiment", "seed"),
        ("experiment", "init"),
        ("experiment", "optimiser", "hard_share"),
        ("experiment", "optimiser", "micro_batch"),
        ("experiment", "model", "dropout"),
    ],
)
def test_a_run_that_lacks_a_value_which_it_should_have_is_refused(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    path: tuple[str, ...],
) -> None:
    out = upload("trained-killed")
    rewrite(out, path, lambda values, key: values.pop(key))
    assert_refused(flags["training"], out, path[-1], stored, capsys)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("set/train/images/00.jpg", "train_photos"),
        ("set/train/labels/00.png", "train_labels"),
        ("set/val/images/10.jpg", "val_photos"),
        ("set/val/labels/10.png", "val_labels"),
    ],
)
def test_a_run_is_refused_with_one_file_replaced(
    upload: Upload,
    stored: Stored,
    flags: Flags,
    capsys: pytest.CaptureFixture[str],
    name: str,
    shown: str,
) -> None:
    out = upload("trained-killed")
    uri = f"{out.rpartition('/')[0]}/{name}"
    data = storage.read(uri)
    try:
        storage.write(uri, data + b"\0")  # read as before: bytes after the end
        assert_refused(flags["training"], out, shown, stored, capsys)
    finally:
        storage.write(uri, data)


def rewrite(out: str, path: tuple[str, ...], change: Callable[[Any, str], object]) -> None:
    """Changes the value at `path` of run.json."""
    run = json.loads(storage.read(f"{out}/run.json"))
    values = run
    for name in path[:-1]:
        values = values[name]
    change(values, path[-1])
    storage.write(f"{out}/run.json", json.dumps(run).encode())


def assert_refused(
    given: list[str],
    out: str,
    name: str,
    stored: Stored,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flags do not resume the run at `out`, because of the value called `name`."""
    before = stored(out)
    assert train.main([*given, "--out", out]) == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("train failed exit=2 reason=")
    assert re.search(rf"\b{re.escape(name)}\b", line), line
    assert stored(out) == before
