"""
Reads the form in which NETE, PETER and PEPLER publish their data: `reviews.pickle`, and index files that say which of
its records make up each split.
"""

import copyreg
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .errors import DataError, show_names, show_rows, show_value
from .readers import SUFFIXES, RawRecords
from .splits import SPLITS

logger = logging.getLogger(__name__)

REVIEWS_FILE = "reviews.pickle"
# The published sub-folders are called 1 to 5, one for each random split
_FIRST_INDEX_FOLDER = "1"
# What becomes of a record's keys and of its template (feature, adjective, sentence, score)
_KEYS = ("user", "item", "rating")
_TEMPLATE = ("feature", "adjective", "explanation", "score")
_SCALARS = (str, float, bool, type(None))


class _RefusedClass(Exception):
    """A pickle asked for a class or a function."""


class _PlainUnpickler(pickle.Unpickler):
    """
    Loads what needs no import: lists, tuples, dicts, sets, strings, bytes, numbers, booleans and None. Whatever else a
    pickle makes, it has to ask for by name first, and no name is ever given out.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise _RefusedClass(f"{module}.{name}")


def is_published(source: Any) -> bool:
    """
    Whether a source is a folder that holds `reviews.pickle`, and no file with training records that
    [`load_records`] could read without it.

    Args:
        source (`Any`): As in [`load_records`].
    """
    if not isinstance(source, str | os.PathLike):
        return False
    # Those of `Path` raise for names that cannot be
    folder = os.path.expanduser(source)
    return os.path.isfile(os.path.join(folder, REVIEWS_FILE)) and not any(
        os.path.isfile(os.path.join(folder, f"train{suffix}")) for suffix in SUFFIXES
    )


def read_published(
    folder: str | os.PathLike[str], wanted: Collection[str], index_folder: str | None = None
) -> dict[str, RawRecords]:
    """
    Read `reviews.pickle`, a pickled list of dicts with the keys `user`, `item`, `rating` and `template` (feature,
    adjective, sentence, score), and the index files `train.index`, `validation.index` and `test.index`, which hold
    positions in that list, counted from 0 and separated by blanks.

    A pickle can name any function to be called. None is here: it is refused at the first name, and only plain
    containers, strings and numbers are taken. One that was made for it can still fill the memory.

    Args:
        folder (`str` or `os.PathLike`): The folder that holds `reviews.pickle`.
        wanted (`Collection[str]`): The columns to return, of `user`, `item`, `rating`, `feature`, `adjective`,
            `explanation` (the sentence) and `score`.
        index_folder (`str`, *optional*): The sub-folder with the index files. By default the folder itself where it
            has them, else its sub-folder `1`, the first of the five published splits.

    Returns:
        `dict[str, RawRecords]`: `train`, `validation` and `test`, each in the order of its index file.

    Raises:
        DataError: A file is missing or broken, the pickle holds anything but plain values, or the indices repeat
            themselves, overlap or do not exist.
    """
    folder = Path(folder).expanduser()
    where = _index_folder(folder, index_folder)
    reviews = _load_reviews(folder / REVIEWS_FILE)
    columns = _columns(folder / REVIEWS_FILE, reviews)
    indices = {split: _read_index(where / f"{split}.index", len(reviews)) for split in SPLITS}
    _check_overlap(where, indices)
    left = len(reviews) - sum(map(len, indices.values()))
    if left:
        logger.info("%s: %d of %d records are in no split", where, left, len(reviews))
    return {
        split: RawRecords(
            where=f"{folder / REVIEWS_FILE} ({split})",
            columns={name: [values[row] for row in rows] for name, values in columns.items() if name in wanted},
            found=list(columns),
            num_rows=len(rows),
            row_numbers=[row + 1 for row in rows],
        )
        for split, rows in indices.items()
    }


def _index_folder(folder: Path, name: str | None) -> Path:
    if name is None:
        is_here = (folder / f"{SPLITS[0]}.index").is_file()
        where = folder if is_here else folder / _FIRST_INDEX_FOLDER
    else:
        where = folder / str(name)
    missing = [f"{split}.index" for split in SPLITS if not (where / f"{split}.index").is_file()]
    if missing:
        others = sorted(path.parent.name for path in folder.glob(f"*/{SPLITS[0]}.index"))
        raise DataError(
            f"{where}: expected the files {', '.join(f'{split}.index' for split in SPLITS)}, but "
            f"{show_names(missing)} {'is' if len(missing) == 1 else 'are'} not there. Sub-folders with index files: "
            f"{show_names(others)}. Say which to use with index_folder."
        )
    if name is None and where != folder:
        logger.info("%s: taking the split in the sub-folder %s", folder, where.name)
    return where


def _load_reviews(path: Path) -> list[Any]:
    # A code that some other pickle has made known in this process would be looked up here without being asked for
    copyreg.clear_extension_cache()
    try:
        with path.open("rb") as file:
            reviews = _PlainUnpickler(file).load()
    except _RefusedClass as error:
        raise DataError(
            f"{path}: expected lists, tuples, dicts, sets, strings and numbers alone, but the pickle asks for {error}. "
            "Nothing of it was run. Take the file from its authors again, or write its records as JSON lines."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, but got {error}. Check its permissions.") from error
    except Exception as error:
        # A damaged pickle may raise nearly anything
        raise DataError(
            f"{path}: expected a pickle, but reading it failed with {type(error).__name__}: {error}. It may have been "
            "cut off: get it again."
        ) from error
    if type(reviews) is not list:
        raise DataError(f"{path}: expected a pickled list of dicts, but got a {type(reviews).__name__}. Get it again.")
    if not reviews:
        raise DataError(f"{path}: expected at least one record, but the list is empty. Get it again.")
    return reviews


def _columns(path: Path, reviews: list[Any]) -> dict[str, list[Any]]:
    _check_all(path, reviews, lambda review: type(review) is dict, "a dict", _type_of)
    for key in (*_KEYS, "template"):
        _check_all(path, reviews, lambda review, key=key: key in review, f"the key {key!r}", lambda _: "none")
    columns = {key: [review[key] for review in reviews] for key in _KEYS}
    templates = [review["template"] for review in reviews]
    expected = f"a template of {len(_TEMPLATE)} ({', '.join(_TEMPLATE)})"
    _check_all(
        path, templates, lambda template: type(template) in (tuple, list) and len(template) == 4, expected, _type_of
    )
    columns |= {name: [template[position] for template in templates] for position, name in enumerate(_TEMPLATE)}
    for name, values in columns.items():
        # Nothing further on is made for nested containers that hold one another, or for numbers of a million digits
        expected = f"a string or a number as {name}"
        _check_all(path, values, _is_scalar, expected, _type_of)
    return columns


def _is_scalar(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) is int and value.bit_length() < 64)


def _type_of(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"a value of type {type(value).__name__}{length}"


def _check_all(
    path: Path, values: list[Any], is_good: Callable[[Any], bool], expected: str, describe: Callable[[Any], str]
) -> None:
    bad = [index for index, value in enumerate(values) if not is_good(value)]
    if bad:
        found = [(index + 1, describe(values[index])) for index in bad[:5]]
        raise DataError(
            f"{path}: expected {expected} in every record, but got {show_rows(found, len(bad))}. Get the file again."
        )


def _read_index(path: Path, num_records: int) -> list[int]:
    try:
        words = path.read_bytes().split()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, but got {error}. Check its permissions.") from error
    if not words:
        raise DataError(f"{path}: expected at least one index, but got none. Get the file again.")
    # Bytes are digits here in ASCII alone. The length first: a million digits take minutes to become a number
    bad = [
        position
        for position, word in enumerate(words)
        if not (word.isdigit() and len(word) < 19 and int(word) < num_records)
    ]
    if bad:
        found = [(position + 1, show_value(words[position].decode("utf-8", "replace"))) for position in bad[:5]]
        raise DataError(
            f"{path}: expected whole numbers from 0 to {num_records - 1}, as {REVIEWS_FILE} has {num_records} records, "
            f"but got {show_rows(found, len(bad), 'place')}. Check that both are of the same data."
        )
    indices = list(map(int, words))
    counts = Counter(indices)
    if len(counts) < len(indices):
        twice, _ = counts.most_common(1)[0]
        raise DataError(
            f"{path}: expected each index once, but {len(indices) - len(counts)} repeat earlier ones, such as {twice}. "
            "Get the file again."
        )
    return indices


def _check_overlap(where: Path, indices: dict[str, list[int]]) -> None:
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        common = sorted(set(indices[first]) & set(indices[second]))
        if common:
            raise DataError(
                f"{where}: expected splits that share no record, but {len(common)} are in both {first}.index and "
                f"{second}.index, such as {common[0]}. A score on records that were trained on means nothing: get "
                "the index files again."
            )
