"""Histories: what a resume keeps, which score is best, and the way through JSON."""

from __future__ import annotations

import pytest

from pipeline.train.history import History, Score, Step


def step(number: int) -> Step:
    return Step(number, 1e9 + number / 3, 0.1 * number, 0.007, 31.5, 0.02)


def score(number: int, miou: float) -> Score:
    return Score(number, 1e9 + number / 3, miou, 0.9, (miou, None, 1 / 3))


def test_json_gives_the_same_history_to_the_last_bit() -> None:
    history = History(steps=[step(1), step(2)], scores=[score(2, 0.1 + 0.2)])
    again = History.from_json(history.to_json())
    assert again == history
    assert isinstance(again.scores[0].ious, tuple)
    assert History.from_json(History().to_json()) == History()


def test_a_resume_keeps_what_its_step_has_seen_and_repeats_nothing() -> None:
    history = History(
        steps=[step(10), step(20), step(30)],
        scores=[score(20, 0.5), score(30, 0.6)],
    )
    kept = history.until(20)
    assert [each.step for each in kept.steps] == [10, 20]
    assert [each.step for each in kept.scores] == [20]
    kept.steps.append(step(30))
    assert len(history.steps) == 3


def test_the_best_score_is_the_first_of_the_largest() -> None:
    assert History().best is None
    history = History(scores=[score(1, 0.2), score(2, 0.7), score(3, 0.7), score(4, 0.1)])
    assert history.best is history.scores[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 7, "steps": {}, "scores": {}}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="history is not one of ours"):
        History.from_json(text)
