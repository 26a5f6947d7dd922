"""Load explainable-recommendation records, checked, into the splits train, validation and test."""

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, NamedSplit

from .checks import COLUMNS, REQUIRED, TITLE, check_columns, clean_split_names, clean_table, closest_column
from .errors import DataError, show_names, show_value
from .published import REVIEWS_FILE, is_published, read_published
from .readers import RawRecords, read_source
from .splits import SPLITS, held_out_rows, split_indices

logger = logging.getLogger(__name__)

__all__ = ["DataError", "load_records"]

_SPLIT_COLUMN = "split"


def load_records(
    source: str | os.PathLike[str] | Dataset | Mapping[str, Dataset],
    *,
    column_mapping: dict[str, str] | None = None,
    rating_levels: Sequence[float] = (1, 2, 3, 4, 5),
    unknown_held_out: Literal["error", "drop"] = "error",
    split_seed: int = 0,
    index_folder: str | None = None,
) -> DatasetDict:
    """
    Load records, check every value, and make sure that there are three splits that fit together (3.1).

    A record that repeats an earlier one (same user, item, rating and explanation) is dropped, with a warning: within a
    split it would count twice, and of train and a held-out split the latter would test what was learned by heart. Those
    of train stay, and a held-out split that has no others stays whole. Pairs of which train and a held-out split have
    different texts are kept, and counted in a warning.

    A source without splits is split by its column `split` where it has one, else 8:1:1 at random with
    [`random_split`]. Where only validation or only test is missing, it is cut out of train, with a warning.

    Args:
        source (`str`, `os.PathLike`, [`~datasets.Dataset`], [`~datasets.DatasetDict`] or `dict`):
            A `.jsonl`, `.json` (JSON lines or an array), `.csv` or `.parquet` file; a folder with such files
            named `train`, `validation` (or `valid`, `val`, `dev`) and `test`, whose other files are left
            alone; a folder with `reviews.pickle` and index files, as published with PETER and PEPLER
            ([`read_published`]); a `Dataset` or a dict of them by split; a folder written by `save_to_disk`; or a
            Hub id.
        column_mapping (`dict[str, str]`, *optional*): The source's names of our columns where they differ,
            such as `{"user": "reviewerID"}`. Keys: `user`, `item`, `rating`, `feature`, `explanation`,
            `item_title`, `split`.
        rating_levels (`Sequence[float]`, defaults to `(1, 2, 3, 4, 5)`): The ratings that may occur.
        unknown_held_out (`"error"` or `"drop"`, defaults to `"error"`): What to do with records of validation
            and test whose user or item train does not have: no model can know these.
        split_seed (`int`, defaults to 0): Seed of a random split.
        index_folder (`str`, *optional*): Beside `reviews.pickle`, the sub-folder whose index files are taken; by
            default the folder itself where it has any, else `"1"`.

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation` and `test`, each with the columns `user` (string),
        `item` (string), `rating` (float64), `feature` (list of strings, empty where the source has none) and
        `explanation` (string), and `item_title` (string) where the source has it, with the rows in the source's
        order. Ids that are numbers become strings (`"3"`, of 3 and of 3.0); as floats from 2^53 on they have lost
        digits and are refused.

    Raises:
        DataError: The source cannot be read, a column is missing, values are bad, or the splits do not fit
            together. The message names the file or split, rows (counted from 1; lines of a JSON Lines file)
            and column.
    """
    levels = _check_levels(rating_levels)
    if unknown_held_out not in ("error", "drop"):
        raise DataError(f"expected unknown_held_out 'error' or 'drop', but got {unknown_held_out!r}. Pass 'error'.")
    names = _resolve_names(column_mapping)
    asked = {ours: names[ours] for ours in names if ours in REQUIRED or ours in (column_mapping or {})}

    parts = _read_parts(source, set(names.values()), index_folder)
    is_unsplit = set(parts) == {"train"}
    if not is_unsplit:
        # A data set that has splits needs no column that names them.
        asked.pop(_SPLIT_COLUMN, None)
    for part in parts.values():
        check_columns(part, asked)
        _warn_feature_name(part, names.get("feature"))
    tables = {split: clean_table(part, names, levels) for split, part in parts.items()}
    if is_unsplit:
        tables = _divide(parts["train"], tables["train"], names.get(_SPLIT_COLUMN))
    tables = _drop_repeats(tables)
    tables = _complete_splits(tables, split_seed)
    tables = _check_held_out(tables, drop=unknown_held_out == "drop")
    _warn_repeated_pairs(tables)
    return DatasetDict({split: Dataset(tables[split], split=NamedSplit(split)) for split in SPLITS})


def _read_parts(source: Any, wanted: Collection[str], index_folder: str | None) -> dict[str, RawRecords]:
    if is_published(source):
        return read_published(source, wanted, index_folder)
    if index_folder is not None:
        raise DataError(
            f"expected no index_folder, which is for a folder with {REVIEWS_FILE}, but got {index_folder!r} with "
            f"{show_value(source)}. Leave it out."
        )
    return read_source(source, wanted)


def _check_levels(rating_levels: Sequence[float]) -> list[float]:
    try:
        levels = sorted({float(level) for level in rating_levels})
    except (TypeError, ValueError, OverflowError):
        levels = []
    if len(levels) < 2 or not all(map(math.isfinite, levels)):
        raise DataError(
            f"expected rating_levels with at least two different finite numbers, but got {rating_levels!r}. "
            "Pass (1, 2, 3, 4, 5), for example."
        )
    return levels


def _resolve_names(column_mapping: Mapping[str, str] | None) -> dict[str, str]:
    """Return the source's name of each of our columns, without the optional ones that cannot be there."""
    names = {name: name for name in (*COLUMNS, TITLE, _SPLIT_COLUMN)}
    mapping = dict(column_mapping or {})
    unknown = [name for name in mapping if name not in names]
    if unknown:
        is_swapped = any(isinstance(value, str) and value in names for value in mapping.values())
        hint = " Did you swap keys and values?" if is_swapped else ""
        raise DataError(
            f"column_mapping: expected keys among {', '.join(names)}, but got {show_names(unknown)}. Map our "
            f"name to the source's, as in {{'user': 'reviewerID'}}.{hint}"
        )
    bad = [name for name, theirs in mapping.items() if not isinstance(theirs, str)]
    if bad:
        raise DataError(
            f"column_mapping: expected one column name for each key, but got {mapping[bad[0]]!r} for "
            f"{bad[0]!r}. Pass a string."
        )
    names.update(mapping)
    for ours in ("feature", TITLE, _SPLIT_COLUMN):
        # An optional column that was not mapped must not read a column that now stands for another one.
        if ours not in mapping and ours in mapping.values():
            del names[ours]
    used = list(names.values())
    twice = sorted({theirs for theirs in used if used.count(theirs) > 1})
    if twice:
        raise DataError(
            f"column_mapping: expected a different column for each name, but got {show_names(twice)} more "
            "than once. Map every name to its own column."
        )
    return names


def _warn_feature_name(part: RawRecords, name: str | None) -> None:
    if name is None or name in part.found:
        return
    guess = closest_column("feature", "feature", part.found)
    if guess is not None:
        logger.warning(
            "%s: there is no column 'feature', so the records have no feature; if %r holds it, pass "
            "column_mapping={'feature': %r}",
            part.where,
            guess,
            guess,
        )


def _divide(part: RawRecords, table: pa.Table, split_column: str | None) -> dict[str, pa.Table]:
    """Divide records without splits by their column that names the split, if there is one."""
    if split_column not in part.columns:
        return {"train": table}
    of_row = clean_split_names(part, split_column)
    if "train" not in of_row:
        raise DataError(
            f"{part.where}: column {split_column!r}: expected rows of the split 'train', but got only "
            f"{show_names(sorted(set(of_row.tolist())))}. Name the training rows 'train'."
        )
    return {split: table.filter(pa.array(of_row == split)) for split in SPLITS if split in of_row}


def _complete_splits(tables: dict[str, pa.Table], seed: int) -> dict[str, pa.Table]:
    """Split records that are all of train at random, or cut the one split that is missing out of train."""
    train = tables["train"]
    users, items = train["user"].to_pandas(), train["item"].to_pandas()
    if set(tables) == {"train"}:
        rows = split_indices(users, items, seed=seed)
        return {split: train.take(pa.array(part)) for split, part in zip(SPLITS, rows, strict=True)}
    missing = [split for split in SPLITS if split not in tables]
    if not missing:
        return tables
    # A ninth: the rest of an 8:1:1 split is 9 parts, of which the missing one is 1.
    cut = np.sort(held_out_rows(users, items, max(1, len(users) // 9), seed))
    if not len(cut):
        raise DataError(
            f"expected a split {missing[0]!r}, or a train split that it can be cut from, but every record of "
            f"train is the only one of its user or item. Pass a split {missing[0]!r}."
        )
    logger.warning(
        "there is no split %r: cutting %d of the %d records of train out for it, at random with seed %d",
        missing[0],
        len(cut),
        len(users),
        seed,
    )
    kept = np.setdiff1d(np.arange(len(users)), cut)
    return {**tables, "train": train.take(pa.array(kept)), missing[0]: train.take(pa.array(cut))}


def _check_held_out(tables: dict[str, pa.Table], *, drop: bool) -> dict[str, pa.Table]:
    """Refuse or drop held-out records whose user or item train does not have."""
    known = {name: pc.unique(tables["train"][name]) for name in ("user", "item")}
    checked = {"train": tables["train"]}
    problems = []
    for split in SPLITS[1:]:
        table = tables[split]
        unknown = {name: pc.invert(pc.is_in(table[name], value_set=known[name])) for name in known}
        either = pc.or_(unknown["user"], unknown["item"])
        count = pc.sum(either).as_py()
        checked[split] = table.filter(pc.invert(either)) if count else table
        if not count:
            continue
        ids = {name: pc.unique(table[name].filter(unknown[name])).to_pylist() for name in known}
        listed = ", ".join(
            f"{len(ids[name])} {name}{'s' if len(ids[name]) > 1 else ''} ({show_names(ids[name], limit=3)})"
            for name in known
            if ids[name]
        )
        problem = f"{count} of {table.num_rows} records of {split} have {listed} that train doesn't have"
        problems.append(problem)
        if not drop:
            continue
        logger.warning("dropping unknown_held_out: %s", problem)
        if count == table.num_rows:
            raise DataError(
                f"expected at least one record of {split} whose user and item occur in train, but {problem}, "
                "and unknown_held_out='drop' leaves none. Check that the splits are of the same data."
            )
    if problems and not drop:
        raise DataError(
            "expected every user and item of validation and test to occur in train, but "
            f"{'; '.join(problems)}. Pass unknown_held_out='drop' to leave these records out, or pass all "
            "records without splits to have them split so that this holds."
        )
    return checked


def _drop_repeats(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Drop records that an earlier one, of train before validation and test, holds already."""
    names = [split for split in SPLITS if split in tables]
    key = ["user", "item", "rating", "explanation"]
    frame = pd.concat([tables[split].select(key).to_pandas() for split in names], ignore_index=True)
    ends = np.cumsum([tables[split].num_rows for split in names])
    checked = {}
    for split, repeated in zip(names, np.split(frame.duplicated().to_numpy(), ends[:-1]), strict=True):
        # All of them: the same records are passed twice on purpose, to see a model learn by heart
        checked[split] = tables[split] if repeated.all() else tables[split].filter(pa.array(~repeated))
        if repeated.any():
            first = tables[split].slice(int(repeated.argmax()), 1).to_pylist()[0]
            logger.warning(
                "%s %d of %d records of %s that repeat an earlier one, of train before the others: the same user, "
                "item, rating and explanation, such as user %r and item %r",
                "keeping all" if repeated.all() else "dropping",
                repeated.sum(),
                len(repeated),
                split,
                first["user"],
                first["item"],
            )
    return checked


def _warn_repeated_pairs(tables: dict[str, pa.Table]) -> None:
    """Warn of pairs of user and item that several splits have, with other texts or even other ratings."""
    frames = [
        tables[split].select(["user", "item", "rating"]).to_pandas().assign(split=number)
        for number, split in enumerate(SPLITS)
    ]
    frame = pd.concat(frames, ignore_index=True)
    user_codes, item_codes = (pd.factorize(frame[name])[0].astype(np.int64) for name in ("user", "item"))
    frame["pair"] = user_codes * (int(item_codes.max()) + 1) + item_codes
    frame = frame[frame["pair"].duplicated(keep=False)]
    if frame.empty:
        return
    varied = frame.groupby("pair")[["rating", "split"]].nunique()
    in_train = set(frame.loc[frame["split"] == 0, "pair"])
    leaking = frame[(frame["split"] > 0) & frame["pair"].isin(in_train)]
    if len(leaking):
        logger.warning(
            "%d records of validation and test are of pairs of user and item that train has with another explanation "
            "or rating, such as user %r and item %r: they are kept, but are no test of new pairs",
            len(leaking),
            leaking.iloc[0]["user"],
            leaking.iloc[0]["item"],
        )
    contradicting = varied.index[(varied["rating"] > 1) & (varied["split"] > 1)]
    if not len(contradicting):
        return
    rows = frame[frame["pair"].isin(contradicting)]
    first = rows.iloc[0]
    logger.warning(
        "%d pairs of user and item (%d records) have different ratings in different splits, such as user %r "
        "and item %r: a model cannot get both right",
        len(contradicting),
        len(rows),
        first["user"],
        first["item"],
    )
