"""The first reading of the reviews: which of them are gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from ..data.checks import LEVELS_SHOWN, levels_option, show_levels
from ..data.errors import DataError, show_rows
from .extraction import load_function
from .filters import k_core, language_filter, last_of_each_pair
from .options import PrepareArguments
from .sources import BadLine, ReviewReader

logger = logging.getLogger(__name__)

# Why a review is dropped, in this order
OFF_SCALE, NO_TEXT, OTHER_LANGUAGE = "rating that is not on the scale", "no text", "another language"
REPEATED, SPARSE = "earlier review of the same user and item", "outside the k-core"
_BAD_LINES_SHOWN = 20


@dataclass
class Survey:
    """
    What the first reading of the reviews found.

    Attributes:
        kept (`np.ndarray` of `bool` `(num_reviews,)`): Of all that could be read, which are gone on with.
        dropped (`Counter`): Reviews by why they are not.
        num_bad (`int`): Lines that could not be read.
        bad_lines (`list[BadLine]`): The first of them.
        num_bad_times (`int`): Reviews with a time that cannot be read, which go on as if they had none.
        digest (`str`): Of all reviews.
    """

    kept: np.ndarray
    dropped: Counter[str]
    num_bad: int
    bad_lines: list[BadLine] = field(default_factory=list)
    num_bad_times: int = 0
    digest: str = ""


def survey_reviews(reader: ReviewReader, args: PrepareArguments) -> Survey:
    """
    Reads all reviews once and decides which are gone on with.

    Args:
        reader ([`ReviewReader`]): The reviews.
        args ([`PrepareArguments`]): The options; those of the filters are read.

    Raises:
        DataError: More lines than `max_bad_lines` cannot be read, or more ratings than `max_off_scale` are not on the
            scale.
    """
    is_in_language = _language_filter(args)
    levels = set(args.rating_levels)
    codes: tuple[dict[str, int], dict[str, int]] = ({}, {})
    # Four numbers a review, in an array because there may be many millions
    rows = array("q")
    survey = Survey(np.zeros(0, dtype=bool), Counter(), 0)
    off_scale: Counter[float] = Counter()
    digest = hashlib.sha256()
    number = -1
    for entry in tqdm(reader, desc="Reading", unit="review", mininterval=1):
        if isinstance(entry, BadLine):
            survey.num_bad += 1
            if len(survey.bad_lines) < _BAD_LINES_SHOWN:
                survey.bad_lines.append(entry)
            continue
        number += 1
        digest.update(json.dumps(entry).encode())
        reason = OFF_SCALE if entry.rating not in levels else NO_TEXT if not entry.text.strip() else None
        if reason is None and is_in_language is not None and not is_in_language(entry.text):
            reason = OTHER_LANGUAGE
        if reason is not None:
            survey.dropped[reason] += 1
            # Levels are few; where there are many, it is no scale of levels
            if reason == OFF_SCALE and (entry.rating in off_scale or len(off_scale) <= LEVELS_SHOWN):
                off_scale[entry.rating] += 1
            continue
        user, item = (code.setdefault(name, len(code)) for code, name in zip(codes, entry[:2], strict=True))
        rows.extend((number, user, item, entry.timestamp or 0))
    _check_bad_lines(survey, number + 1, args.max_bad_lines)
    _check_scale(survey.dropped[OFF_SCALE], number + 1, off_scale, args)
    _note_bad_times(survey, reader, number + 1)
    table = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4)
    for reason, keep in (
        (REPEATED, lambda part: last_of_each_pair(part[:, 1], part[:, 2], part[:, 3])),
        (SPARSE, lambda part: k_core(part[:, 1], part[:, 2], args.k_core)),
    ):
        mask = keep(table)
        survey.dropped[reason] = int((~mask).sum())
        table = table[mask]
    survey.kept = np.zeros(number + 1, dtype=bool)
    survey.kept[table[:, 0]] = True
    survey.digest = digest.hexdigest()
    return survey


def _language_filter(args: PrepareArguments) -> Callable[[str], bool] | None:
    if args.language_filter is not None:
        return load_function(args.language_filter)
    return None if args.language == "none" else language_filter(args.language)


def _check_scale(count: int, num_reviews: int, off_scale: Counter[float], args: PrepareArguments) -> None:
    """Refuses reviews of which many are rated on another scale, by the options that would keep them."""
    if not count:
        return
    message = (
        f"{count} of {num_reviews} reviews ({count / num_reviews:.1%}) have a rating that is not among rating_levels "
        f"({show_levels(args.rating_levels)}): {show_levels(off_scale)}"
    )
    keep = f"keep them, pass {levels_option([*args.rating_levels, *off_scale])}"
    if len(off_scale) > LEVELS_SHOWN:
        keep = "keep them, round them to a few levels first"
    if count > args.max_off_scale * num_reviews:
        raise DataError(
            f"expected ratings on the scale, but {message}. To {keep}; to drop them pass --max_off_scale "
            f"{math.ceil(100 * count / num_reviews) / 100}."
        )
    logger.warning("%s; they are dropped. To %s", message, keep)


def _note_bad_times(survey: Survey, reader: ReviewReader, num_reviews: int) -> None:
    survey.num_bad_times = reader.num_bad_times
    if survey.num_bad_times:
        first = reader.bad_times[0]
        found = [(line.number, line.problem) for line in reader.bad_times if line.path == first.path]
        logger.warning(
            "%d of %d reviews have a timestamp that can't be read, or is before 1970 or after 2100: %s: %s. They go on "
            "without one, and of two reviews of the same user and item count as the earlier; with --column_mapping "
            "timestamp=... another column is read",
            survey.num_bad_times,
            num_reviews,
            first.path,
            show_rows(found, max(survey.num_bad_times, len(found)), "line"),
        )


def _check_bad_lines(survey: Survey, num_reviews: int, max_share: float) -> None:
    if not survey.num_bad:
        return
    num_lines = survey.num_bad + num_reviews
    first = survey.bad_lines[0]
    of_file = [(line.number, line.problem) for line in survey.bad_lines if line.path == first.path]
    shown = f"{first.path}: {show_rows(of_file, max(survey.num_bad, len(of_file)), 'line')}"
    if survey.num_bad > max_share * num_lines:
        raise DataError(
            f"expected a review in at least {1 - max_share:.0%} of the lines, but {survey.num_bad} of {num_lines} hold "
            f"none: {shown}. Check --format and --column_mapping, or allow more with --max_bad_lines."
        )
    logger.warning("%d of %d lines hold no review: %s", survey.num_bad, num_lines, shown)
