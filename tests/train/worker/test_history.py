"""Histories: what a resume keeps, which score is best, and the way through JSON."""

from __future__ import annotations

import json

import pytest

from pipeline.evaluation.score import Score
from pipeline.train.worker.history import History, Step


def step(number: int) -> Step:
    return Step(number, 1e9 + number / 3, 0.1 * number, 0.007, 31.5, 0.02)


def score(number: int, miou: float) -> Score:
    return Score(number, 1e9 + number / 3, miou, 0.9, (miou, None, 1 / 3))


def test_json_gives_the_same_history_to_the_last_bit() -> None:
    history = History(steps=[step(1), step(2)], losses=[0.1 + 0.7], scores=[score(2, 0.1 + 0.2)])
    again = History.from_json(history.to_json())
    assert again == history
    assert isinstance(again.scores[0].ious, tuple)
    assert History.from_json(History().to_json()) == History()


def test_a_history_of_before_the_losses_were_kept_is_read() -> None:
    written = json.loads(History(steps=[step(1)], losses=[0.5]).to_json())
    del written["losses"]
    assert History.from_json(json.dumps(written)) == History(steps=[step(1)])


def test_a_copy_keeps_what_was_seen_until_then() -> None:
    history = History(steps=[step(10)], losses=[0.3], scores=[score(10, 0.5)])
    kept = history.copy()
    history.scores.append(score(20, 0.6))
    history.losses.append(0.4)
    assert kept.losses == [0.3]
    history.add(step(20))
    assert history.losses == []
    assert [each.step for each in history.steps] == [10, 20]
    assert kept == History(steps=[step(10)], losses=[0.3], scores=[score(10, 0.5)])


def test_the_best_score_is_the_first_of_the_largest() -> None:
    assert History().best is None
    history = History(scores=[score(1, 0.2), score(2, 0.7), score(3, 0.7), score(4, 0.1)])
    assert history.best is history.scores[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 7, "steps": {}, "scores": {}}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="history is not one of ours"):
        History.from_json(text)
