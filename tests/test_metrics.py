"""Metrics agree with counting pixels one by one in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import ClassCounts, confusion_matrix, pixel_accuracy

K = 4
IGNORE = 255


@st.composite
def label_and_mask(draw):
    """A label of K classes and ignored pixels, and a mask, as equal lists of rows."""
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    ids = st.integers(0, K - 1)

    def rows(values):
        return draw(
            st.lists(
                st.lists(values, min_size=width, max_size=width), min_size=height, max_size=height
            )
        )

    return rows(ids | st.just(IGNORE)), rows(ids)


def count(label, mask, **options):
    return confusion_matrix(
        np.array(label, dtype=np.uint8), np.array(mask, dtype=np.uint8), num_classes=K, **options
    )


@pytest.mark.slow
@given(label_and_mask())
def test_confusion_agrees_with_counting_pixels_one_by_one(pair):
    expected = [[0] * K for _ in range(K)]
    for label_row, mask_row in zip(*pair, strict=True):
        for truth, guess in zip(label_row, mask_row, strict=True):
            if truth != IGNORE:
                expected[truth][guess] += 1
    found = count(*pair)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@given(label_and_mask())
def test_iou_agrees_with_counting_pixels_one_by_one(pair):
    seen = [
        (truth, guess)
        for rows in zip(*pair, strict=True)
        for truth, guess in zip(*rows, strict=True)
        if truth != IGNORE
    ]
    expected = []
    for k in range(K):
        both = sum(truth == k and guess == k for truth, guess in seen)
        either = sum(k in (truth, guess) for truth, guess in seen)
        expected.append(both / either if either else None)
    counts = ClassCounts.from_confusion(count(*pair))
    assert counts.iou() == tuple(expected)
    known = [iou for iou in expected if iou is not None]
    assert counts.mean_iou() == (pytest.approx(sum(known) / len(known)) if known else None)
    right = sum(truth == guess for truth, guess in seen)
    assert pixel_accuracy(count(*pair)) == (right / len(seen) if seen else None)


@given(label_and_mask(), label_and_mask())
def test_counts_of_two_images_sum_to_those_of_their_concatenation(one, other):
    flat = [[pixel for row in one[i] + other[i] for pixel in row] for i in range(2)]
    both = ClassCounts.from_confusion(count(*flat))
    added = ClassCounts.from_confusion(count(*one)) + ClassCounts.from_confusion(count(*other))
    for name in ("tp", "fp", "fn"):
        np.testing.assert_array_equal(getattr(added, name), getattr(both, name))


def test_the_iou_of_a_data_set_is_not_the_mean_of_image_ious():
    # class 1: 1 of 2 pixels in one image, 6 of 6 in the other
    one, other = count([[1, 1, 0]], [[1, 0, 0]]), count([[1] * 6], [[1] * 6])
    counts = ClassCounts.from_confusion(one) + ClassCounts.from_confusion(other)
    assert counts.iou()[1] == 7 / 8


def test_the_iou_of_an_absent_class_is_none_and_of_a_missed_one_zero():
    counts = ClassCounts.from_confusion(count([[0, 0, 1]], [[0, 0, 2]]))
    assert counts.iou() == (1.0, 0.0, 0.0, None)
    assert counts.mean_iou() == pytest.approx(1 / 3)


def test_an_image_without_labeled_pixels_has_no_score():
    found = count([[IGNORE] * 3], [[0, 1, 2]])
    assert found.sum() == 0
    assert pixel_accuracy(found) is None
    assert ClassCounts.from_confusion(found).mean_iou() is None


def test_counts_are_exact_where_float32_and_float64_are_not():
    for big in (2**24, 2**53):
        table = np.diag(np.array([big, 1], dtype=np.int64))
        one = np.diag(np.array([1, 0], dtype=np.int64))
        counts = ClassCounts.from_confusion(table) + ClassCounts.from_confusion(one)
        assert counts.tp.tolist() == [big + 1, 1]


def test_a_large_image_is_counted_completely():
    rng = np.random.default_rng(0)
    label, mask = rng.integers(0, K, (2, 1031, 1033), dtype=np.uint8)
    expected = [[int(((label == i) & (mask == j)).sum()) for j in range(K)] for i in range(K)]
    assert confusion_matrix(label, mask, num_classes=K).tolist() == expected


def test_uint8_ids_do_not_overflow_with_many_classes():
    ids = np.arange(255, dtype=np.uint8)[None]
    np.testing.assert_array_equal(confusion_matrix(ids, ids, num_classes=255), np.eye(255))


def test_a_custom_ignore_index_is_not_counted_and_255_is_then_an_error():
    assert count([[1, 11]], [[1, 0]], ignore_index=11).sum() == 1
    with pytest.raises(ValueError, match=r"class 255, but num_classes is 4; .*\(11\)"):
        count([[1, 255]], [[1, 0]], ignore_index=11)


@pytest.mark.parametrize(
    ("label", "mask", "options", "message"),
    [
        ([[0, 4]], [[0, 0]], {}, "label holds class 4, but num_classes is 4"),
        ([[0, 255]], [[0, 4]], {}, "mask holds class 4"),
        ([[0, -1]], [[0, 0]], {}, "label holds class -1"),
        ([[0, 0]], [[0, -1]], {}, "mask holds class -1"),
        ([[0, 0]], [[0], [0]], {}, r"label has shape \(1, 2\), but the mask has shape \(2, 1\)"),
        ([[0.0]], [[0]], {}, "label is float64"),
        ([[0]], [[0.5]], {}, "mask is float64"),
        ([[0]], [[0]], {"ignore_index": 3}, "ignore_index 3 is one of the 4 classes"),
        ([[0]], [[0]], {"num_classes": 0}, "num_classes 0: must be at least 1"),
    ],
)
def test_invalid_arrays_are_refused_with_a_reason(label, mask, options, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(label), np.array(mask), **{"num_classes": 4, **options})


def test_invalid_counts_are_refused():
    four = np.zeros((4, 4), dtype=np.int64)
    with pytest.raises(ValueError, match="4 and 3 classes"):
        ClassCounts.from_confusion(four) + ClassCounts.from_confusion(four[:3, :3])
    with pytest.raises(ValueError, match=r"tp is float64"):
        ClassCounts(tp=np.zeros(2), fp=np.zeros(2), fn=np.zeros(2))
    with pytest.raises(ValueError, match="must be square"):
        ClassCounts.from_confusion(np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="fp holds -1"):
        ClassCounts.from_confusion(np.array([[0, -1], [0, 0]]))
