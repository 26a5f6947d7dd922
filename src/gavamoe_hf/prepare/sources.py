"""Raw reviews from files, one at a time: Amazon, Yelp, TripAdvisor, or any JSON lines and CSV, gzipped or not."""

from __future__ import annotations

import ast
import csv
import gzip
import json
import logging
import math
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..data.checks import _id_text, _rating_number, closest_column, lost_digits
from ..data.errors import DataError, show_names, show_value
from ..data.readers import as_utf8

logger = logging.getLogger(__name__)

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
# Far beyond any review
_MAX_LINE_BYTES = 16 * 2**20
# Seconds until the year 5138, milliseconds from 1973 on
_MAX_SECONDS = 100_000_000_000
# The year 2100: no review was written later, and none before 1970
_LATEST = 4_102_444_800
# Day and month in either order; the year may be short, as spreadsheets write it
_NUMERIC_DATE = re.compile(r"\s*(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|\d{2})\b,?\s*(.*)", re.DOTALL)
_DATE_FORMATS = (
    "%a %b %d %H:%M:%S %z %Y",  # Goodreads
    *("%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y"),
    "%m %d, %Y",  # Amazon's `reviewTime`
    *("%Y/%m/%d", "%Y/%m/%d %H:%M:%S"),
    *("%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %I:%M %p", "%Y-%m-%d %I:%M:%S %p"),
)
_LONGEST_DATE = 64
_BAD_TIMES_SHOWN = 3


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

    Attributes:
        num_bad_times (`int`): Of the reviews of the last iteration, those with a time that cannot be read.
        bad_times (`list[BadLine]`): The first of them.

    Raises:
        DataError: A file is missing, empty or damaged, or has not the columns that are needed or mapped.
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
        needed = dict.fromkeys((*_REQUIRED, *mapping))
        self._columns = [_choose_columns(path, self._first_names(path), choices, list(needed)) for path in self.paths]
        self._day_first = [
            self._is_day_first(path, columns["timestamp"])
            for path, columns in zip(self.paths, self._columns, strict=True)
        ]
        self.num_bad_times, self.bad_times = 0, []

    def __iter__(self) -> Iterator[Review | BadLine]:
        self.num_bad_times, self.bad_times = 0, []
        for path, columns, day_first in zip(self.paths, self._columns, self._day_first, strict=True):
            for number, row in self._rows(path):
                review = _review(row, columns, self._is_table(path), day_first) if isinstance(row, dict) else str(row)
                if isinstance(review, str):
                    yield BadLine(path.name, number, review)
                    continue
                if review.timestamp is None and (time := _value(row, columns["timestamp"])) is not None:
                    self.num_bad_times += 1
                    if len(self.bad_times) < _BAD_TIMES_SHOWN:
                        self.bad_times.append(BadLine(path.name, number, show_value(time)))
                yield review

    def _is_day_first(self, path: Path, names: Sequence[str]) -> bool:
        """Whether 01/02/2018 is the first of February: by the column's dates that can only be read one way."""
        seen = None
        for number, (_, row) in enumerate(self._rows(path)):
            match = _NUMERIC_DATE.match(str(_value(row, names))) if isinstance(row, dict) else None
            if match is None and seen is None and number >= _ROWS_TRIED:
                return False
            if match is not None:
                seen = match
                if max(int(match[1]), int(match[3])) > 12:
                    return int(match[1]) > 12
        if seen is None:
            return False
        day_first = seen[2] == "."
        logger.warning(
            "%s: all dates, such as %r, can be read with the day or the month first; they are read with the %s first",
            path,
            seen[0],
            "day" if day_first else "month",
        )
        return day_first

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
    path: Path, found: Sequence[str], choices: Sequence[dict[str, tuple[str, ...]]], needed: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    for columns in choices:
        if all(any(theirs in found for theirs in columns[ours]) for ours in needed):
            return columns
    expected = choices[-1]
    missing = [ours for ours in needed if not any(theirs in found for theirs in expected[ours])]
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


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; a compressed one of a few MB may hold one of hundreds, which would fill the memory."""
    while line := file.readline(_MAX_LINE_BYTES + 1):
        if len(line) > _MAX_LINE_BYTES:
            raise OSError(f"a line of more than {_MAX_LINE_BYTES:,} bytes")
        yield line


def _json_rows(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(_lines(file), start=1):
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
    text = (line.decode("utf-8", "surrogateescape") for line in _lines(file))
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


def _value(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _review(
    row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], is_table: bool = False, day_first: bool = False
) -> Review | str:
    """The review of a row, or what is wrong with the row. A missing text is a review without one."""
    values = {ours: _value(row, names) for ours, names in columns.items()}
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
    return Review(user, item, rating, text, _seconds(values["timestamp"], day_first))


def _seconds(value: Any, day_first: bool = False) -> int | None:
    """
    Seconds of Unix time, from seconds, milliseconds (or still smaller units) or a date in one of many forms; `None`
    where it is none of them, or no time at which a review can have been written.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        is_short = isinstance(value, str) and len(value) <= _LONGEST_DATE
        seconds = _date_seconds(value, day_first) if is_short else math.nan
    while _MAX_SECONDS < seconds < math.inf:
        seconds /= 1000
    return int(seconds) if 1 <= seconds < _LATEST else None


# Reviews of one day have the same date
@lru_cache(maxsize=1 << 16)
def _date_seconds(text: str, day_first: bool) -> float:
    """Seconds of Unix time, in UTC where the text names no zone; not a number where it is no date."""
    if match := _NUMERIC_DATE.fullmatch(text):
        first, second, year = int(match[1]), int(match[3]), int(match[4])
        # Dates that can only be read one way are, whatever the column's others are like
        day, month = (first, second) if first > 12 or (day_first and second <= 12) else (second, first)
        text = f"{year + 2000 * (year < 100):04}-{month:02}-{day:02} {match[5]}"
    text = text.strip()
    parsers = (datetime.fromisoformat, *(partial(_strptime, form) for form in _DATE_FORMATS), parsedate_to_datetime)
    for parse in parsers:
        try:
            moment = parse(text)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return math.nan


def _strptime(form: str, text: str) -> datetime:
    return datetime.strptime(text, form)
