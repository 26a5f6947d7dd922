"""Rating errors against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from gavamoe_hf.evaluation import rating_errors


def test_hand_worked() -> None:
    # Differences -1, 0, 2: squares 1, 0, 4, mean 5/3; absolute values 1, 0, 2, mean 1.
    errors = rating_errors([4.0, 2.0, 5.0], [5, 2, 3])
    assert errors == {"rating_rmse": pytest.approx(math.sqrt(5 / 3)), "rating_mae": pytest.approx(1.0)}
    assert all(type(value) is float for value in errors.values())


def test_exact_predictions() -> None:
    assert rating_errors([3, 3, 3], [3, 3, 3]) == {"rating_rmse": 0.0, "rating_mae": 0.0}


def test_predictions_outside_the_scale_are_not_clipped() -> None:
    assert rating_errors([7.0], [5])["rating_mae"] == pytest.approx(2.0)


@pytest.mark.parametrize("as_type", [tuple, np.array, torch.tensor])
def test_other_sequences(as_type) -> None:
    assert rating_errors(as_type([4.0, 2.0]), as_type([5.0, 2.0]))["rating_mae"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("predicted", "actual", "message"),
    [
        ([1.0, 2.0], [1.0], r"but got 2 predicted and 1 actual\. Pass both in the order"),
        ([], [], r"at least one rating in `predicted`, but got none\. Check"),
        (
            [[1.0], [2.0]],
            [1.0, 2.0],
            r"`predicted` to be one-dimensional.*but got shape \(2, 1\)\. Pass a flat",
        ),
        ([1.0, float("nan")], [1.0, 2.0], r"finite ratings in `predicted`, but got nan at position 1\. Drop"),
        ([1.0, 2.0], [float("inf"), 2.0], r"finite ratings in `actual`, but got inf at position 0\. Drop"),
    ],
)
def test_errors(predicted, actual, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rating_errors(predicted, actual)
