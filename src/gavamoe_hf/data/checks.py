"""Turn raw columns into clean ones: ids, ratings, features and explanations, with every bad row named."""

import ast
import difflib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import DataError, show_names, show_rows, show_value
from .readers import SPLIT_ALIASES, RawRecords

logger = logging.getLogger(__name__)

COLUMNS = ("user", "item", "rating", "feature", "explanation")
REQUIRED = ("user", "item", "rating", "explanation")
# Optional, and a column of the records only where the source has it
TITLE = "item_title"

# Names that published data sets use: only suggested in errors, never taken unasked.
_COMMON_NAMES = {
    "user": ("user_id", "userid", "reviewerid", "reviewer", "uid", "customer_id", "author"),
    "item": ("item_id", "itemid", "asin", "parent_asin", "business_id", "product_id", "movie_id", "iid"),
    "rating": ("overall", "stars", "score", "rate", "ratings", "review_rating"),
    "feature": ("features", "aspect", "aspects", "keyword", "keywords"),
    "explanation": ("reviewtext", "review", "text", "review_text", "sentence", "reason", "summary"),
}
_LEVEL_TOLERANCE = 1e-6
# More different ratings than this are no levels
LEVELS_SHOWN = 21
# From this share of ratings off the scale on, the scale is likely to be another one
_OTHER_SCALE = 0.05
# From here on, floats skip whole numbers: other ids have become the same one
_FLOAT_LIMIT = 2**53
_WHOLE_NUMBER = re.compile(r"-?\d+\.0+")
# How tables write whole numbers that were floats ("7.656119797098248e+16"), and spreadsheets long ones
_ROUNDED_NUMBER = re.compile(r"-?\d+(\.\d+)?e\+\d+", re.IGNORECASE)
# How table programs write an id that is missing, and a few people's names
_MISSING_WORDS = frozenset(("nan", "none", "null", "<na>", "n/a"))


def check_columns(records: RawRecords, names: Mapping[str, str]) -> None:
    """
    Check that every column that is needed, or was asked for, exists.

    Args:
        records ([`RawRecords`]): The records of one file or split.
        names (`Mapping[str, str]`): The name in the source of each of our columns that is needed or mapped.

    Raises:
        DataError: One is missing: the message names the closest columns that exist.
    """
    missing = [ours for ours, theirs in names.items() if theirs not in records.found]
    if not missing:
        return
    taken = set(names.values()) & set(records.found)
    free = [name for name in records.found if name not in taken]
    guesses = {ours: guess for ours in missing if (guess := closest_column(ours, names[ours], free))}
    asked = [names[ours] if names[ours] == ours else f"{names[ours]} (for {ours})" for ours in missing]
    remedy = "Rename the columns, or say which they are with column_mapping={'user': '...'}."
    if guesses:
        remedy = f"Did you mean column_mapping={guesses!r}?"
    raise DataError(
        f"{records.where}: expected the columns {show_names(asked)}, but the columns are "
        f"{show_names(records.found, limit=20)}. {remedy}"
    )


def closest_column(ours: str, theirs: str, candidates: Sequence[str]) -> str | None:
    """
    Guess which existing column was meant.

    Args:
        ours (`str`): Our name of the column, such as `"user"`.
        theirs (`str`): The name that was looked for.
        candidates (`Sequence[str]`): The columns that exist.

    Returns:
        `str` or `None`: The best guess; `None` where no name is similar.
    """
    by_lower = {name.strip().lower(): name for name in candidates}
    for common in _COMMON_NAMES.get(ours, ()):
        if common in by_lower:
            return by_lower[common]
    close = difflib.get_close_matches(theirs.strip().lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def clean_table(records: RawRecords, names: Mapping[str, str], rating_levels: Sequence[float]) -> pa.Table:
    """
    Check every value of one file or split and bring it to its final type.

    Args:
        records ([`RawRecords`]): The records, whose columns have passed [`check_columns`].
        names (`Mapping[str, str]`): The name in the source of each of our columns.
        rating_levels (`Sequence[float]`): The ratings that may occur, ascending.

    Returns:
        `pa.Table`: The columns `user`, `item`, `explanation` (string), `rating` (float64) and `feature` (list
        of strings), in the order of [`COLUMNS`], and `item_title` (string, empty where there is none) if the source
        has it, with the rows in their order.

    Raises:
        DataError: Rows have a bad value: the message names the first few and counts them all.
    """
    feature = names.get("feature")
    columns: dict[str, Any] = {
        "user": _clean_ids(records, names["user"]),
        "item": _clean_ids(records, names["item"]),
        "rating": _clean_ratings(records, names["rating"], rating_levels),
        "feature": _clean_features(records, feature) if feature in records.columns else [[]] * records.num_rows,
        "explanation": _clean_explanations(records, names["explanation"]),
    }
    title = names.get(TITLE)
    if title in records.columns:
        columns[TITLE] = _clean_titles(records, title)
    types = {"rating": pa.float64(), "feature": pa.list_(pa.string())}
    arrays = {}
    for name in columns:
        try:
            arrays[name] = pa.array(columns[name], types.get(name, pa.string()))
        except UnicodeEncodeError:
            raise _surrogate_error(records, names[name], columns[name]) from None
    return pa.table(arrays)


def clean_split_names(records: RawRecords, name: str) -> np.ndarray:
    """
    Read a column that says which split each record belongs to.

    Args:
        records ([`RawRecords`]): The records.
        name (`str`): The column.

    Returns:
        `np.ndarray` of `str`, of length `num_rows`: `"train"`, `"validation"` or `"test"`.

    Raises:
        DataError: A row names no split.
    """
    values = records.columns[name]
    splits = [SPLIT_ALIASES.get(value.strip().lower()) if isinstance(value, str) else None for value in values]
    bad = [index for index, split in enumerate(splits) if split is None]
    if bad:
        expected = f"one of {', '.join(SPLIT_ALIASES)}"
        remedy = "Correct these rows, or remove the column to have the records split at random."
        raise _row_error(records, name, values, bad, expected, remedy)
    return np.asarray(splits)


def _row_error(
    records: RawRecords,
    name: str,
    values: Sequence[Any],
    bad: Sequence[int],
    expected: str,
    remedy: str,
    describe: Callable[[Any], str] = show_value,
) -> DataError:
    # A few more than are shown: the rest is only counted.
    found = [(records.number(index), describe(values[index])) for index in bad[:5]]
    rows = show_rows(found, len(bad), records.unit)
    return DataError(f"{records.where}: column {name!r}: expected {expected}, but got {rows}. {remedy}")


def _clean_ids(records: RawRecords, name: str) -> list[str]:
    values = records.columns[name]
    limit = records.float_limits.get(name, _FLOAT_LIMIT)
    # In a column of text alone, "1.0" may stand beside "v1"
    are_numbers = records.is_text and all(map(_WHOLE_NUMBER.fullmatch, values))
    ids = [_id_text(value, are_numbers, limit) for value in values]
    bad = [index for index, value in enumerate(ids) if not value or value.isspace()]
    if bad:
        remedy = "Give these rows an id, or drop them."
        if any(lost_digits(values[index], limit) for index in bad):
            remedy = (
                f"Whole numbers from {limit:,} on lose digits as floats, so that ids become others. Read the column as "
                "text where it comes from (in pandas with dtype=str), and write it again."
            )
        elif all(not isinstance(values[index], str) and _is_there(values[index]) for index in bad):
            remedy = "Make the column one of text or whole numbers, with astype(str) in pandas or cast in datasets."
        raise _row_error(records, name, values, bad, "an id (a non-empty string or a whole number)", remedy)
    if missing := sum(value.lower() in _MISSING_WORDS for value in ids):
        logger.warning(
            "%s: column %r: %d rows have an id such as 'nan', which is taken for a name; where it stands for none, "
            "drop these rows",
            records.where,
            name,
            missing,
        )
    return ids


def _id_text(value: Any, are_numbers: bool = False, limit: int = _FLOAT_LIMIT) -> str | None:
    """
    The id that a value of any source stands for.

    Args:
        value: A text, a whole number, or a float that is one, as tables write them once one of a column's cells is
            empty.
        are_numbers (`bool`, defaults to `False`): Whether the text "3.0" is the number 3.
        limit (`int`, *optional*): Above it, a float's whole numbers are not exact.

    Returns:
        `str` or `None`: `None` where it is no id, or none that can be known any more ([`lost_digits`]).
    """
    if isinstance(value, bool) or lost_digits(value, limit):
        return None
    if isinstance(value, str):
        return value.partition(".")[0] if are_numbers and _WHOLE_NUMBER.fullmatch(value) else value
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else None


def _is_there(value: Any) -> bool:
    # NaN is how pandas writes a missing value
    return value is not None and value == value


def lost_digits(value: Any, limit: int = _FLOAT_LIMIT) -> bool:
    """Whether a value is a whole number that has been a float and was too large for one, so that it is another now."""
    if isinstance(value, str):
        is_large = len(value) > 15 and _WHOLE_NUMBER.fullmatch(value) and abs(float(value)) >= limit
        return bool(is_large or ("+" in value and _ROUNDED_NUMBER.fullmatch(value)))
    return isinstance(value, float) and value.is_integer() and abs(value) >= limit


def _clean_ratings(records: RawRecords, name: str, levels: Sequence[float]) -> np.ndarray:
    values = records.columns[name]
    ratings = np.asarray([_rating_number(value) for value in values], dtype=np.float64)
    scale = np.asarray(levels, dtype=np.float64)
    # Snap to the nearest level, so that a float32 column of half or tenth stars is on the scale too.
    above = np.clip(np.searchsorted(scale, ratings), 1, len(scale) - 1)
    lower, upper = scale[above - 1], scale[above]
    with np.errstate(invalid="ignore"):
        nearest = np.where(ratings - lower <= upper - ratings, lower, upper)
        bad = np.flatnonzero(~(np.abs(ratings - nearest) <= _LEVEL_TOLERANCE))
    if len(bad):
        expected = f"a rating among {show_levels(levels)}"
        remedy = "Correct or drop these rows, or pass rating_levels=(...) where the scale is another one."
        others = {rating for rating in ratings[bad].tolist() if np.isfinite(rating)}
        # More than a slip or two: it is most likely another scale
        if others and len(others) <= LEVELS_SHOWN and len(bad) > _OTHER_SCALE * len(ratings):
            remedy = (
                f"{len(bad) / len(ratings):.0%} of the ratings are {show_levels(others)}: if that is the scale, pass "
                f"rating_levels ({levels_option([*levels, *others])}); else correct or drop these rows."
            )
        raise _row_error(records, name, values, bad.tolist(), expected, remedy, _show_rating)
    return nearest


def show_levels(levels: Collection[float]) -> str:
    """Ratings in order, cut where there are so many that they are no levels."""
    ordered = [f"{level:.10g}" for level in sorted(levels)]
    return ", ".join(ordered[:LEVELS_SHOWN]) + (" and others" if len(ordered) > LEVELS_SHOWN else "")


def levels_option(levels: Collection[float]) -> str:
    """The option of the command line that makes ratings a scale."""
    return "--rating_levels " + show_levels(set(levels)).replace(",", "")


def _rating_number(value: Any) -> float:
    if value is None or isinstance(value, bool):
        return np.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _show_rating(value: Any) -> str:
    number = _rating_number(value)
    if np.isfinite(number):
        return f"{show_value(value)} (not on the scale)"
    if value is None or np.isinf(number) or isinstance(value, float):
        return show_value(value)
    return f"{show_value(value)} (not a number)"


def _clean_features(records: RawRecords, name: str) -> list[list[str]]:
    values = records.columns[name]
    convert = _text_feature if records.is_text else _feature_words
    features = list(map(convert, values))
    bad = [index for index, words in enumerate(features) if words is None]
    if bad:
        expected = 'a word, a list of words such as ["sound", "price"], or nothing'
        raise _row_error(records, name, values, bad, expected, "Correct these rows or empty them.")
    return [words for words in features if words is not None]


def _feature_words(value: Any) -> list[str] | None:
    """Return the feature's words, or `None` where the value is neither a word, a list of them nor missing."""
    if not _is_there(value):
        return []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) or word is None for word in words):
        return None
    return [word.strip() for word in words if word and not word.isspace()]


def _text_feature(value: str) -> list[str] | None:
    if not re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        return _feature_words(value)
    # CSV has no lists: they come as JSON, or as Python prints them.
    for parse in (json.loads, ast.literal_eval):
        try:
            return _feature_words(parse(value.strip()))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _clean_explanations(records: RawRecords, name: str) -> list[str]:
    values = records.columns[name]
    bad = [index for index, value in enumerate(values) if not isinstance(value, str) or not value or value.isspace()]
    if bad:
        expected = "an explanation (a string that is not empty)"
        raise _row_error(records, name, values, bad, expected, "Write one for these rows, or drop them.")
    return values


def _clean_titles(records: RawRecords, name: str) -> list[str]:
    values = records.columns[name]
    bad = [index for index, value in enumerate(values) if _is_there(value) and not isinstance(value, str)]
    if bad:
        remedy = "Correct these rows or empty them."
        raise _row_error(records, name, values, bad, "a title (a string), or nothing", remedy)
    # On one line, as they are shown
    return [" ".join(value.split()) if isinstance(value, str) else "" for value in values]


def _surrogate_error(records: RawRecords, name: str, values: Sequence[Any]) -> DataError:
    def is_broken(value: Any) -> bool:
        text = value if isinstance(value, str) else "".join(value)
        return any("\ud800" <= character <= "\udfff" for character in text)

    bad = [index for index, value in enumerate(values) if is_broken(value)]
    expected = "text that UTF-8 can hold"
    remedy = "These rows hold half of a surrogate pair (\\ud800 to \\udfff): write the character whole."
    return _row_error(records, name, values, bad, expected, remedy)
