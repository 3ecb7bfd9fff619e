"""Matching label maps without names to true classes."""

from csad.evaluation.label_matching import match_labels

import numpy as np
import pytest

TRUE = np.array([[0, 0, 1, 1], [0, 0, 2, 2]], np.uint8)


def test_names_do_not_matter():
    match = match_labels([np.array([[7, 7, 0, 0], [7, 7, 3, 3]], np.uint8)], [TRUE])
    assert match.mean_iou == 1


def test_one_label_serves_one_class():
    match = match_labels([np.where(TRUE > 0, 1, 0).astype(np.uint8)], [TRUE])
    assert sorted(match.per_class.values()) == [0, 0.5, 1]
    assert match.mean_iou == pytest.approx(0.5)


def test_counts_are_pooled_over_images_and_absent_classes_left_out():
    match = match_labels(
        iter([TRUE, np.zeros_like(TRUE)]), iter([TRUE, np.where(TRUE == 1, 1, 0).astype(np.uint8)])
    )
    assert match.per_class == {0: pytest.approx(10 / 12), 1: pytest.approx(0.5), 2: 1}


def test_mistakes():
    with pytest.raises(ValueError, match="no label maps"):
        match_labels([], [])
    with pytest.raises(ValueError, match="true one"):
        match_labels([TRUE], [TRUE[:1]])
    with pytest.raises(ValueError):
        match_labels([TRUE, TRUE], [TRUE])
