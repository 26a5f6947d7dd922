"""Random splits in which every user and item that is held out also occurs in train (section 4.1)."""

import logging
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from .errors import DataError, show_names

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


def random_split(dataset: Dataset, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> DatasetDict:
    """
    Split records at random so that every user and item of validation and test also occurs in train.

    The guarantee is exact. The sizes are the asked ones, rounded down, unless the records are so sparse that
    train has to keep more of them; validation and test are then as large as the guarantee allows, and a
    warning says so. The order of the records is kept within each split.

    Args:
        dataset ([`~datasets.Dataset`]): The records. The columns `user` and `item` are read; all are kept.
        fractions (`Sequence[float]`, defaults to `(0.8, 0.1, 0.1)`): The shares of train, validation and
            test: each greater than 0, summing to 1.
        seed (`int`, defaults to 0): The same seed and records give the same split.

    Returns:
        [`~datasets.DatasetDict`]: The splits `train`, `validation` and `test`.

    Raises:
        DataError: `dataset` is not a `Dataset`, lacks a column, holds a missing id, or cannot give a
            validation and a test split that are not empty; or `fractions` or `seed` is not valid.
    """
    if not isinstance(dataset, Dataset):
        hint = " Did you mean dataset['train']?" if isinstance(dataset, DatasetDict) else " Make it a Dataset first."
        raise DataError(f"random_split: expected a Dataset, but got a value of type {type(dataset).__name__}.{hint}")
    missing = [name for name in ("user", "item") if name not in dataset.column_names]
    if missing:
        raise DataError(
            "random_split: expected the columns 'user' and 'item', but got "
            f"{show_names(dataset.column_names)}. Rename columns to {show_names(missing)}, or read the "
            "records with load_records."
        )
    table = dataset.select_columns(["user", "item"]).with_format("arrow")[:]
    parts = split_indices(table["user"].to_pandas(), table["item"].to_pandas(), fractions, seed)
    return DatasetDict({name: dataset.select(rows) for name, rows in zip(SPLITS, parts, strict=True)})


def split_indices(
    users: pd.Series, items: pd.Series, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Choose the rows of [`random_split`].

    Args:
        users (`pd.Series` of length `num_records`): The user id of each record.
        items (`pd.Series` of length `num_records`): The item id of each record.
        fractions (`Sequence[float]`, defaults to `(0.8, 0.1, 0.1)`): As in [`random_split`].
        seed (`int`, defaults to 0): As in [`random_split`].

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: The row numbers, counted from 0 and ascending, of train,
        validation and test.

    Raises:
        DataError: As [`random_split`] does.
    """
    _check_fractions(fractions)
    num_records = len(users)
    # Rounded down: 8,215 records at 8:1:1 give 6,573 / 821 / 821.
    wanted = [max(1, math.floor(num_records * share + 1e-9)) for share in fractions[1:]]
    held_out = held_out_rows(users, items, sum(wanted), seed)
    if len(held_out) < 2:
        raise DataError(
            f"random split: expected records that leave one for validation and one for test, but of "
            f"{num_records} records only {len(held_out)} can be held out: the user or the item of every "
            "other one would be missing from train. Add records, or drop users and items that occur only "
            "once."
        )
    num_validation = wanted[0]
    if len(held_out) < sum(wanted):
        num_validation = round(len(held_out) * wanted[0] / sum(wanted))
        num_validation = min(max(num_validation, 1), len(held_out) - 1)
        logger.warning(
            "random split: validation and test hold %d of %d records instead of %d, because train has to "
            "keep every user and item at least once",
            len(held_out),
            num_records,
            sum(wanted),
        )
    train = np.ones(num_records, dtype=bool)
    train[held_out] = False
    return np.flatnonzero(train), np.sort(held_out[:num_validation]), np.sort(held_out[num_validation:])


def held_out_rows(users: pd.Series, items: pd.Series, size: int, seed: int = 0) -> np.ndarray:
    """
    Choose at random up to `size` rows whose users and items all occur in the rows that are left.

    Args:
        users (`pd.Series` of length `num_records`): The user id of each record.
        items (`pd.Series` of length `num_records`): The item id of each record.
        size (`int`): How many rows to hold out.
        seed (`int`, defaults to 0): Seed of the choice.

    Returns:
        `np.ndarray` of `int64`: The chosen row numbers, counted from 0, in random order: `size` of them, or
        as many as can be held out at all.

    Raises:
        DataError: An id is missing, or `seed` is not a whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise DataError(f"expected a seed that is a whole number of at least 0, but got {seed!r}. Pass 0.")
    user_codes, item_codes = _codes(users, "user"), _codes(items, "item")
    order = np.random.default_rng(seed).permutation(len(user_codes))
    chosen = _take_greedily(user_codes, item_codes, order, size)
    if len(chosen) < size:
        # Taking rows in any order can end early on very sparse data. The largest set that can be held out is
        # the complement of a smallest set of rows that covers every user and item.
        cover = _smallest_cover(user_codes, item_codes, order)
        chosen = order[~np.isin(order, cover)][:size]
    return chosen


def _check_fractions(fractions: Sequence[float]) -> None:
    if (
        len(fractions) != 3
        or not all(math.isfinite(share) and share > 0 for share in fractions)
        or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6)
    ):
        raise DataError(
            "random split: expected three fractions greater than 0 that sum to 1 (train, validation, test), "
            f"but got {tuple(fractions)}. Pass (0.8, 0.1, 0.1), for example."
        )


def _codes(ids: pd.Series, name: str) -> np.ndarray:
    codes, _ = pd.factorize(ids)
    if (codes < 0).any():
        row = int(np.flatnonzero(codes < 0)[0]) + 1
        raise DataError(
            f"random split: expected an id in every row, but column {name!r} has {int((codes < 0).sum())} "
            f"missing values, the first in row {row}. Drop these records."
        )
    return codes


def _take_greedily(user_codes: np.ndarray, item_codes: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Take rows in the given order, as long as their user and item still occur in another row."""
    # Plain lists: indexing them one at a time is several times faster than indexing arrays.
    user_left = np.bincount(user_codes).tolist()
    item_left = np.bincount(item_codes).tolist()
    chosen: list[int] = []
    for row, user, item in zip(order.tolist(), user_codes[order].tolist(), item_codes[order].tolist(), strict=True):
        if len(chosen) == size:
            break
        if user_left[user] > 1 and item_left[item] > 1:
            user_left[user] -= 1
            item_left[item] -= 1
            chosen.append(row)
    return np.asarray(chosen, dtype=np.int64)


def _smallest_cover(user_codes: np.ndarray, item_codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """
    Return a smallest set of rows in which every user and item occurs: a largest matching of users and items,
    and one row for each user and item outside it (Gallai's theorem).
    """
    # Imported here: only very sparse data gets this far.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    # The first row of each pair in random order stands for it.
    pairs = user_codes[order].astype(np.int64) * (int(item_codes.max()) + 1) + item_codes[order]
    rows = order[np.sort(np.unique(pairs, return_index=True)[1])]
    users, items = user_codes[rows], item_codes[rows]
    matched_item = maximum_bipartite_matching(
        csr_matrix((np.ones(len(rows), dtype=np.int8), (users, items))), perm_type="column"
    )
    in_matching = matched_item[users] == items
    cover = [rows[in_matching]]
    for codes in (users, items):
        covered = np.zeros(int(codes.max()) + 1, dtype=bool)
        covered[codes[in_matching]] = True
        alone = np.flatnonzero(~covered[codes])
        cover.append(rows[alone[np.unique(codes[alone], return_index=True)[1]]])
    return np.concatenate(cover)
