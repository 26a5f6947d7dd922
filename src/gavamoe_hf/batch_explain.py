"""Explanations for a file of pairs: as a stream, in batches, and going on where an interrupted call stopped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import set_seed

from .data import DataError
from .data.checks import _feature_words, _id_text, _rating_number, _text_feature, lost_digits
from .data.errors import show_rows, show_value
from .data.readers import as_utf8
from .evaluation.predict import append_batches
from .files import differences, one_writer

Unknown = Literal["error", "population"]

# Batches whose pairs are sorted together, which is what is held in memory
_WINDOW_BATCHES = 8


@dataclass
class Pair:
    """
    One row of a file of pairs.

    Args:
        line (`int`): Its line in the file, from 1.
        user (`str` or `None`), item (`str` or `None`): Raw ids, `None` where the row has none.
        rating (`float` or `None`): The rating whose sentiment is explained.
        features (`list[str]` or `None`): Features to name; `None` for those that the item is known by.
    """

    line: int
    user: str | None
    item: str | None
    rating: float | None
    features: list[str] | None


def read_pairs(path: str | os.PathLike[str]) -> Iterator[tuple[int, Pair | str]]:
    """
    Reads a file of pairs row by row.

    Args:
        path (`str` or `os.PathLike`):
            CSV with a header, or JSON lines, with the keys `user` and `item`, optionally `rating` and `features` (or
            `feature`, as in records: a word or a list of them). Others are passed over.

    Yields:
        `tuple[int, Pair | str]`: the line, and the pair or what is wrong with it.

    Raises:
        [`DataError`]: For another format, and a file that is not text.
    """
    path = Path(path)
    formats = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise DataError(f"{path}: expected a file with one of the suffixes {', '.join(formats)}, but got {suffix!r}.")
    try:
        for line, row in formats[suffix](path):
            yield line, row if isinstance(row, str) else _pair(line, row, suffix == ".csv")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected UTF-8 text as {suffix}, but got {error}. Write it again.") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with as_utf8(open(path, "rb")) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode()
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, f"broken JSON ({error})"
                continue
            yield number, row if isinstance(row, dict) else f"{show_value(row)}, which is no JSON object,"


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with io.TextIOWrapper(as_utf8(open(path, "rb")), encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                yield reader.line_num, f"{len(row)} fields where the header has {len(header)}"
            elif row:
                yield reader.line_num, {name: value or None for name, value in zip(header, row, strict=True)}


def _pair(line: int, row: dict[str, Any], is_text: bool) -> Pair | str:
    """The pair of a row, or what is wrong with it."""
    for key in ("user", "item"):
        if key not in row:
            return f"no {key!r} among {', '.join(map(repr, row))}"
    ids = {key: None if row[key] is None else _id_text(row[key]) for key in ("user", "item")}
    rating, features = row.get("rating"), row.get("features", row.get("feature"))
    for key, value in ids.items():
        if value is None and row[key] is not None:
            return f"the {key} {show_value(row[key])}" + " (a float, which loses digits)" * lost_digits(row[key])
    if rating is not None and not math.isfinite(_rating_number(rating)):
        return f"the rating {show_value(rating)}"
    words = None if features is None else _text_feature(features) if is_text else _feature_words(features)
    if words is None and features is not None:
        return f"the features {show_value(features)}"
    try:
        "".join([*filter(None, ids.values()), *(words or [])]).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return Pair(line, ids["user"], ids["item"], None if rating is None else _rating_number(rating), words)


def check_pairs(
    path: str | os.PathLike[str],
    processor: Any,
    unknown: Unknown = "error",
    rating_levels: Sequence[float] = (-math.inf, math.inf),
) -> int:
    """
    Reads a file of pairs once, to find what is wrong with it before anything is computed.

    Args:
        path (`str` or `os.PathLike`): As in [`read_pairs`].
        processor ([`GaVaMoEProcessor`]): Its users and items are those that are known.
        unknown (`str`, *optional*, defaults to `"error"`): `"population"` lets ids pass that are not known.
        rating_levels (`Sequence[float]`, *optional*): The model's, in order: no rating is outside them.

    Returns:
        `int`: the number of pairs.

    Raises:
        [`DataError`]: For rows that cannot be read or whose ids are not known, naming the first ones, and for a file
            without a pair.
    """
    count = num_broken = num_strangers = 0
    # The first few of each
    broken: list[tuple[int, str]] = []
    strangers: list[tuple[int, str]] = []
    for line, pair in read_pairs(path):
        count += 1
        rating = None if isinstance(pair, str) else pair.rating
        if rating is not None and not rating_levels[0] <= rating <= rating_levels[-1]:
            pair = f"the rating {rating:g} (not from {rating_levels[0]:g} to {rating_levels[-1]:g})"
        if isinstance(pair, str):
            num_broken += 1
            broken = [*broken, (line, pair)][:3]
        elif unknown == "error" and (names := _look_up(processor, pair)):
            num_strangers += 1
            found = " and ".join(f"the {name} {show_value(getattr(pair, name))}" for name in names)
            strangers = [*strangers, (line, found)][:3]
    if broken:
        raise DataError(
            f"{path}: expected a user and an item in each row, a rating that is a number and features that are words, "
            f"but got {show_rows(broken, num_broken, 'line')}. Correct them, or leave them out."
        )
    if strangers:
        raise DataError(
            f"{path}: expected users and items that the checkpoint knows, but got "
            f"{show_rows(strangers, num_strangers, 'line')}. Correct them, leave them out, or pass --unknown "
            "population to have the population answer for them."
        )
    if not count:
        raise DataError(f"{path}: expected at least one pair, but got none. Check how it was written.")
    return count


def _look_up(processor: Any, pair: Pair) -> list[str]:
    """Sets the ids as the checkpoint knows them; which of `"user"` and `"item"` it does not know."""
    unknown = []
    for name in ("user", "item"):
        raw = getattr(pair, name)
        known = None if raw is None else processor.known_id(name, raw)
        if known is None:
            unknown.append(name)
        else:
            setattr(pair, name, known)
    return unknown


def explain_file(
    model: Any,
    processor: Any,
    pairs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    batch_size: int = 64,
    unknown: Unknown = "error",
    seed: int = 0,
    overwrite: bool = False,
    identity: dict[str, Any] | None = None,
    **generate_kwargs: Any,
) -> None:
    """
    Explains every pair of a file, greedily unless told otherwise. Memory does not grow with the file.

    The rows come beside the output, in a file with `.part` after its name, which is renamed when they are all there. A
    call that finds the rows of an interrupted one keeps its whole batches and goes on after them.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor.
        pairs (`str` or `os.PathLike`): As in [`read_pairs`].
        output (`str` or `os.PathLike`):
            Where to write JSON lines, one for each pair, in their order: `line`, the fields of
            [`GaVaMoEExplanation`], and `unknown`, the ids that are not known, for which the population answers.
        batch_size (`int`, *optional*, defaults to 64):
            Pairs explained at once. Pairs of the same sentiment and of prompts of a similar length come together.
        unknown (`str`, *optional*, defaults to `"error"`): What ids get that are not known: `"error"`, before anything
            is explained, or `"population"`.
        seed (`int`, *optional*, defaults to 0): Seed of sampling, the same whether a call was interrupted or not.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an output that is there, and rows that
            another run has left beside it.
        identity (`dict[str, Any]`, *optional*): What else the rows depend on, such as the path of the checkpoint.
        generate_kwargs: everything that `generate` takes.

    Raises:
        [`DataError`]: For a file that cannot be used; see [`check_pairs`].
        `FileExistsError`: For an output that is there already, or was begun with other options or pairs.
    """
    pairs, output = Path(pairs), Path(output)
    part = output.with_name(output.name + ".part")
    # With its part beside it, the output was finished and only its part not yet removed
    if output.exists() and not part.exists() and not overwrite:
        raise FileExistsError(
            f"{output} is there already. Pass another --output, or --overwrite_output to explain the pairs again."
        )
    count = check_pairs(pairs, processor, unknown, model.config.rating_levels)
    options = {"do_sample": False, **generate_kwargs}
    run = {"batch_size": batch_size, "unknown": unknown, "seed": seed, **(identity or {}), **options}
    with open(pairs, "rb") as file:
        run["pairs"] = hashlib.file_digest(file, "sha256").hexdigest()
    run = json.loads(json.dumps(run, default=str))
    with one_writer(output.resolve()):
        if output.exists() and not part.exists() and not overwrite:
            raise FileExistsError(f"{output} has been written by another process meanwhile. Nothing is left to do.")
        _check_same_run(part, run, overwrite)
        was_training = model.training
        model.eval()
        try:
            append_batches(
                part,
                lambda first: _rows(model, processor, pairs, batch_size, seed, first, count, options),
                batch_size,
                header=run,
            )
        finally:
            model.train(was_training)
        _write_in_order(part, output, batch_size * _WINDOW_BATCHES)
        part.unlink()


def _check_same_run(part: Path, run: dict[str, Any], overwrite: bool) -> None:
    """Raises where a file beside the output was begun with other options or pairs, or removes it."""
    if not part.exists():
        return
    with open(part, "rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return  # Killed before the first row
    try:
        earlier = dict(json.loads(line))
    except (TypeError, ValueError):
        earlier = {}
    if earlier == run:
        return
    if overwrite:
        part.unlink()
        return
    named = differences(earlier, run)
    raise FileExistsError(
        f"{part} was begun with other options or pairs: {named}. Finish it with those, pass another --output, or "
        "--overwrite_output to start again."
    )


def _rows(
    model: Any,
    processor: Any,
    path: Path,
    batch_size: int,
    seed: int,
    first: int,
    count: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The rows in the order of their batches, without the `first` ones."""
    window = batch_size * _WINDOW_BATCHES
    start = first - first % window
    pairs = islice((pair for _, pair in read_pairs(path)), start, None)
    with tqdm(total=count, initial=first, desc="Explaining", unit="pair") as progress:
        while held := list(islice(pairs, window)):
            unknown = [_look_up(processor, pair) for pair in held]
            requests = [
                {
                    "user": None if "user" in names else pair.user,
                    "item": None if "item" in names else pair.item,
                    "rating": pair.rating,
                    "features": pair.features,
                }
                for pair, names in zip(held, unknown, strict=True)
            ]
            order = _by_prompt(processor, requests)
            for begin in range(max(first - start, 0), len(held), batch_size):
                chosen = order[begin : begin + batch_size]
                # As if every batch were the first, so that a later start samples the same
                set_seed(seed + start + begin)
                explained = model.explain(processor, **_columns([requests[index] for index in chosen]), **options)
                for index, explanation in zip(chosen, explained, strict=True):
                    pair = held[index]
                    ids = {"user": pair.user, "item": pair.item}
                    yield {"line": pair.line, **asdict(explanation), **ids, "unknown": unknown[index]}
                progress.update(len(chosen))
            start += window


def _columns(requests: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [request[key] for request in requests] for key in requests[0]}


def _by_prompt(processor: Any, requests: list[dict[str, Any]]) -> list[int]:
    """The order in which prompts of one sentiment, which begin alike, and of one length follow each other."""

    def key(request: Any) -> tuple[str, int]:
        sentiment = "" if request.rating is None else processor.sentiment(request.rating)
        return sentiment, len(processor.encode_prompt(sentiment or "positive", request.features))

    keys = list(map(key, processor.normalize_pairs(**_columns(requests))))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _write_in_order(part: Path, output: Path, window: int) -> None:
    """Writes the rows of a finished file, each window of them sorted by line, beside the output and renames."""
    beside = output.with_name(output.name + ".sorted")
    with open(part, encoding="utf-8", newline="\n") as file, open(beside, "w", encoding="utf-8") as target:
        file.readline()
        while rows := list(islice(file, window)):
            target.writelines(sorted(rows, key=lambda row: json.loads(row)["line"]))
    os.replace(beside, output)
