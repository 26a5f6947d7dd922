"""Raw reviews from files, one at a time: Amazon, Yelp, TripAdvisor, or any JSON lines and CSV, gzipped or not."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..data.checks import _id_text, _rating_number, closest_column, lost_digits
from ..data.errors import DataError, show_names
from ..data.readers import as_utf8

_NAMES = ("user", "item", "rating", "text", "timestamp")
_REQUIRED = _NAMES[:4]
# The names that each source has for ours, the first that a row has a value of
_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    # Of 2014 and 2018, then of 2023. A parent is a product without its variants (colours, sizes).
    "amazon": {
        "user": ("reviewerID", "user_id"),
        "item": ("parent_asin", "asin"),
        "rating": ("overall", "rating"),
        "text": ("reviewText", "text"),
        "timestamp": ("unixReviewTime", "timestamp"),
    },
    "yelp": {
        "user": ("user_id",),
        "item": ("business_id",),
        "rating": ("stars",),
        "text": ("text",),
        "timestamp": ("date",),
    },
    # HotelRec
    "tripadvisor": {
        "user": ("author",),
        "item": ("hotel_url",),
        "rating": ("rating",),
        "text": ("text",),
        "timestamp": ("date",),
    },
    "generic": {name: (name,) for name in _NAMES},
}
_GZIP = b"\x1f\x8b"
_ROWS_TRIED = 100
# Python literals are slow to parse, and a review is not that long
_MAX_LITERAL = 1_000_000
# Seconds until the year 5138, milliseconds from 1973 on
_MAX_SECONDS = 100_000_000_000


class Review(NamedTuple):
    """One review; `timestamp` is in seconds of Unix time, or `None`."""

    user: str
    item: str
    rating: float
    text: str
    timestamp: int | None


class BadLine(NamedTuple):
    """A line that holds no review: its file, its number counted from 1, and what is wrong with it."""

    path: str
    number: int
    problem: str


class ReviewReader:
    """
    Reads reviews, as often as it is iterated over, without holding them.

    Args:
        paths (`Sequence[str]`): The files, in order. `.csv` and `.tsv` (also before `.gz`) are tables, others JSON
            lines or Python literals, one a line.
        format (`str`, *optional*, defaults to `"auto"`): `"amazon"`, `"yelp"`, `"tripadvisor"`, `"csv"` or `"jsonl"`;
            `"auto"` takes the first whose columns the first rows have.
        column_mapping (`Mapping[str, str]`, *optional*): The files' names of `user`, `item`, `rating`, `text` and
            `timestamp` where they differ.

    Raises:
        DataError: A file is missing, empty or damaged, or has not the columns that are needed.
    """

    def __init__(self, paths: Sequence[str], format: str = "auto", column_mapping: Mapping[str, str] | None = None):
        self.paths = [Path(path) for path in paths]
        self._is_csv = {"csv": True, "jsonl": False}.get(format)
        mapping = dict(column_mapping or {})
        unknown = [name for name in mapping if name not in _NAMES]
        if unknown:
            raise DataError(
                f"column_mapping: expected names among {', '.join(_NAMES)}, but got {show_names(unknown)}. Write "
                "ours=theirs, as in user=customer."
            )
        kind = "generic" if format in ("csv", "jsonl") else format
        kinds = list(_COLUMNS) if kind == "auto" else [kind]
        choices = [{**_COLUMNS[kind], **{ours: (theirs,) for ours, theirs in mapping.items()}} for kind in kinds]
        self._columns = [_choose_columns(path, self._first_names(path), choices) for path in self.paths]

    def __iter__(self) -> Iterator[Review | BadLine]:
        for path, columns in zip(self.paths, self._columns, strict=True):
            for number, row in self._rows(path):
                review = _review(row, columns, self._is_table(path)) if isinstance(row, dict) else str(row)
                yield BadLine(path.name, number, review) if isinstance(review, str) else review

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """The rows of a file with the number of their lines; a text in place of a row says what is wrong with it."""
        last = 0
        try:
            with _open(path) as file:
                for last, row in _csv_rows(file, path) if self._is_table(path) else _json_rows(file):
                    yield last, row
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            # gzip's own error is an OSError too
            raise DataError(
                f"{path}: expected a readable file, but after line {last} got {type(error).__name__}: {error}. Check "
                "the path, or get the file again."
            ) from error

    def _is_table(self, path: Path) -> bool:
        return self._is_csv if self._is_csv is not None else bool({".csv", ".tsv"} & set(path.suffixes))

    def _first_names(self, path: Path) -> list[str]:
        """The columns of the first rows: a row need not have all of them."""
        names: dict[str, None] = {}
        problem = "the file is empty"
        for number, row in islice(self._rows(path), _ROWS_TRIED):
            if isinstance(row, dict):
                names.update(dict.fromkeys(row))
            else:
                problem = f"line {number} is {row}"
        if not names:
            raise DataError(
                f"{path}: expected one review a line, as a JSON object or in CSV, but {problem}. Write the file again "
                "as JSON lines, or pass --format csv."
            )
        return list(names)


def _choose_columns(
    path: Path, found: Sequence[str], choices: Sequence[dict[str, tuple[str, ...]]]
) -> dict[str, tuple[str, ...]]:
    for columns in choices:
        if all(any(theirs in found for theirs in columns[ours]) for ours in _REQUIRED):
            return columns
    expected = choices[-1]
    missing = [ours for ours in _REQUIRED if not any(theirs in found for theirs in expected[ours])]
    guesses = {ours: closest_column(ours if ours != "text" else "explanation", ours, found) for ours in missing}
    hint = " ".join(f"{ours}={guesses[ours] or '...'}" for ours in missing)
    raise DataError(
        f"{path}: expected the columns {show_names([expected[ours][0] for ours in missing])}, but the columns are "
        f"{show_names(found, limit=20)}. Say which they are: --column_mapping {hint}"
    )


def _open(path: Path) -> IO[bytes]:
    # By its first bytes, because downloads are renamed
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    return as_utf8(gzip.open(path, "rb") if is_gzip else path.open("rb"))  # type: ignore[arg-type]


def _json_rows(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield number, "not UTF-8"
            continue
        if text.strip():
            yield number, _parse(text)


def _parse(text: str) -> dict[str, Any] | str:
    for parse in (json.loads, ast.literal_eval):
        if parse is ast.literal_eval and len(text) > _MAX_LITERAL:
            break
        try:
            with warnings.catch_warnings():
                # Python warns of backslashes in a literal that mean nothing
                warnings.simplefilter("ignore")
                row = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return row if isinstance(row, dict) else f"no object but a {type(row).__name__}"
    return "broken JSON"


def _csv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    # Bytes that are not UTF-8 become surrogates, which no review may hold
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if ".tsv" in path.suffixes else ",")
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"broken CSV ({error})"
            continue
        if header is None:
            header = [name.strip() for name in row]
        elif row and len(row) != len(header):
            yield reader.line_num, f"a row of {len(row)} fields instead of {len(header)}"
        elif row:
            yield reader.line_num, dict(zip(header, row, strict=True))


def _review(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], is_table: bool = False) -> Review | str:
    """The review of a row, or what is wrong with the row. A missing text is a review without one."""
    values = {
        ours: next((row[name] for name in names if row.get(name) not in (None, "")), None)
        for ours, names in columns.items()
    }
    # A table writes whole numbers as 3.0 from one empty cell on
    user, item = (_id_text(values[name], are_numbers=is_table) for name in ("user", "item"))
    rating = _rating_number(values["rating"])
    text = values["text"] if isinstance(values["text"], str) else ""
    for name in ("user", "item"):
        if lost_digits(values[name]):
            return f"a float as {name} id, {values[name]!s:.30}, which loses digits"
    if not user or not item or user.isspace() or item.isspace():
        return f"without {'an item' if user and not user.isspace() else 'a user'}"
    if not math.isfinite(rating):
        return "without a rating"
    if any("\ud800" <= character <= "\udfff" for character in f"{user}{item}{text}"):
        return "not UTF-8"
    return Review(user, item, rating, text, _seconds(values["timestamp"]))


def _seconds(value: Any) -> int | None:
    """Seconds of Unix time, from seconds, milliseconds or an ISO date; `None` where it is none of them."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return int(moment.timestamp())
    if abs(seconds) > _MAX_SECONDS:
        seconds /= 1000
    return int(seconds) if abs(seconds) <= _MAX_SECONDS else None
