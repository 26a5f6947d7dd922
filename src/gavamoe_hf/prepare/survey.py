"""The first reading of the reviews: which of them are gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

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
        digest (`str`): Of all reviews.
    """

    kept: np.ndarray
    dropped: Counter[str]
    num_bad: int
    bad_lines: list[BadLine] = field(default_factory=list)
    digest: str = ""


def survey_reviews(reader: ReviewReader, args: PrepareArguments) -> Survey:
    """
    Reads all reviews once and decides which are gone on with.

    Args:
        reader ([`ReviewReader`]): The reviews.
        args ([`PrepareArguments`]): The options; those of the filters are read.

    Raises:
        DataError: More lines than `max_bad_lines` cannot be read.
    """
    is_in_language = _language_filter(args)
    levels = set(args.rating_levels)
    codes: tuple[dict[str, int], dict[str, int]] = ({}, {})
    # Four numbers a review, in an array because there may be many millions
    rows = array("q")
    survey = Survey(np.zeros(0, dtype=bool), Counter(), 0)
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
            continue
        user, item = (code.setdefault(name, len(code)) for code, name in zip(codes, entry[:2], strict=True))
        rows.extend((number, user, item, entry.timestamp or 0))
    _check_bad_lines(survey, number + 1, args.max_bad_lines)
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
