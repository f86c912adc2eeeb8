"""Training histories: copies, the best score, and their JSON."""

from __future__ import annotations

import json

import pytest

from pipeline.evaluation.score import Score
from pipeline.train.worker.history import History, Step


def step(number: int) -> Step:
    return Step(number, 1e9 + number / 3, 0.1 * number, 0.007, 31.5, 0.02)


def score(number: int, miou: float) -> Score:
    return Score(number, 1e9 + number / 3, miou, 0.9, (miou, None, 1 / 3))


def test_json_preserves_a_history_exactly() -> None:
    history = History(steps=[step(1), step(2)], losses=[0.1 + 0.7], scores=[score(2, 0.1 + 0.2)])
    again = History.from_json(history.to_json())
    assert again == history
    assert isinstance(again.scores[0].ious, tuple)
    assert History.from_json(History().to_json()) == History()


def test_the_stored_keys_are_those_of_earlier_versions() -> None:
    history = History(steps=[step(3)], losses=[0.5], scores=[score(3, 0.5)])
    assert json.loads(history.to_json()) == {
        "version": 1,
        "steps": {
            "step": [3],
            "time": [1000000001.0],
            "loss": [pytest.approx(0.3)],
            "lr": [0.007],
            "images_per_second": [31.5],
            "wait_share": [0.02],
        },
        "losses": [0.5],
        "scores": {
            "step": [3],
            "time": [1000000001.0],
            "miou": [0.5],
            "pixel_accuracy": [0.9],
            "ious": [[0.5, None, 1 / 3]],
        },
    }


def test_an_older_history_without_losses_is_read() -> None:
    written = json.loads(History(steps=[step(1)], losses=[0.5]).to_json())
    del written["losses"]
    assert History.from_json(json.dumps(written)) == History(steps=[step(1)])


def test_a_copy_does_not_get_later_entries() -> None:
    history = History(steps=[step(10)], losses=[0.3], scores=[score(10, 0.5)])
    copied = history.copy()
    history.scores.append(score(20, 0.6))
    history.losses.append(0.4)
    assert copied.losses == [0.3]
    history.add(step(20))
    assert history.losses == []
    assert [row.step for row in history.steps] == [10, 20]
    assert copied == History(steps=[step(10)], losses=[0.3], scores=[score(10, 0.5)])


def test_the_best_score_is_the_first_with_the_largest_miou() -> None:
    assert History().best is None
    history = History(scores=[score(1, 0.2), score(2, 0.7), score(3, 0.7), score(4, 0.1)])
    assert history.best is history.scores[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 7, "steps": {}, "scores": {}}'])
def test_text_that_is_not_a_history_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a training history"):
        History.from_json(text)
