"""Predictions files, JSON lines of any system's explanations: read line by line, and checked before they are scored."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from datasets import Dataset, DatasetDict

from ..data import DataError
from ..data.checks import _id_text
from ..data.errors import show_value
from ..data.readers import as_utf8

REQUIRED_KEYS = ("user", "item", "reference", "prediction")
OPTIONAL_KEYS = ("feature", "rating", "predicted_rating")


@dataclass(frozen=True)
class PredictionRecord:
    """
    One line of a predictions file.

    Attributes:
        line (`int`): Its number, from 1.
        user, item (`str`): The pair.
        reference, prediction (`str`): The true and the generated explanation; the latter may be empty.
        features (`tuple[str, ...]` or `None`): The record's features; `None` where the line has no such key.
        rating, predicted_rating (`float` or `None`): In stars.
    """

    line: int
    user: str
    item: str
    reference: str
    prediction: str
    features: tuple[str, ...] | None = None
    rating: float | None = None
    predicted_rating: float | None = None

    def present(self) -> frozenset[str]:
        """Which of the optional keys the line has."""
        values = {"feature": self.features, "rating": self.rating, "predicted_rating": self.predicted_rating}
        return frozenset(key for key, value in values.items() if value is not None)


@dataclass
class Corpus:
    """
    What the peers' metrics need of a whole data set, and the records that a file must hold.

    Attributes:
        features (`set[str]`): All features of all splits.
        rating_range (`tuple[float, float]` or `None`): Lowest and highest rating.
        records (`Dataset` or `None`): The records that are predicted, in order.
        is_file (`bool`): Whether the features are those of the predictions file alone.
        is_file_range (`bool`): Whether the range is that of the predictions file alone.
    """

    features: set[str] = field(default_factory=set)
    rating_range: tuple[float, float] | None = None
    records: Dataset | None = None
    is_file: bool = False
    is_file_range: bool = False

    @classmethod
    def from_records(cls, records: DatasetDict, split: str) -> Corpus:
        """The corpus of a data set, for predictions of one of its splits."""
        features = {feature for part in records.values() for row in part["feature"] for feature in row or []}
        ratings = [(min(part["rating"]), max(part["rating"])) for part in records.values() if len(part)]
        lowest, highest = zip(*ratings, strict=True)
        return cls(features, (min(lowest), max(highest)), records[split])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The records that are predicted, a thousand read at a time."""
        if self.records is not None:
            names = ["user", "item", "explanation", "rating", "feature"]
            for batch in self.records.select_columns(names).iter(batch_size=1000):
                yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


@dataclass
class PredictionSummary:
    """What a first reading of a file finds: `num_records`, and the optional keys that every line has (`present`)."""

    num_records: int
    present: frozenset[str]


def read_predictions(path: str | os.PathLike[str]) -> Iterator[PredictionRecord]:
    """
    The records of a predictions file, one at a time.

    Args:
        path (`str` or `os.PathLike`):
            JSON lines with `user`, `item`, `reference` and `prediction`, and optionally `feature` (a string or a list
            of them), `rating` and `predicted_rating`. Other keys are left alone, empty lines are passed over.

    Raises:
        [`DataError`]: At the first line that cannot be used, by its number.
        `OSError`: If the file cannot be read.
    """
    # Cut at b"\n" alone: str.splitlines also cuts at characters that JSON allows inside a string
    with as_utf8(open(path, "rb")) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: expected a JSON object, but got broken JSON ({error}). Correct it."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, but got {show_value(row)}. Correct it.")
            yield _record(row, number, where)


def check_predictions(path: str | os.PathLike[str], corpus: Corpus | None = None) -> tuple[PredictionSummary, Corpus]:
    """
    Reads a file once, to find what is wrong with it before anything is computed.

    Args:
        path (`str` or `os.PathLike`): As in [`read_predictions`].
        corpus ([`Corpus`], *optional*): The data set that was predicted.

    Returns:
        `tuple[PredictionSummary, Corpus]`: the latter as passed; what it does not know is taken from the file.

    Raises:
        [`DataError`]: For a line that cannot be used; for an optional key that only some lines have; for records other
            than the corpus's, also by their ratings or features where given, or fewer; for a feature that the corpus
            does not have; for a file without a record.
    """
    num_records, present = 0, frozenset()
    found = Corpus(is_file=True, is_file_range=True)
    lowest, highest = math.inf, -math.inf
    expected = iter(()) if corpus is None else corpus.rows()
    for record in read_predictions(path):
        if num_records and record.present() != present:
            (key, *_) = sorted(record.present() ^ present)
            has, had = ("has", "have not") if key in record.present() else ("has not", "have")
            raise DataError(
                f"{path}, line {record.line}: expected the same keys in every line, but this one {has} {key!r} and "
                f"those before it {had}. Write it in every line or in none."
            )
        present = record.present()
        if corpus is not None:
            _check_against(corpus, next(expected, None), record, path)
        num_records += 1
        found.features.update(record.features or ())
        if record.rating is not None:
            lowest, highest = min(lowest, record.rating), max(highest, record.rating)
    if not num_records:
        raise DataError(f"{path}: expected at least one prediction, but got none. Check how it was written.")
    if corpus is not None and corpus.records is not None and num_records < len(corpus.records):
        raise DataError(
            f"{path}: expected {len(corpus.records)} predictions, one for each record of the split, but got "
            f"{num_records}. Write the missing ones; an empty prediction counts as such."
        )
    if "rating" in present:
        found.rating_range = lowest, highest
    if corpus is not None and corpus.features:
        found.features, found.is_file = corpus.features, corpus.is_file
    if corpus is not None and corpus.rating_range is not None:
        found.rating_range, found.is_file_range = corpus.rating_range, corpus.is_file_range
    return PredictionSummary(num_records, present), found


def check_same_records(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """
    Raises [`DataError`] where two files are not of the same records in the same order: user, item and reference, and
    features and ratings where both have them.
    """
    for left, right in zip_longest(read_predictions(path), read_predictions(other)):
        if left is None or right is None:
            short, long = (path, other) if left is None else (other, path)
            raise DataError(
                f"Expected predictions of the same records to compare, but {short} ends before line "
                f"{(right or left).line} of {long}. Score the same records with both systems."
            )
        for key in ("user", "item", "reference", "features", "rating"):
            values = getattr(left, key), getattr(right, key)
            if None not in values and values[0] != values[1]:
                raise DataError(
                    f"Expected predictions of the same records to compare, but {path}, line {left.line} has the {key} "
                    f"{show_value(values[0])} and {other}, line {right.line} has {show_value(values[1])}. "
                    "Write both files in the same order, with whole references."
                )


def _check_against(corpus: Corpus, row: dict[str, Any] | None, record: PredictionRecord, path: Any) -> None:
    where = f"{path}, line {record.line}"
    if corpus.records is not None:
        if row is None:
            raise DataError(
                f"{where}: expected {len(corpus.records)} predictions, one for each record of the split, but got more. "
                "Check split and file."
            )
        for key, value in {"user": row["user"], "item": row["item"], "reference": row["explanation"]}.items():
            if _plain(getattr(record, key)) != _plain(value):
                raise DataError(
                    f"{where}: expected the {key} {show_value(value)} of the split's record in this place, but got "
                    f"{show_value(getattr(record, key))}. Write the split's records in order, with whole references."
                )
    unknown = sorted(set(record.features or ()) - corpus.features)
    if unknown and corpus.features:
        raise DataError(
            f"{where}: expected a feature of the data set, but got {show_value(unknown[0])}, which none of its records "
            "has. Pass the data set that was predicted."
        )
    if row is not None:
        _check_details(row, record, where)


def _check_details(row: dict[str, Any], record: PredictionRecord, where: str) -> None:
    """Raises where a record's rating or features, if given, are not those of the split's record."""
    features = sorted({word.strip() for word in row["feature"] or [] if word.strip()})
    found = None if record.features is None else sorted(set(record.features))
    for key, expected, given in (("rating", row["rating"], record.rating), ("feature", features, found)):
        if given not in (None, expected):
            raise DataError(
                f"{where}: expected the {key} {show_value(expected)} of the split's record, but got "
                f"{show_value(given)}. Write what the data set says, or leave {key!r} out of every line."
            )


def _plain(text: str) -> str:
    return " ".join(text.split())


def _record(row: dict[str, Any], number: int, where: str) -> PredictionRecord:
    ids = {key: _id_text(row.get(key)) for key in ("user", "item")}
    missing = [key for key in REQUIRED_KEYS if row.get(key) is None]
    if missing:
        raise DataError(
            f"{where}: expected the keys {', '.join(REQUIRED_KEYS)}, but {', '.join(missing)} is missing or null. "
            "Write an empty string where nothing was generated."
        )
    for key, value in ids.items():
        if value is None:
            raise DataError(
                f"{where}: expected {key!r} as a string or a whole number, but got {show_value(row[key])}. Correct it."
            )
    for key in ("reference", "prediction"):
        if not isinstance(row[key], str):
            raise DataError(f"{where}: expected {key!r} as a string, but got {show_value(row[key])}. Correct it.")
    features = None
    if "feature" in row:
        value = row["feature"]
        words = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError(
                f"{where}: expected 'feature' as a string, a list of strings or null, but got {show_value(value)}. "
                "Correct it."
            )
        features = tuple(word.strip() for word in words if word.strip())
    ratings = {key: _rating(row[key], key, where) for key in ("rating", "predicted_rating") if row.get(key) is not None}
    return PredictionRecord(number, ids["user"], ids["item"], row["reference"], row["prediction"], features, **ratings)


def _rating(value: Any, key: str, where: str) -> float:
    # A whole number can be larger than any float
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{where}: expected {key!r} as a finite number, but got {show_value(value)}. Correct it.")
    return float(value)
