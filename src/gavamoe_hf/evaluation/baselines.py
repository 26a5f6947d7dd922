"""
Rating baselines: the floors that a rating model has to beat, in the RMSE and MAE of its predictions.

Both have one signature, `fit(users, items, ratings, validation=None)` and `predict(users, items)`.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .rating_metrics import rating_errors

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("user", "item", "rating")

Triples = tuple[Sequence[Hashable], Sequence[Hashable], Sequence[float]]


def _check_lengths(users: Sequence[Hashable], items: Sequence[Hashable]) -> None:
    if len(users) != len(items):
        raise ValueError(
            f"expected one item for each user, but got {len(users)} users and {len(items)} items. "
            "Pass both in the order of the same records."
        )


def _check_triples(users: Sequence[Hashable], items: Sequence[Hashable], ratings: Sequence[float]) -> np.ndarray:
    """Return the ratings as an array once the three columns are known to pair up."""
    _check_lengths(users, items)
    values = np.asarray(ratings, dtype=np.float64)
    if values.shape != (len(users),) or not len(users):
        raise ValueError(
            "expected one rating for each of at least one (user, item) pair, but got ratings of shape "
            f"{values.shape} for {len(users)} pairs. Pass the three columns of one non-empty split."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"expected finite ratings, but got {int((~np.isfinite(values)).sum())} that are NaN or infinite. "
            "Drop records without a rating."
        )
    return values


class MeanBaseline:
    """
    Predicts the mean rating of the training records for every pair.

    Attributes:
        mean_ (`float` or `None`): The mean rating; `None` before [`~MeanBaseline.fit`].
    """

    def __init__(self) -> None:
        self.mean_: float | None = None

    def fit(
        self,
        users: Sequence[Hashable],
        items: Sequence[Hashable],
        ratings: Sequence[float],
        validation: Triples | None = None,
    ) -> "MeanBaseline":
        """
        Compute the mean rating.

        Args:
            users (`Sequence[Hashable]`):
                User id of each record.
            items (`Sequence[Hashable]`):
                Item id of each record.
            ratings (`Sequence[float]`):
                Rating of each record.
            validation (`tuple`, *optional*):
                Unused: there is nothing to choose. Present so that all baselines have one signature.

        Returns:
            [`MeanBaseline`]: The baseline itself.

        Raises:
            `ValueError`: If the lengths differ, if there is no record, or if a rating is not finite.
        """
        self.mean_ = float(_check_triples(users, items, ratings).mean())
        return self

    def predict(self, users: Sequence[Hashable], items: Sequence[Hashable]) -> np.ndarray:
        """
        Predict a rating for each pair.

        Args:
            users (`Sequence[Hashable]`):
                User ids.
            items (`Sequence[Hashable]`):
                Item ids, in the same order.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`: The training mean, repeated.

        Raises:
            `RuntimeError`: If the baseline is not fitted.
            `ValueError`: If the lengths differ.
        """
        _check_lengths(users, items)
        return np.full(len(users), _fitted(self.mean_, "MeanBaseline"))


class BiasBaseline:
    """
    Predicts mean + user bias + item bias, each bias shrunk towards zero by the number of ratings behind it:

        b_i = sum over the item's ratings of (r - mean) / (n_i + reg_item)
        b_u = sum over the user's ratings of (r - mean - b_i) / (n_u + reg_user)

    Predictions are not clipped to the rating scale.

    Args:
        reg_item (`float`, *optional*, defaults to 10.0):
            Shrinkage of the item biases, in ratings. Used where `fit` is given no validation split.
        reg_user (`float`, *optional*, defaults to 10.0):
            Shrinkage of the user biases, in ratings. Used where `fit` is given no validation split.
        grid (`Sequence[float]`, *optional*, defaults to `(1.0, 3.0, 10.0, 30.0, 100.0)`):
            Values of each shrinkage that are tried on a validation split.

    Attributes:
        mean_ (`float` or `None`): Mean rating of the training records; `None` before [`~BiasBaseline.fit`].
        reg_item_ (`float`): Shrinkage of the item biases in use.
        reg_user_ (`float`): Shrinkage of the user biases in use.

    Raises:
        `ValueError`: If a shrinkage is negative or the grid is empty.
    """

    def __init__(
        self,
        reg_item: float = 10.0,
        reg_user: float = 10.0,
        grid: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
    ) -> None:
        if len(grid) == 0 or min(reg_item, reg_user, *grid) < 0:
            raise ValueError(
                "expected shrinkages of at least 0 and a grid of at least one, but got "
                f"reg_item={reg_item}, reg_user={reg_user}, grid={tuple(grid)}. Use for example the defaults."
            )
        self.reg_item, self.reg_user, self.grid = reg_item, reg_user, tuple(grid)
        self.reg_item_, self.reg_user_ = reg_item, reg_user
        self.mean_: float | None = None
        self._users: dict[Hashable, int] = {}
        self._items: dict[Hashable, int] = {}
        self._user_bias = np.zeros(1)
        self._item_bias = np.zeros(1)

    def fit(
        self,
        users: Sequence[Hashable],
        items: Sequence[Hashable],
        ratings: Sequence[float],
        validation: Triples | None = None,
    ) -> "BiasBaseline":
        """
        Estimate the biases; with a validation split, choose the two shrinkages by its RMSE first.

        The biases are of the training records alone in either case. Of two choices with the same RMSE the
        stronger shrinkage is kept, the item's first.

        Args:
            users (`Sequence[Hashable]`):
                User id of each record.
            items (`Sequence[Hashable]`):
                Item id of each record.
            ratings (`Sequence[float]`):
                Rating of each record.
            validation (`tuple[Sequence[Hashable], Sequence[Hashable], Sequence[float]]`, *optional*):
                Users, items and ratings of the validation split. Without it `reg_item` and `reg_user` hold.

        Returns:
            [`BiasBaseline`]: The baseline itself.

        Raises:
            `ValueError`: If the lengths differ, if there is no record, or if a rating is not finite.
        """
        values = _check_triples(users, items, ratings)
        if validation is not None:
            _check_triples(*validation)
        self.mean_ = float(values.mean())
        self._users = {user: index for index, user in enumerate(dict.fromkeys(users))}
        self._items = {item: index for index, item in enumerate(dict.fromkeys(items))}
        user_index, item_index = _lookup(users, self._users), _lookup(items, self._items)

        if validation is None:
            self._estimate(user_index, item_index, values, self.reg_item, self.reg_user)
            return self
        best_rmse, best = float("inf"), (self.reg_item, self.reg_user)
        descending = sorted(self.grid, reverse=True)
        for reg_item, reg_user in product(descending, descending):
            self._estimate(user_index, item_index, values, reg_item, reg_user)
            rmse = rating_errors(self.predict(validation[0], validation[1]), validation[2])["rating_rmse"]
            if rmse < best_rmse:
                best_rmse, best = rmse, (reg_item, reg_user)
        self._estimate(user_index, item_index, values, *best)
        return self

    def _estimate(
        self,
        user_index: np.ndarray,
        item_index: np.ndarray,
        ratings: np.ndarray,
        reg_item: float,
        reg_user: float,
    ) -> None:
        self.reg_item_, self.reg_user_ = reg_item, reg_user
        residual = ratings - self.mean_  # [num_records]
        self._item_bias = _shrunken_means(item_index, residual, len(self._items), reg_item)
        residual = residual - self._item_bias[item_index]
        self._user_bias = _shrunken_means(user_index, residual, len(self._users), reg_user)

    def predict(self, users: Sequence[Hashable], items: Sequence[Hashable]) -> np.ndarray:
        """
        Predict a rating for each pair.

        Args:
            users (`Sequence[Hashable]`):
                User ids; the bias of one that was not in training is 0.
            items (`Sequence[Hashable]`):
                Item ids, in the same order; the bias of one that was not in training is 0. A pair of two
                unknown ids gets the mean.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`: Predicted ratings, in stars.

        Raises:
            `RuntimeError`: If the baseline is not fitted.
            `ValueError`: If the lengths differ.
        """
        _check_lengths(users, items)
        mean = _fitted(self.mean_, "BiasBaseline")
        return mean + self._user_bias[_lookup(users, self._users)] + self._item_bias[_lookup(items, self._items)]


def _fitted(mean: float | None, name: str) -> float:
    if mean is None:
        raise RuntimeError(f"expected a fitted {name}, but got one that is not. Call `fit` before `predict`.")
    return mean


def _lookup(ids: Sequence[Hashable], index: dict[Hashable, int]) -> np.ndarray:
    """Return the index of each id, -1 where it is unknown."""
    return np.fromiter((index.get(key, -1) for key in ids), dtype=np.int64, count=len(ids))


def _shrunken_means(groups: np.ndarray, values: np.ndarray, num_groups: int, shrinkage: float) -> np.ndarray:
    """Return each group's sum / (count + shrinkage), and a last entry of 0 for index -1, unknown ids."""
    sums = np.bincount(groups, weights=values, minlength=num_groups)
    counts = np.bincount(groups, minlength=num_groups)
    return np.append(sums / (counts + shrinkage), 0.0)


def _triples(split: "Mapping[str, Sequence[Any]] | Dataset", name: str) -> Triples:
    """Return the columns user, item and rating of a split."""
    columns = getattr(split, "column_names", None)
    if columns is None and isinstance(split, Mapping):
        columns = list(split)
    # A DatasetDict's `column_names` maps each of its splits to the split's columns.
    if isinstance(columns, dict):
        raise ValueError(
            f"expected `{name}` to be one split, but got a DatasetDict of {', '.join(columns)}. "
            f'Did you mean `{name}=dataset["{name}"]`?'
        )
    if columns is None or not set(_COLUMNS) <= set(columns):
        got = type(split).__name__ if columns is None else f"the columns {', '.join(columns) or 'none'}"
        raise ValueError(
            f"expected `{name}` to be a Dataset or a mapping with the columns {', '.join(_COLUMNS)}, "
            f"but got {got}. Rename the columns, or turn a list of records into a Dataset with "
            "`Dataset.from_list`."
        )
    return list(split["user"]), list(split["item"]), list(split["rating"])


def baseline_scores(
    train: "Mapping[str, Sequence[Any]] | Dataset",
    validation: "Mapping[str, Sequence[Any]] | Dataset | None",
    test: "Mapping[str, Sequence[Any]] | Dataset",
) -> dict[str, float]:
    """
    Fit both baselines on the training split and score them on the test split.

    Args:
        train (`Mapping[str, Sequence]` or `datasets.Dataset`):
            Training records with the columns user, item and rating.
        validation (`Mapping[str, Sequence]` or `datasets.Dataset`, *optional*):
            Validation records that choose the shrinkage of [`BiasBaseline`]; with `None` its defaults hold.
        test (`Mapping[str, Sequence]` or `datasets.Dataset`):
            Test records.

    Returns:
        `dict[str, float]`: `baseline_mean_rmse`, `baseline_mean_mae`, `baseline_bias_rmse` and
        `baseline_bias_mae`, in stars.

    Raises:
        `ValueError`: If a split lacks a column, is empty, or holds a rating that is not finite.
    """
    training = _triples(train, "train")
    held_out = _triples(validation, "validation") if validation is not None else None
    users, items, ratings = _triples(test, "test")
    scores = {}
    for name, baseline in (("mean", MeanBaseline()), ("bias", BiasBaseline())):
        baseline.fit(*training, validation=held_out)
        errors = rating_errors(baseline.predict(users, items), ratings)
        scores[f"baseline_{name}_rmse"] = errors["rating_rmse"]
        scores[f"baseline_{name}_mae"] = errors["rating_mae"]
    return scores
