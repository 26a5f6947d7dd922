"""random_split: sizes, and the guarantee that train knows every held-out user and item."""

import logging
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from gavamoe_hf.data import DataError, random_split
from gavamoe_hf.data.splits import held_out_rows


def make_dataset(pairs):
    users, items = zip(*pairs, strict=True)
    return Dataset.from_dict(
        {
            "user": [f"u{user}" for user in users],
            "item": [f"i{item}" for item in items],
            "row": range(len(users)),
        }
    )


def random_pairs(rng, num_records, num_users, num_items):
    return list(zip(rng.integers(num_users, size=num_records), rng.integers(num_items, size=num_records), strict=True))


def assert_fits(dataset, parts):
    """Every record is in one split, in order, and train knows every held-out user and item."""
    rows = [row for part in parts.values() for row in part["row"][:]]
    assert sorted(rows) == list(range(len(dataset)))
    for split, part in parts.items():
        assert part["row"][:] == sorted(part["row"])
        assert part.column_names == dataset.column_names
        for name in ("user", "item"):
            assert set(part[name][:]) <= set(parts["train"][name][:]), split


def largest_held_out(pairs):
    """The size of the largest set of rows that can be held out, by trying all of them."""
    users, items = ({pair[side] for pair in pairs} for side in (0, 1))
    for kept in range(len(pairs) + 1):
        for train in combinations(pairs, kept):
            if {pair[0] for pair in train} == users and {pair[1] for pair in train} == items:
                return len(pairs) - kept
    raise AssertionError("all rows together always do")


def test_sizes_of_dense_data_are_exact():
    rng = np.random.default_rng(0)
    dataset = make_dataset(random_pairs(rng, 8215, 200, 100))
    parts = random_split(dataset)
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 6573,
        "validation": 821,
        "test": 821,
    }
    assert_fits(dataset, parts)


@pytest.mark.parametrize("seed", range(8))
def test_sparse_data_keeps_the_guarantee(seed):
    rng = np.random.default_rng(seed)
    dataset = make_dataset(random_pairs(rng, 300, 120, 90))
    parts = random_split(dataset, seed=seed)
    assert_fits(dataset, parts)
    assert len(parts["validation"]) == len(parts["test"]) == 30


def test_fractions():
    dataset = make_dataset(random_pairs(np.random.default_rng(0), 1000, 20, 20))
    parts = random_split(dataset, fractions=(0.5, 0.2, 0.3))
    assert [len(part) for part in parts.values()] == [500, 200, 300]
    assert_fits(dataset, parts)


def test_small_data_still_gives_every_split():
    dataset = make_dataset([(0, 0), (0, 1), (1, 0), (1, 1)])
    parts = random_split(dataset)
    assert [len(part) for part in parts.values()] == [2, 1, 1]
    assert_fits(dataset, parts)


def test_seed_decides():
    dataset = make_dataset(random_pairs(np.random.default_rng(0), 500, 20, 20))
    first, again, other = (random_split(dataset, seed=seed) for seed in (1, 1, 2))
    for split in first:
        assert first[split].to_list() == again[split].to_list()
        assert first[split].to_list() != other[split].to_list()


def test_held_out_rows_are_spread_over_the_data():
    dataset = make_dataset(random_pairs(np.random.default_rng(0), 10_000, 20, 20))
    parts = random_split(dataset)
    for split in ("validation", "test"):
        halves = np.bincount(np.asarray(parts[split]["row"]) // 5000)
        # 500 expected in each half: more than 6 standard deviations away cannot be chance.
        assert abs(int(halves[0]) - 500) < 100


@pytest.mark.parametrize("seed", range(40))
def test_as_much_as_possible_is_held_out(seed):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, 9, int(rng.integers(2, 6)), int(rng.integers(2, 6)))
    users, items = (pd.Series(side) for side in zip(*pairs, strict=True))
    chosen = held_out_rows(users, items, len(pairs), seed)
    assert len(chosen) == len(set(chosen.tolist())) == largest_held_out(pairs)
    left = [pair for row, pair in enumerate(pairs) if row not in chosen]
    for side in (0, 1):
        assert {pair[side] for pair in left} == {pair[side] for pair in pairs}


def test_chain_is_cut_as_far_as_possible(caplog):
    # u0 - i0 - u1 - i1 - ...: taking rows in any order ends well before the half that can be held out.
    length = 3000
    pairs = [pair for number in range(length) for pair in ((number, number), (number + 1, number))]
    dataset = make_dataset(pairs)
    with caplog.at_level(logging.WARNING):
        parts = random_split(dataset, fractions=(0.4, 0.3, 0.3))
    assert_fits(dataset, parts)
    # 3001 users and 3000 items in a chain need 3001 rows.
    assert [len(part) for part in parts.values()] == [3001, 1500, 1499]
    assert "hold 2999 of 6000 records instead of 3600" in caplog.text


def test_too_sparse_data_is_refused():
    with pytest.raises(DataError, match=r"of 3 records only 0 can be held out: .*Add records, or drop users"):
        random_split(make_dataset([(0, 0), (1, 1), (2, 2)]))
    with pytest.raises(DataError, match=r"of 4 records only 1 can be held out"):
        random_split(make_dataset([(0, 0), (0, 1), (1, 0), (2, 2)]))


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)])
def test_bad_fractions(fractions):
    with pytest.raises(DataError, match=r"three fractions greater than 0 that sum to 1 .*Pass \(0\.8, 0\.1, 0\.1\)"):
        random_split(make_dataset([(0, 0)] * 20), fractions=fractions)


@pytest.mark.parametrize("seed", [-1, 1.0, None, True])
def test_bad_seed(seed):
    with pytest.raises(DataError, match=r"expected a seed that is a whole number of at least 0, but got"):
        random_split(make_dataset([(0, 0)] * 20), seed=seed)


def test_bad_dataset():
    dataset = make_dataset([(0, 0)] * 20)
    with pytest.raises(DataError, match=r"but got a value of type DatasetDict\. Did you mean dataset\['train'\]\?"):
        random_split(DatasetDict({"train": dataset}))
    with pytest.raises(DataError, match=r"'user' and 'item', but got 'user', 'asin', 'row'\. Rename columns to 'item'"):
        random_split(dataset.rename_column("item", "asin"))
    holes = Dataset.from_dict({"user": ["a", None, None], "item": ["x", "x", "x"]})
    with pytest.raises(DataError, match=r"column 'user' has 2 missing values, the first in row 2\. Drop"):
        random_split(holes)
