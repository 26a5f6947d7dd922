"""
Rating baselines: the floors that a rating model has to beat, in the RMSE and MAE of its predictions.

All have one signature, `fit(users, items, ratings, validation=None)` and `predict(users, items)`.
"""

from collections.abc import Hashable, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from ..version import install_hint
from .rating_metrics import rating_errors

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("user", "item", "rating")
_FACTORIZATION_GRID = {"num_factors": (5, 20), "reg": (0.02, 0.1, 0.4), "learning_rate": (0.005, 0.015, 0.05)}

Ids = Sequence[Hashable] | np.ndarray
Triples = tuple[Ids, Ids, Sequence[float]]


def require_baselines() -> None:
    """Raises `ImportError` where the package of [`MatrixFactorizationBaseline`] is missing, naming the extra."""
    if find_spec("surprise") is None:
        raise ImportError(
            "expected scikit-surprise, which factorises the ratings, but could not import surprise. "
            + install_hint("metrics")
        )


def _check_lengths(users: Ids, items: Ids) -> None:
    if len(users) != len(items):
        raise ValueError(
            f"expected one item for each user, but got {len(users)} users and {len(items)} items. "
            "Pass both in the order of the same records."
        )


def _check_triples(users: Ids, items: Ids, ratings: Sequence[float]) -> np.ndarray:
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
        users: Ids,
        items: Ids,
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

    def predict(self, users: Ids, items: Ids) -> np.ndarray:
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


class _TunedBaseline:
    """
    What the baselines with options share: ids to indices, and the choice of the options on a validation split.

    A subclass sets `_options`, those of the constructor, and `_candidates`, those to try, and has `_estimate`.
    """

    _options: tuple[Any, ...]
    _candidates: list[tuple[Any, ...]]

    def __init__(self) -> None:
        self.mean_: float | None = None
        self._users: dict[Hashable, int] = {}
        self._items: dict[Hashable, int] = {}

    def fit(
        self,
        users: Ids,
        items: Ids,
        ratings: Sequence[float],
        validation: Triples | None = None,
    ) -> Self:
        """
        Learn from the training records; with a validation split, choose the options by its RMSE first.

        What is learned is of the training records alone in either case. Of two choices with the same RMSE the first is
        kept.

        Args:
            users (`Sequence[Hashable]`):
                User id of each record.
            items (`Sequence[Hashable]`):
                Item id of each record.
            ratings (`Sequence[float]`):
                Rating of each record.
            validation (`tuple[Sequence[Hashable], Sequence[Hashable], Sequence[float]]`, *optional*):
                Users, items and ratings of the validation split. Without it the constructor's options hold.

        Returns:
            The baseline itself.

        Raises:
            `ValueError`: If the lengths differ, if there is no record, or if a rating is not finite.
            `ImportError`: If a package that the baseline needs is missing.
        """
        values = _check_triples(users, items, ratings)
        if validation is not None:
            _check_triples(*validation)
        self.mean_ = float(values.mean())
        self._users = {user: index for index, user in enumerate(dict.fromkeys(users))}
        self._items = {item: index for index, item in enumerate(dict.fromkeys(items))}
        records = self._prepare(_lookup(users, self._users), _lookup(items, self._items), values)

        best_rmse, choice = float("inf"), self._options
        if validation is not None:
            for candidate in self._candidates:
                self._estimate(records, *candidate)
                rmse = rating_errors(self.predict(validation[0], validation[1]), validation[2])["rating_rmse"]
                if rmse < best_rmse:
                    best_rmse, choice = rmse, candidate
        self._estimate(records, *choice)
        return self

    def predict(self, users: Ids, items: Ids) -> np.ndarray:
        """
        Predict a rating for each pair.

        Args:
            users (`Sequence[Hashable]`):
                User ids; the bias of one that was not in training is 0.
            items (`Sequence[Hashable]`):
                Item ids, in the same order; the bias of one that was not in training is 0. A pair of two
                unknown ids gets the mean.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`: Predicted ratings, in stars, not clipped to the rating scale.

        Raises:
            `RuntimeError`: If the baseline is not fitted.
            `ValueError`: If the lengths differ.
        """
        _check_lengths(users, items)
        mean = _fitted(self.mean_, type(self).__name__)
        return mean + self._deviation(_lookup(users, self._users), _lookup(items, self._items))

    def _prepare(self, user_index: np.ndarray, item_index: np.ndarray, ratings: np.ndarray) -> Any:
        return user_index, item_index, ratings

    def _estimate(self, records: Any, *options: Any) -> None:
        raise NotImplementedError

    def _deviation(self, user_index: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        """Predicted ratings less the mean, of indices of which -1 is unknown."""
        raise NotImplementedError


class BiasBaseline(_TunedBaseline):
    """
    Predicts mean + user bias + item bias, each bias shrunk towards zero by the number of ratings behind it:

        b_i = sum over the item's ratings of (r - mean) / (n_i + reg_item)
        b_u = sum over the user's ratings of (r - mean - b_i) / (n_u + reg_user)

    With a validation split, [`~BiasBaseline.fit`] chooses the two shrinkages; of two choices with the same RMSE the
    stronger is kept, the item's first.

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
        super().__init__()
        self.reg_item, self.reg_user, self.grid = reg_item, reg_user, tuple(grid)
        self.reg_item_, self.reg_user_ = reg_item, reg_user
        self._options = (reg_item, reg_user)
        # Of equal ones the stronger shrinkage is kept, the item's first
        self._candidates = list(product(sorted(grid, reverse=True), repeat=2))

    def _estimate(self, records: tuple[np.ndarray, ...], *options: Any) -> None:
        user_index, item_index, ratings = records
        self.reg_item_, self.reg_user_ = options
        residual = ratings - self.mean_  # [num_records]
        self._item_bias = _shrunken_means(item_index, residual, len(self._items), self.reg_item_)
        residual = residual - self._item_bias[item_index]
        self._user_bias = _shrunken_means(user_index, residual, len(self._users), self.reg_user_)

    def _deviation(self, user_index: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        return self._user_bias[user_index] + self._item_bias[item_index]


class MatrixFactorizationBaseline(_TunedBaseline):
    """
    Predicts mean + user bias + item bias + p_u . q_i, biased matrix factorisation (Koren et al., 2009): the `SVD` of
    Surprise (scikit-surprise, which the extra `metrics` brings), learned by stochastic gradient descent. Ratings are
    divided by their standard deviation for the fit, so that Surprise's learning rate suits any scale.

    Args:
        num_factors (`int`, *optional*, defaults to 20):
            Size of p_u and q_i. This and the next two are used where `fit` is given no validation split.
        reg (`float`, *optional*, defaults to 0.1):
            L2 regularisation of biases and factors.
        learning_rate (`float`, *optional*, defaults to 0.005):
            Step size of the 20 epochs. It regularises as well: sparse ratings want a small one, and who likes what is
            found by a large one.
        grid (`Mapping[str, Sequence]`, *optional*):
            Values of each that are tried on a validation split, in all combinations: by default `num_factors` 5 and
            20, `reg` 0.02, 0.1 and 0.4, `learning_rate` 0.005, 0.015 and 0.05.
        seed (`int`, *optional*, defaults to 0):
            Seed of the initial factors.

    Attributes:
        mean_ (`float` or `None`): Mean rating of the training records; `None` before the fit.
        num_factors_ (`int`), reg_ (`float`), learning_rate_ (`float`): What is in use.

    Raises:
        `ValueError`: If `num_factors` is less than 1, `reg` negative or `learning_rate` not positive, or if the grid
        lacks one.
    """

    def __init__(
        self,
        num_factors: int = 20,
        reg: float = 0.1,
        learning_rate: float = 0.005,
        grid: Mapping[str, Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        grid = dict(_FACTORIZATION_GRID if grid is None else grid)
        if set(grid) != set(_FACTORIZATION_GRID) or not all(map(len, grid.values())):
            raise ValueError(
                f"expected a grid with values of {', '.join(_FACTORIZATION_GRID)}, but got {grid}. Give each at least "
                "one value."
            )
        smallest_rate = min(learning_rate, *grid["learning_rate"])
        if min(num_factors, *grid["num_factors"]) < 1 or min(reg, *grid["reg"]) < 0 or smallest_rate <= 0:
            raise ValueError(
                "expected at least 1 factor, a regularisation of at least 0 and a positive learning rate, but got "
                f"num_factors={num_factors}, reg={reg}, learning_rate={learning_rate}, grid={grid}. Use for example "
                "the defaults."
            )
        super().__init__()
        self.num_factors, self.reg, self.learning_rate = num_factors, reg, learning_rate
        self.grid, self.seed = grid, seed
        self._options = num_factors, reg, learning_rate
        self.num_factors_, self.reg_, self.learning_rate_ = self._options
        self._candidates = list(product(*(grid[name] for name in _FACTORIZATION_GRID)))
        self._scale = 1.0

    def _prepare(self, user_index: np.ndarray, item_index: np.ndarray, ratings: np.ndarray) -> Any:
        require_baselines()
        from surprise import Dataset, Reader

        self._scale = float(ratings.std()) or 1.0
        frame = pd.DataFrame({"user": user_index, "item": item_index, "rating": ratings / self._scale})
        # The reader's scale only clips Surprise's own predictions, which are not used
        return Dataset.load_from_df(frame, Reader()).build_full_trainset()

    def _estimate(self, records: Any, *options: Any) -> None:
        from surprise import SVD

        self.num_factors_, self.reg_, self.learning_rate_ = options
        svd = SVD(
            n_factors=self.num_factors_, reg_all=self.reg_, lr_all=self.learning_rate_, random_state=self.seed
        ).fit(records)
        # In the order of our indices, and a last row of zeros for index -1, unknown ids
        user_rows = [records.to_inner_uid(index) for index in range(len(self._users))]
        item_rows = [records.to_inner_iid(index) for index in range(len(self._items))]
        self._user_bias, self._item_bias = np.append(svd.bu[user_rows], 0.0), np.append(svd.bi[item_rows], 0.0)
        self._user_factors = np.pad(svd.pu[user_rows], ((0, 1), (0, 0)))  # [num_users + 1, num_factors]
        self._item_factors = np.pad(svd.qi[item_rows], ((0, 1), (0, 0)))  # [num_items + 1, num_factors]

    def _deviation(self, user_index: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        products = np.einsum("ij,ij->i", self._user_factors[user_index], self._item_factors[item_index])
        return self._scale * (self._user_bias[user_index] + self._item_bias[item_index] + products)


def _fitted(mean: float | None, name: str) -> float:
    if mean is None:
        raise RuntimeError(f"expected a fitted {name}, but got one that is not. Call `fit` before `predict`.")
    return mean


def _lookup(ids: Ids, index: dict[Hashable, int]) -> np.ndarray:
    """Return the index of each id, -1 where it is unknown."""
    if isinstance(ids, np.ndarray):
        # Each id once: the pairs of a full ranking repeat a few ids millions of times
        codes, unique = pd.factorize(ids, use_na_sentinel=False)
        return _lookup(unique.tolist(), index)[codes]
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
    # A slice, since a column of a Dataset is slow to iterate over
    users, items, ratings = (list(split[column][:]) for column in _COLUMNS)
    return users, items, ratings


def baseline_scores(
    train: "Mapping[str, Sequence[Any]] | Dataset",
    validation: "Mapping[str, Sequence[Any]] | Dataset | None",
    test: "Mapping[str, Sequence[Any]] | Dataset",
) -> dict[str, float]:
    """
    Fit the baselines on the training split and score them on the test split.

    Args:
        train (`Mapping[str, Sequence]` or `datasets.Dataset`):
            Training records with the columns user, item and rating.
        validation (`Mapping[str, Sequence]` or `datasets.Dataset`, *optional*):
            Validation records that choose the options of [`BiasBaseline`] and [`MatrixFactorizationBaseline`]; with
            `None` their defaults hold.
        test (`Mapping[str, Sequence]` or `datasets.Dataset`):
            Test records.

    Returns:
        `dict[str, float]`: `baseline_mean_rmse`, `baseline_mean_mae`, `baseline_bias_rmse`, `baseline_bias_mae`,
        `baseline_mf_rmse` and `baseline_mf_mae`, in stars.

    Raises:
        `ImportError`: If scikit-surprise is missing.
        `ValueError`: If a split lacks a column, is empty, or holds a rating that is not finite.
    """
    training = _triples(train, "train")
    held_out = _triples(validation, "validation") if validation is not None else None
    users, items, ratings = _triples(test, "test")
    scores = {}
    for name, baseline in (
        ("mean", MeanBaseline()),
        ("bias", BiasBaseline()),
        ("mf", MatrixFactorizationBaseline()),
    ):
        baseline.fit(*training, validation=held_out)
        errors = rating_errors(baseline.predict(users, items), ratings)
        scores[f"baseline_{name}_rmse"] = errors["rating_rmse"]
        scores[f"baseline_{name}_mae"] = errors["rating_mae"]
    return scores
