"""The loop of a worker, alone and among others: killed, resumed, and with data that is broken."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train import tiny
from train.tiny import Heard

from pipeline.data import storage
from pipeline.model import weights
from pipeline.train import checkpoints, loop, state, step
from pipeline.train.evaluate import Evaluation, evaluate
from pipeline.train.group import Group, Save
from pipeline.train.history import Score, Step
from pipeline.train.state import Snapshot
from pipeline.train.task import Task


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    tiny.draw_set(root)
    return root


class Killed(BaseException):
    """What a worker dies of."""


class Dies(Heard):
    """A listener whose worker dies when it tells of step `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def now(self, row: Step, scored: Score | None) -> None:
        super().now(row, scored)
        if row.step == self._at:
            raise Killed


def content(snapshot: Snapshot) -> tuple[object, ...]:
    """All of it but the times."""
    history = snapshot.history
    return (
        {key: value.numpy().tobytes() for key, value in snapshot.tensors.items()},
        snapshot.step,
        [(each.step, each.loss, each.lr) for each in history.steps],
        [(each.step, each.miou, each.pixel_accuracy, each.ious) for each in history.scores],
        dict(snapshot.facts),
    )


def newest(out: Path) -> Snapshot:
    found = checkpoints.latest(str(out))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of four steps has ended."""
    out = tmp_path_factory.mktemp("undisturbed")
    heard = Heard()
    loop.train(tiny.task(root, out, tiny.experiment()), Group(), heard)
    assert [row.step for row in heard.rows] == [1, 2, 3, 4]
    assert heard.failures == []
    return out


def assert_same_end(out: Path, expected: Path) -> None:
    assert content(newest(out)) == content(newest(expected))
    for name in ("model.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_four_steps_are_two_a_death_and_two_to_the_last_bit(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.task(root, tmp_path, tiny.experiment())
    with pytest.raises(Killed):
        loop.train(task, Group(), Dies(3))
    assert newest(tmp_path).step == 2
    assert not (tmp_path / "model.safetensors").exists()
    torch.manual_seed(1000)
    heard = Heard()
    loop.train(task, Group(), heard)
    assert [row.step for row in heard.rows] == [3, 4]
    assert_same_end(tmp_path, undisturbed)
    steps = [each.step for each in newest(tmp_path).history.scores]
    assert steps == [2, 4]


def test_a_death_between_two_rows_of_the_history_changes_none_of_them(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.task(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    with pytest.raises(Killed):
        loop.train(task, Group(), Dies(4))
    died = newest(tmp_path)
    assert (died.step, [each.step for each in died.history.steps]) == (3, [2])
    loop.train(task, Group(), Heard())
    assert_same_end(tmp_path, undisturbed)


def test_loader_processes_and_a_broken_checkpoint_change_no_bit_of_the_end(
    root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    task = tiny.task(root, tmp_path, tiny.experiment(), loaders=1)
    with pytest.raises(Killed):
        loop.train(task, Group(), Dies(3))
    [path] = (tmp_path / "checkpoints").rglob("state.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    heard = Heard()
    loop.train(task, Group(), heard)
    assert [row.step for row in heard.rows] == [1, 2, 3, 4]  # none is left but the start
    assert_same_end(tmp_path, undisturbed)


def test_a_run_that_dies_before_its_pictures_only_makes_them(
    root: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise Killed

    task = tiny.task(root, tmp_path, tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", dies)
        with pytest.raises(Killed):
            loop.train(task, Group(), Heard())
    heard = Heard()
    loop.train(task, Group(), heard)
    assert (heard.rows, heard.failures) == ([], [])
    assert_same_end(tmp_path, undisturbed)
    assert Image.open(tmp_path / "samples.png").width > 41
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_network_that_ships_is_the_average_and_the_best_is_that_of_the_best_score(
    root: Path, undisturbed: Path
) -> None:
    last = newest(undisturbed)
    scores = {each.step: each.miou for each in last.history.scores}
    model, classes = weights.load(str(undisturbed / "model.safetensors"))
    assert classes.names == tiny.CLASSES.names
    for key, value in model.state_dict().items():
        assert torch.equal(value, last.tensors[f"average.module.{key}"])
    best, _ = weights.load(str(undisturbed / "best.safetensors"))
    val = tiny.task(root, undisturbed, tiny.experiment()).val
    found = evaluate(best, val, read=storage.read).miou
    assert found == pytest.approx(max(scores.values()), abs=2e-3)  # in another memory format


def test_the_best_is_kept_where_later_scores_are_lower(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mious = iter((0.2, 0.7, 0.7, 0.1))

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, next(mious), 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)
    kept: dict[int, bytes] = {}

    class Keeps(Group):
        def report(self, *given: Any, name: str, save: Save | None) -> None:
            super().report(*given, name=name, save=save)
            kept[len(kept) + 1] = (tmp_path / "best.safetensors").read_bytes()

    what = tiny.experiment(ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=1))
    loop.train(tiny.task(root, tmp_path, what), Keeps(), Heard())
    assert kept[1] != kept[2]
    assert kept[2] == kept[3] == kept[4]


def score_so(monkeypatch: pytest.MonkeyPatch, mious: dict[int, float]) -> None:
    """Scores are these, by step."""

    def score(_: Evaluation, *, step: int, time: float) -> Score:
        return Score(step, time, mious[step], 0.5, (0.5,) * 4)

    monkeypatch.setattr(Evaluation, "score", score)


def test_a_best_whose_checkpoint_was_never_put_does_not_replace_that_of_the_history(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.task(root, tmp_path / "out", tiny.experiment())
    score_so(monkeypatch, {2: 0.5, 4: 0.9})
    with pytest.raises(Killed):
        loop.train(task, Group(), Dies(4))  # it has its score, and no checkpoint
    score_so(monkeypatch, {2: 0.5, 4: 0.4})  # as another number of workers may score
    loop.train(task, Group(), Heard())
    loop.train(tiny.task(root, tmp_path / "whole", tiny.experiment()), Group(), Heard())
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_death_between_a_checkpoint_and_its_best_is_made_good(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise Killed

    score_so(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(tiny.task(root, tmp_path / "whole", tiny.experiment()), Group(), Heard())
    task = tiny.task(root, tmp_path / "out", tiny.experiment())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "put_best", dies)
        with pytest.raises(Killed):
            loop.train(task, Group(), Heard())
    assert newest(tmp_path / "out").step == 2
    assert not (tmp_path / "out" / "best.safetensors").exists()
    loop.train(task, Group(), Heard())
    assert_same_end(tmp_path / "out", tmp_path / "whole")


def test_a_best_that_is_put_while_training_goes_on_is_the_network_that_was_scored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Save] = []

    class PutsLater(Group):
        def report(self, *given: Any, name: str, save: Save | None) -> None:
            assert save is not None
            later.append(save)

    score_so(monkeypatch, {2: 0.5, 4: 0.4})
    loop.train(tiny.task(root, tmp_path / "now", tiny.experiment()), Group(), Heard())
    loop.train(tiny.task(root, tmp_path / "later", tiny.experiment()), PutsLater(), Heard())
    assert not (tmp_path / "later" / "best.safetensors").exists()
    for save in later:
        save()
    assert_same_end(tmp_path / "later", tmp_path / "now")


def worker(group: Group, task: Task) -> Heard:
    heard = Heard()
    loop.train(task, group, heard)
    return heard


def broken_worker(group: Group, task: Task) -> Heard:
    """As `worker`; the loss of the second is no number from the third step on."""
    done = 0

    def forward(self: step.Objective, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        summed = before(self, images, labels)
        return summed * float("nan") if group.rank == 1 and done > 2 else summed

    before = step.Objective.forward
    step.Objective.forward = forward  # type: ignore[method-assign]  # of this process alone
    return worker(group, task)


def test_a_loss_that_is_no_number_ends_all_workers_and_names_the_photos(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    task = tiny.task(root, out, tiny.experiment(batch_size=4, max_steps=5), checkpoint_every=1)
    first, second = tiny.together(2, tmp_path, broken_worker, task)
    assert first.failures == []  # its photos are not to blame
    [message] = second.failures
    assert "the loss is nan at step 3" in message
    assert "give a lower --base-lr, or mend these labels, under a new --out" in message
    assert sum(f"images/{number:02d}.jpg" in message for number in range(6)) == 2
    assert [row.step for row in first.rows] == [1, 2]
    assert newest(out).step == 2  # what is broken is not put away
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["train/labels/04.png", "val/images/03.jpg"])
def test_a_file_that_one_worker_cannot_read_ends_all_of_them(name: str, tmp_path: Path) -> None:
    tiny.draw_set(tmp_path / "set")
    out = tmp_path / "out"
    task = tiny.task(tmp_path / "set", out, tiny.experiment(batch_size=6))
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:60])
    heard = tiny.together(2, tmp_path, worker, task)
    messages = [message for each in heard for message in each.failures]
    assert len(messages) == 1
    assert messages[0].startswith(f"{path}: ")
    assert "with other photos or labels it is another run: give that a new --out" in messages[0]
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["train image", "val label", "initial"])
def test_a_worker_that_does_not_find_what_it_needs_says_so_and_none_trains(
    what: str, root: Path, tmp_path: Path
) -> None:
    task = tiny.task(root, tmp_path, tiny.experiment())
    if what == "initial":
        task = replace(task, initial="/not/here")
    else:
        name, part = what.split()
        split = getattr(task, name)
        gone = replace(split.pairs[0], **{part: "/not/here"})
        task = replace(task, **{name: replace(split, pairs=(gone, *split.pairs[1:]))})
    heard = worker(Group(), task)
    assert heard.rows == []
    assert "/not/here: it is not on node" in heard.failures[0]
    assert f"give --{'out' if what == 'initial' else 'data'} as s3://" in heard.failures[0]
    assert "another run" not in heard.failures[0]  # it is where these photos are


@pytest.mark.parametrize("at", [3, 4])  # in mid-run, and at its end
def test_weights_that_are_no_numbers_are_never_put_away(
    at: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = step.Stepper.step
    done: list[step.Stepped] = []

    def overflows(self: step.Stepper, *batch: torch.Tensor) -> step.Stepped:
        done.append(before(self, *batch))  # its loss is that of sound weights
        if len(done) == at:
            next(self._state.model.parameters()).data.fill_(torch.inf)
        return done[-1]

    monkeypatch.setattr(step.Stepper, "step", overflows)
    task = tiny.task(root, tmp_path, tiny.experiment(), checkpoint_every=1)
    heard = worker(Group(), task)
    assert f"weights are no longer numbers after step {at}" in heard.failures[0]
    assert "give a lower --base-lr and a new --out" in heard.failures[0]
    assert newest(tmp_path).step == at - 1
    assert not (tmp_path / "model.safetensors").exists()


def test_a_val_split_without_labels_is_refused_before_training(tmp_path: Path) -> None:
    tiny.draw_set(tmp_path / "set")
    for path in (tmp_path / "set" / "val" / "labels").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(ValueError, match="no pixel of the 5 photos of val is labelled"):
        tiny.task(tmp_path / "set", tmp_path / "out", tiny.experiment())


def seen_worker(group: Group, task: Task) -> list[tuple[np.ndarray, int]]:
    """What each score was made of."""
    seen: list[tuple[np.ndarray, int]] = []

    def score(self: Evaluation, **given: Any) -> Score:
        seen.append((self.confusion.copy(), self.images))
        return before(self, **given)

    before = Evaluation.score
    Evaluation.score = score  # type: ignore[method-assign]  # of this process alone
    worker(group, task)
    return seen


def test_one_two_and_three_workers_count_the_same_pixels_and_photos(
    root: Path, tmp_path: Path
) -> None:
    # weights that do not move, so that the networks are the same
    what = tiny.experiment(max_steps=2, base_lr=1e-30, freeze_bn=True, ema_decay=0.0)
    what = replace(what, evaluation=replace(what.evaluation, eval_every=0))
    task = tiny.task(root, tmp_path / "1", what)
    model, _ = weights.load(task.initial)
    # as the loop keeps it: another memory format rounds differently
    model = model.to(memory_format=torch.channels_last)
    expected = evaluate(model, task.val, read=storage.read)
    assert expected.images == 5
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        task = tiny.task(root, out, what)
        for seen in tiny.together(world, tmp_path, seen_worker, task):
            [(confusion, images)] = seen
            assert images == 5
            assert confusion.dtype == np.int64
            assert (confusion == expected.confusion).all()
        assert newest(out).facts == {"world": world, "threads": 1}


def test_trained_normalisation_on_several_cpus_is_warned_of_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.task(root, tmp_path, tiny.experiment())
    frozen = replace(task, experiment=tiny.experiment(freeze_bn=True))
    monkeypatch.setattr(Group, "sum", lambda _, values: values)  # no others are there
    said = {}
    for name, group, which in (
        ("first", Group(world=2), task),
        ("second", Group(rank=1, world=2), task),
        ("alone", Group(), task),
        ("frozen", Group(world=2), frozen),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loop._begin(which, group)
        said[name] = caplog.text.count("each worker normalises by its own photos alone")
    assert said == {"first": 1, "second": 0, "alone": 0, "frozen": 0}


def test_going_on_with_other_threads_or_workers_is_warned_of(
    root: Path, tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = tiny.task(root, undisturbed, tiny.experiment())
    with caplog.at_level(logging.WARNING):
        loop._begin(task, Group())
        assert caplog.text == ""
        loop._begin(replace(task, threads=2), Group())
    assert "but not the same bit for bit" in caplog.text


def test_a_set_that_a_node_cannot_keep_is_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.cache.NodeCache.fits", False)
    task = tiny.task(root, tmp_path, tiny.experiment(max_steps=1), cache_gb=2.5)
    worker(Group(), task)
    assert "the photos take more than --cache-gb 2.5: every epoch" in caplog.text


def test_a_worker_that_finds_a_newer_checkpoint_takes_the_first_workers(
    root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny.task(root, undisturbed, tiny.experiment())
    monkeypatch.setattr(Group, "sum", lambda _, values: torch.full_like(values, 2))
    begun = loop._begin(task, Group(rank=1, world=2))
    data = (undisturbed / "checkpoints" / "step-00000002" / "state.safetensors").read_bytes()
    taken = state.read(data, "step 2")
    assert begun.step == 2
    for key, value in begun.model.state_dict().items():
        assert torch.equal(value, taken.tensors[f"model.{key}"])


def test_a_snapshot_says_what_it_was_made_with(undisturbed: Path) -> None:
    last = newest(undisturbed)
    assert last.facts == {"world": 1, "threads": 1}
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    said = json.loads((undisturbed / "run.json").read_text())
    assert said["experiment"]["optimiser"]["max_steps"] == last.step
