"""Errors of predicted ratings (section 4.1 of arXiv 2410.11841)."""

from collections.abc import Sequence

import numpy as np


def _as_ratings(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """Return `values` as a one-dimensional float64 array, or say what is wrong with them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(
            f"expected `{name}` to be one-dimensional, a rating a record, but got shape {array.shape}. "
            "Pass a flat list or squeeze the array."
        )
    if array.size == 0:
        raise ValueError(f"expected at least one rating in `{name}`, but got none. Check that the split is not empty.")
    finite = np.isfinite(array)
    if not finite.all():
        position = int(np.argmin(finite))
        raise ValueError(
            f"expected finite ratings in `{name}`, but got {array[position]} at position {position}. "
            "Drop records without a rating, and check the model for divergence."
        )
    return array


def rating_errors(predicted: Sequence[float] | np.ndarray, actual: Sequence[float] | np.ndarray) -> dict[str, float]:
    """
    Root mean squared error and mean absolute error of predicted ratings, in stars.

    Args:
        predicted (`Sequence[float]` or `np.ndarray` of shape `(num_records,)`):
            Predicted ratings. They are scored as they are: neither rounded nor clipped to the rating scale.
        actual (`Sequence[float]` or `np.ndarray` of shape `(num_records,)`):
            True ratings, in the same order.

    Returns:
        `dict[str, float]`: `rating_rmse` and `rating_mae`; lower is better.

    Raises:
        `ValueError`: If the lengths differ, if there is no rating, or if a rating is NaN or infinite.

    Example:
        ```python
        >>> rating_errors([4.0, 2.0], [5, 2])["rating_mae"]
        0.5
        ```
    """
    predicted_ratings = _as_ratings(predicted, "predicted")
    actual_ratings = _as_ratings(actual, "actual")
    if predicted_ratings.size != actual_ratings.size:
        raise ValueError(
            "expected one predicted rating for each actual one, but got "
            f"{predicted_ratings.size} predicted and {actual_ratings.size} actual. "
            "Pass both in the order of the same records."
        )
    difference = predicted_ratings - actual_ratings
    return {
        "rating_rmse": float(np.sqrt(np.mean(difference**2))),
        "rating_mae": float(np.mean(np.abs(difference))),
    }
