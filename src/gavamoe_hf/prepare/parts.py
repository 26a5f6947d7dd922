"""The second reading: chunks of reviews to resumable parts, and the parts to records."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from ..evaluation.predict import write_text
from .extraction import load_function, spacy_extractor
from .options import PrepareArguments
from .sentences import Candidate, choose_candidate, find_candidates, item_names, points_at_item, side_of
from .sources import BadLine, Review, ReviewReader

logger = logging.getLogger(__name__)

# Why a review with candidates gives no record
RARE = "only rare features"
_MAX_PROCESSES = 8


def sentiment_judge(args: PrepareArguments) -> Callable[[str], float] | None:
    if not args.sentiment or args.language != "en":
        return None
    from ..evaluation.sentiment import vader_sentiment

    return vader_sentiment()


class SentenceFinder:
    """
    Chunks of reviews to what their sentences hold, in this process.

    Args:
        args ([`PrepareArguments`]): The options.
    """

    def __init__(self, args: PrepareArguments):
        self._args = args
        self._extract = load_function(args.extractor) if args.extractor else spacy_extractor(args.spacy_model)
        self._judge = sentiment_judge(args)

    def __call__(self, reviews: list[Review]) -> dict[str, Any]:
        """What a part holds: each review without its text, and the sentences of all by what became of them."""
        args = self._args
        found = find_candidates(
            [review.text for review in reviews],
            [side_of(review.rating, args.rating_levels) for review in reviews],
            self._extract,
            self._judge,
            args.min_words,
            args.max_words,
            args.max_characters,
        )
        rows = [
            {
                "user": review.user,
                "item": review.item,
                "rating": review.rating,
                "timestamp": review.timestamp,
                "candidates": of_review.candidates,
                "dropped": of_review.dropped,
            }
            for review, of_review in zip(reviews, found, strict=True)
        ]
        return {"reviews": rows, "sentences": sum((of_review.counts for of_review in found), Counter())}


# The finder of a process that was started for it
_finder: SentenceFinder | None = None


def _start_process(args: PrepareArguments) -> None:
    global _finder
    _finder = SentenceFinder(args)


def _find_in_process(reviews: list[Review]) -> dict[str, Any]:
    assert _finder is not None
    return _finder(reviews)


def find_sentences(reader: ReviewReader, kept: np.ndarray, args: PrepareArguments, parts: Path) -> None:
    """Writes the parts that are not there yet."""
    num_chunks = math.ceil(int(kept.sum()) / args.chunk_size)
    missing = [number for number in range(num_chunks) if not _part_file(parts, number).exists()]
    chunks = _chunks(reader, kept, args.chunk_size)
    todo = ((number, chunk) for number, chunk in enumerate(chunks) if not _part_file(parts, number).exists())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = min(args.num_proc or min(cores, _MAX_PROCESSES), max(1, len(missing)))
    if len(missing) < num_chunks:
        logger.info("going on after %d of %d parts", num_chunks - len(missing), num_chunks)
    with tqdm(total=num_chunks, initial=num_chunks - len(missing), desc="Finding sentences", unit="chunk") as bar:
        for number, found in _map_in_order(todo, args, num_proc) if missing else ():
            write_text(_part_file(parts, number), json.dumps(found, ensure_ascii=False))
            bar.update()


def _map_in_order(
    todo: Iterator[tuple[int, list[Review]]], args: PrepareArguments, num_proc: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    if num_proc == 1:
        finder = SentenceFinder(args)
        for number, chunk in todo:
            yield number, finder(chunk)
        return
    # Not forked: threads of the libraries that are loaded here do not survive it
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    with ProcessPoolExecutor(num_proc, context, _start_process, (args,)) as pool:
        try:
            for number, chunk in todo:
                waiting.append((number, pool.submit(_find_in_process, chunk)))
                # A few ahead and no more, so that the reviews do not pile up
                if len(waiting) > 2 * num_proc:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for number, future in waiting:
                yield number, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _chunks(reader: ReviewReader, kept: np.ndarray, size: int) -> Iterator[list[Review]]:
    reviews = (entry for entry in reader if not isinstance(entry, BadLine))
    chunk = []
    for review, is_kept in zip(reviews, kept, strict=True):
        if is_kept:
            chunk.append(review)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _part_file(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.json"


def _read_parts(parts: Path) -> Iterator[dict[str, Any]]:
    number = 0
    while (path := _part_file(parts, number)).exists():
        part = json.loads(path.read_text(encoding="utf-8"))
        for review in part["reviews"]:
            review["candidates"] = [Candidate(*candidate) for candidate in review["candidates"]]
        yield part
        number += 1


@dataclass
class Choice:
    """
    The records, and what [`choose_records`] counted.

    Attributes:
        dataset (`Dataset`): The records.
        dropped (`Counter[str]`): The reviews that gave none, by why.
        sentences (`Counter[str]`): The sentences, by what became of them.
        names (`list[str]`): Features that are taken for names of the item, the commonest first.
    """

    dataset: Dataset
    dropped: Counter[str]
    sentences: Counter[str]
    names: list[str]


def choose_records(parts: Path, min_feature_count: int) -> Choice:
    """The best candidate of each review, by what all reviews tell of the features."""
    feature_counts: Counter[str] = Counter()
    pointing_counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    for part in _read_parts(parts):
        sentences.update(part["sentences"])
        for review in part["reviews"]:
            candidates = review["candidates"]
            feature_counts.update({candidate.feature for candidate in candidates})
            pointing_counts.update({one.feature for one in candidates if points_at_item(one.sentence, one.feature)})
            dropped.update([review["dropped"]] if review["dropped"] else [])
    names = item_names(feature_counts, pointing_counts)
    schema = {name: pa.string() for name in ("user", "item", "rating", "feature", "explanation", "opinion")}
    schema = pa.schema({**schema, "rating": pa.float64(), "timestamp": pa.int64()})
    tables = []
    for part in _read_parts(parts):
        rows = []
        for review in part["reviews"]:
            chosen = choose_candidate(review["candidates"], feature_counts, min_feature_count, names)
            if chosen is None:
                dropped[RARE] += bool(review["candidates"])
                continue
            row = {name: review[name] for name in ("user", "item", "rating", "timestamp")}
            rows.append({**row, "feature": chosen.feature, "explanation": chosen.sentence, "opinion": chosen.opinion})
        tables.append(pa.Table.from_pylist(rows, schema=schema))
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if table["timestamp"].null_count == len(table):
        table = table.drop_columns("timestamp")
    common = [name for name, count in feature_counts.most_common() if name in names and count >= min_feature_count]
    return Choice(Dataset(table), dropped, sentences, common)
