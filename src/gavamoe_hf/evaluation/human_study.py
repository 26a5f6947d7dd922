"""Human evaluation (section 4.6 and appendix B of arXiv 2410.11841): its rubric, and a blinded sheet for raters."""

from __future__ import annotations

import hashlib
import json
import os
import string
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..data.checks import _id_text
from ..data.errors import DataError, show_names, show_value
from ..data.readers import read_source
from .predict import write_json, write_text

SHEET_FILE = "sheet.html"
KEY_FILE = "key.json"

# The rubric. The paper describes 3 for personalisation alone.
CRITERIA: dict[str, dict[str, Any]] = {
    "P": {
        "name": "Personalisation",
        "question": "How well does the explanation fit what this user prefers?",
        "anchors": {
            "1": "No alignment with the user's preferences",
            "3": "Moderate, with noticeable misalignments",
            "5": "Perfectly aligned",
        },
        "weight": 0.4,
    },
    "Q": {
        "name": "Text quality",
        "question": "How clear and well written is the explanation?",
        "anchors": {
            "1": "Unclear, incoherent or poorly structured",
            "5": "Exceptionally clear, coherent, well structured",
        },
        "weight": 0.3,
    },
    "U": {
        "name": "User satisfaction",
        "question": "Would the explanation bring this user to try the item?",
        "anchors": {"1": "Likely to discourage interaction", "5": "Likely to prompt immediate interaction"},
        "weight": 0.3,
    },
}
SCALE = [1 + half_points / 2 for half_points in range(9)]
REFERENCE = "reference"

# Of what the user has written before, what a rater sees: records, and characters of a text or a name
HISTORY_LENGTH, _TEXT_LENGTH, _NAME_LENGTH = 6, 300, 100

# Explanations of a pair are called A, B, C, ... in the sheet
LABELS = string.ascii_uppercase
_REQUIRED = ("user", "item", "reference", "prediction")
# What makes two rows the same record, where both files have it
_RECORD = ("user", "item", "reference", "rating", "feature")


def draw_study(
    predictions: Mapping[str, str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    num_pairs: int = 50,
    seed: int = 0,
    include_reference: bool = False,
    positive_rating_threshold: float = 3.0,
    histories: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    item_titles: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Draws records, and writes a sheet on which raters score what each system says of them, without its name.

    Of each record drawn, the sheet shows every system's explanation, in an order that is drawn anew. Each system stands
    at each place equally often (within one, where the pairs do not divide by the systems).

    Args:
        predictions (`Mapping[str, str | os.PathLike]`):
            By the name of the system, its JSON lines with `user`, `item`, `reference` and `prediction`, and optionally
            `rating`, `feature` (a word or a list) and `item_title`, which is shown instead of the item's id. All files
            hold the same records in the same order.
        output_dir (`str` or `os.PathLike`):
            Folder for `sheet.html`, which goes to the raters, and `key.json`, which says whose explanation is which
            and must not.
        num_pairs (`int`, *optional*, defaults to 50):
            Records drawn.
        seed (`int`, *optional*, defaults to 0):
            Seed of records and orders. Who knows it and the names of the systems can work the key out.
        include_reference (`bool`, *optional*, defaults to `False`):
            Whether what the user wrote is rated too, as one more system, `reference`, in the same disguise.
        positive_rating_threshold (`float`, *optional*, defaults to 3.0):
            Lowest rating that the sheet calls a positive experience (section 3.3).
        histories (`Mapping[str, Sequence[Mapping]]`, *optional*):
            By the user's id, training records with `item`, `rating` and `explanation`. Each page shows the first six
            that are not of its item: without them, raters know nothing of the user whose taste they judge by.
        item_titles (`Mapping[str, str]`, *optional*):
            By the item's id, a name to show instead, where the predictions have no `item_title`.

    Returns:
        `dict[str, Any]`: what `key.json` holds: `study`, an id that ties answers to this draw; `seed`; `systems`; and
        `pairs`, each with `user`, `item`, `row` (from 0) and `systems`, in the order of the sheet.

    Raises:
        `DataError`: For a file that cannot be read, lacks a column, or holds other records than the first.
        `ValueError`: For names or numbers that do not fit.
        `FileExistsError`: If the folder holds the key of another study.
    """
    systems = {name: _read_predictions(path) for name, path in predictions.items()}
    _check_same_records(systems)
    first = next(iter(systems.values()))
    if include_reference:
        if REFERENCE in systems:
            raise ValueError(
                f"Expected no system called {REFERENCE!r} where the reference is included. Give it another name."
            )
        systems[REFERENCE] = [{**row, "prediction": row["reference"]} for row in first]
    if len(systems) > len(LABELS):
        raise ValueError(f"Expected at most {len(LABELS)} systems, but got {len(systems)}. Draw several studies.")
    if not 1 <= num_pairs <= len(first):
        raise ValueError(f"Expected `num_pairs` from 1 to the {len(first)} records of the files, but got {num_pairs}.")

    rng = np.random.default_rng(seed)
    rows = rng.choice(len(first), num_pairs, replace=False).tolist()
    orders = _balanced_orders(num_pairs, len(systems), rng)
    names, titles = list(systems), item_titles or {}
    shown, key_pairs = [], []
    for row, order in zip(rows, orders, strict=True):
        ordered = [names[index] for index in order]
        record = _merge([systems[name][row] for name in names])
        shown.append(
            {
                "user": record["user"],
                "item": record["item_title"] or titles.get(record["item"]) or record["item"],
                "features": record["feature"] or [],
                "sentiment": _sentiment(record["rating"], positive_rating_threshold),
                "explanations": [systems[name][row]["prediction"] for name in ordered],
            }
        )
        if histories is not None:
            shown[-1]["history"] = _history(histories.get(record["user"], ()), record["item"], titles)
        key_pairs.append({"user": record["user"], "item": record["item"], "row": row, "systems": ordered})
    study = hashlib.sha256(json.dumps([shown, key_pairs]).encode()).hexdigest()[:12]
    key = {"study": study, "seed": seed, "systems": names, "pairs": key_pairs}

    output_dir = Path(output_dir)
    _check_no_other_study(output_dir / KEY_FILE, study)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / KEY_FILE, key)
    write_text(output_dir / SHEET_FILE, _sheet(study, shown))
    return key


def _read_predictions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file of predictions, but there is none. Check the path.")
    records = read_source(path, {*_REQUIRED, *_RECORD, "item_title"})["train"]
    missing = [name for name in _REQUIRED if name not in records.columns]
    if missing:
        raise DataError(
            f"{path}: expected the columns {show_names(_REQUIRED)}, but {show_names(missing)} are not among "
            f"{show_names(records.found, limit=10)}. Write them, as `gavamoe train` does."
        )
    return [
        _check_row(
            {name: values[index] for name, values in records.columns.items()},
            f"{path}, {records.unit} {records.number(index)}",
        )
        for index in range(records.num_rows)
    ]


def _check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with ids as text, features as a list, and `None` for what it lacks."""

    def expect(is_fine: bool, name: str, expected: str) -> None:
        if not is_fine:
            raise DataError(f"{where}: expected {expected} as `{name}`, but got {show_value(row.get(name))}.")

    row = dict.fromkeys(("rating", "feature", "item_title")) | row
    for name in ("user", "item"):
        text = _id_text(row[name])
        expect(bool(text), name, "an id")
        row[name] = text
    for name in ("reference", "prediction"):
        expect(isinstance(row[name], str), name, "a text")
    rating, features = row["rating"], row["feature"]
    # A whole number can be larger than any float
    is_number = isinstance(rating, int | float) and not isinstance(rating, bool) and abs(rating) <= sys.float_info.max
    expect(rating is None or is_number, "rating", "a finite number")
    expect(row["item_title"] is None or isinstance(row["item_title"], str), "item_title", "a text")
    if isinstance(features, str):
        features = [features] if features else None
    is_list = isinstance(features, list) and all(isinstance(feature, str) for feature in features)
    expect(features is None or is_list, "feature", "a word or a list of words")
    row["feature"] = features or None
    return row


def _check_same_records(systems: Mapping[str, list[dict[str, Any]]]) -> None:
    if not systems or "" in systems:
        raise ValueError("Expected at least one system, each with a name.")
    (base, first), *others = systems.items()
    remedy = "All files must hold the same records in the same order: write them for the same split."
    for name, rows in others:
        if len(rows) != len(first):
            raise DataError(f"{name}: expected {len(first)} records, as {base} has, but got {len(rows)}. {remedy}")
        for index, (expected, got) in enumerate(zip(first, rows, strict=True)):
            for field in _RECORD:
                if expected[field] != got[field] and None not in (expected[field], got[field]):
                    raise DataError(
                        f"{name}, record {index + 1}: expected {field} {show_value(expected[field])}, as {base} has, "
                        f"but got {show_value(got[field])}. {remedy}"
                    )


def _merge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A record with what any of the files knows of it."""
    return {name: next((row[name] for row in rows if row[name] is not None), None) for name in (*_RECORD, "item_title")}


def _sentiment(rating: float | None, threshold: float) -> str | None:
    if rating is None:
        return None
    return "positive" if rating >= threshold else "negative"


def _history(records: Sequence[Mapping[str, Any]], item: str, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the user said of other items: what they said of this one may be what is rated."""
    others = [record for record in records if str(record["item"]) != item]
    return [
        {
            "item": _cut(titles.get(str(record["item"])) or str(record["item"]), _NAME_LENGTH),
            "rating": record["rating"],
            "text": _cut(record["explanation"], _TEXT_LENGTH),
        }
        for record in others[:HISTORY_LENGTH]
    ]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _balanced_orders(num_pairs: int, num_systems: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Orders of the systems: in each run of `num_systems` pairs, every system stands at every place once."""
    orders: list[np.ndarray] = []
    while len(orders) < num_pairs:
        order = rng.permutation(num_systems)
        orders.extend(np.roll(order, shift) for shift in rng.permutation(num_systems))
    return orders[:num_pairs]


def _sheet(study: str, pairs: Sequence[dict[str, Any]]) -> str:
    # In the order of the rubric, and without the weights, which are no rater's concern
    criteria = [
        {"id": name, **{field: criterion[field] for field in ("name", "question", "anchors")}}
        for name, criterion in CRITERIA.items()
    ]
    content = json.dumps({"study": study, "scale": SCALE, "criteria": criteria, "pairs": pairs})
    # Inside a script element nothing but "<" can end it, and JSON may write it so
    content = content.replace("<", "\\u003c")
    template = files(__package__).joinpath("human_study.html").read_text(encoding="utf-8")
    return template.replace("{{study}}", content)


def _check_no_other_study(key: Path, study: str) -> None:
    if key.exists() and read_key(key)["study"] != study:
        raise FileExistsError(
            f"{key}: expected a folder without a study, but this is the key of another one, without which its answers "
            "cannot be scored. Choose another folder, or delete the key."
        )


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, which is `what` for the message where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}, but got broken JSON ({error}). Save it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {what}, but got {show_value(value)}.")
    return value


def read_key(path: Path) -> dict[str, Any]:
    """What [`draw_study`] wrote into `key.json`, checked."""
    what = "the key that `gavamoe human-study draw` wrote"
    key = read_object(path, what)
    try:
        is_key = isinstance(key["study"], str) and len(key["pairs"]) > 0
        is_key &= all(sorted(pair["systems"]) == sorted(key["systems"]) for pair in key["pairs"])
    except (KeyError, TypeError):
        is_key = False
    if not is_key:
        raise ValueError(f"{path}: expected {what}, with `study`, `systems` and `pairs`, but got {show_value(key)}.")
    return key
