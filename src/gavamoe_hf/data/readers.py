"""Read records from files, folders, data sets and the Hub into plain columns; checks.py checks them."""

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow.parquet

from .errors import DataError, show_names, show_rows, show_value
from .splits import SPLITS

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_ALIASES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# By their bits, the whole number up to which floats shorter than Python's are exact
_SHORT_FLOATS = {16: 2**11, 32: 2**24}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class RawRecords:
    """
    Columns as they were read, with what an error message needs to name a row.

    Attributes:
        where (`str`): The file or split, for messages.
        columns (`dict[str, list[Any]]`): The values of each wanted column that exists, by its name there.
        found (`list[str]`): The names of all columns that exist.
        num_rows (`int`): The length of every column.
        row_numbers (`list[int]` or `None`): The number of each row in its file; `None` counts from 1.
        unit (`str`): What the numbers count, `"row"` or `"line"`.
        is_text (`bool`): Whether the source holds text alone (CSV), so that types are not known.
        float_limits (`dict[str, int]`): By column of short floats, the whole number up to which they are exact.
    """

    where: str
    columns: dict[str, list[Any]]
    found: list[str]
    num_rows: int
    row_numbers: list[int] | None = None
    unit: str = "row"
    is_text: bool = False
    float_limits: dict[str, int] = field(default_factory=dict)

    def number(self, index: int) -> int:
        """Return the number that a message gives to the row at `index`."""
        return index + 1 if self.row_numbers is None else self.row_numbers[index]


def read_source(source: Any, wanted: Collection[str]) -> dict[str, RawRecords]:
    """
    Read every split of a source.

    Args:
        source: As in [`load_records`].
        wanted (`Collection[str]`): The names of the columns to read, as the source calls them.

    Returns:
        `dict[str, RawRecords]`: By the name of the split; `{"train": ...}` alone where the source has no
        splits.

    Raises:
        DataError: The source is missing, broken, empty, or of no kind that can be read.
    """
    if isinstance(source, datasets.Dataset):
        return {"train": _read_dataset(source, "the Dataset", wanted)}
    if isinstance(source, Mapping):
        kind = "DatasetDict" if isinstance(source, datasets.DatasetDict) else "dict"
        return _read_splits(source, f"the {kind}", wanted)
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            "expected a path, a Hub id, a Dataset, a DatasetDict or a dict of Datasets, but got a value of "
            f"type {type(source).__name__}. Make it a Dataset first: Dataset.from_list, from_pandas or "
            "from_generator."
        )
    # These never raise; those of `Path` do for names that cannot be
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _read_folder(path, wanted)
    if os.path.exists(path):
        return {"train": _read_file(path, wanted)}
    if isinstance(source, str) and path.suffix.lower() not in SUFFIXES and _HUB_ID.fullmatch(source):
        return _read_hub(source, wanted)
    raise DataError(
        f"expected an existing file or folder, but found nothing at {path.absolute()}. Check the path; a "
        f"relative one starts at {Path.cwd()}."
    )


def _read_hub(name: str, wanted: Collection[str]) -> dict[str, RawRecords]:
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        # Whatever kept the Hub from answering (no such name, no network, no access), the user must also learn
        # that there is no local path of that name: a mistyped path ends here too.
        raise DataError(
            f"expected a local path or the id of a data set on the Hub, but nothing exists at "
            f"{Path(name).absolute()} and datasets.load_dataset({name!r}) failed with "
            f"{type(error).__name__}: {error}. Correct the path, or the id, the network or the access."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": _read_dataset(loaded, repr(name), wanted)}
    return _read_splits(loaded, repr(name), wanted)


def _read_folder(folder: Path, wanted: Collection[str]) -> dict[str, RawRecords]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:
            # Arrow, datasets and json each raise their own types for a damaged folder.
            raise DataError(
                f"{folder}: expected a data set written by save_to_disk, but reading it failed with "
                f"{type(error).__name__}: {error}. Save it again."
            ) from error
        if isinstance(saved, datasets.Dataset):
            return {"train": _read_dataset(saved, str(folder), wanted)}
        return _read_splits(saved, str(folder), wanted)
    files: dict[str, Path] = {}
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    for entry in entries:
        split = SPLIT_ALIASES.get(entry.stem.lower())
        if split is None or entry.suffix.lower() not in SUFFIXES:
            continue
        if split in files:
            raise DataError(
                f"{folder}: expected one file for the split {split!r}, but got {files[split].name!r} and "
                f"{entry.name!r}. Keep one of them, or pass the right file itself."
            )
        files[split] = entry
    if "train" not in files:
        raise DataError(
            f"{folder}: expected a file train with one of the suffixes {', '.join(SUFFIXES)}, but the "
            f"folder's files are {show_names([entry.name for entry in entries])}. Rename the file with the "
            "training records, or pass the path of a single file."
        )
    return {split: _read_file(files[split], wanted) for split in SPLITS if split in files}


def _read_splits(source: Mapping[str, Any], where: str, wanted: Collection[str]) -> dict[str, RawRecords]:
    names: dict[str, str] = {}
    for name in source:
        split = SPLIT_ALIASES.get(str(name).lower())
        if split in names:
            raise DataError(
                f"{where}: expected one data set for the split {split!r}, but got {names[split]!r} and "
                f"{name!r}. Leave one of them out."
            )
        if split is not None:
            names[split] = name
    if "train" not in names:
        raise DataError(
            f"{where}: expected a split 'train', but got {show_names([str(name) for name in source])}. Pass "
            "{'train': ...}, or the Dataset itself to have it split at random."
        )
    return {
        split: _read_dataset(source[names[split]], f"split {str(names[split])!r} of {where}", wanted)
        for split in SPLITS
        if split in names
    }


def _read_dataset(source: Any, where: str, wanted: Collection[str]) -> RawRecords:
    if not isinstance(source, datasets.Dataset):
        raise DataError(
            f"{where}: expected a Dataset, but got a value of type {type(source).__name__}. Make it one "
            "first: an IterableDataset with Dataset.from_generator, a list of records with Dataset.from_list, a pandas "
            "DataFrame with Dataset.from_pandas."
        )
    present = [name for name in source.column_names if name in wanted]
    has_values = source.num_rows and present
    table = source.select_columns(present).with_format("arrow")[:] if has_values else pyarrow.table({})
    return _not_empty(_from_arrow(where, table, list(source.column_names), source.num_rows))


def _from_arrow(where: str, table: pyarrow.Table, found: list[str], num_rows: int) -> RawRecords:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    limits = {
        entry.name: _SHORT_FLOATS[entry.type.bit_width]
        for entry in table.schema
        if pyarrow.types.is_floating(entry.type) and entry.type.bit_width in _SHORT_FLOATS
    }
    return RawRecords(where, columns, found, num_rows, float_limits=limits)


def _read_file(path: Path, wanted: Collection[str]) -> RawRecords:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: expected a file with one of the suffixes {', '.join(SUFFIXES)}, but got "
            f"{suffix or 'none'!r}. Convert or rename it; unpack a compressed file first."
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: expected records, but the file is empty. Write it again.")
        if suffix == ".parquet":
            records = _read_parquet(path, wanted)
        elif suffix == ".csv":
            records = _read_csv(path, wanted)
        else:
            records = _read_json(path, wanted)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, but got {error}. Check its permissions.") from error
    return _not_empty(records)


def _not_empty(records: RawRecords) -> RawRecords:
    if not records.num_rows:
        raise DataError(f"{records.where}: expected at least one record, but got no rows. Check how it was written.")
    return records


def _read_parquet(path: Path, wanted: Collection[str]) -> RawRecords:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            table = file.read(columns=[name for name in found if name in wanted])
            num_rows = file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: expected a Parquet file, but reading it failed with {type(error).__name__}: {error}. "
            "Write the file again."
        ) from error
    return _from_arrow(str(path), table, found, num_rows)


def as_utf8(file: IO[bytes]) -> IO[bytes]:
    """
    The bytes of an open file from its start, in UTF-8: spreadsheets save "Unicode text" as UTF-16. Byte order marks are
    left out. What is in UTF-16 or UTF-32 is held in memory.

    Raises:
        UnicodeDecodeError: The file begins as UTF-16 or UTF-32 and does not go on so.
    """
    start = file.read(4)
    # For UTF-16 without a byte order mark, by the zeros beside its first characters
    encoding = json.detect_encoding(start)
    file.seek(3 if encoding == "utf-8-sig" else 0)
    if encoding.startswith("utf-8"):
        return file
    with file:
        return io.BytesIO(file.read().decode(encoding).encode("utf-8", "surrogatepass"))


def _encoding_error(path: Path, error: UnicodeDecodeError) -> DataError:
    if not error.encoding.startswith("utf-8"):
        return DataError(
            f"{path}: expected UTF-8, or {error.encoding[:6].upper()} as the file begins, but got {error.reason} at "
            f"byte {error.start}. The file may have been cut: get it again, or write it again in UTF-8."
        )
    bad: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad_line:
                bad.append((number, f"the byte 0x{line[bad_line.start]:02x}"))
    return DataError(
        f"{path}: expected UTF-8, but got {show_rows(bad, len(bad), 'line')}. Write the file again in UTF-8; "
        "what a spreadsheet in a Western language wrote is read by: iconv -f WINDOWS-1252 -t UTF-8."
    )


def _read_json(path: Path, wanted: Collection[str]) -> RawRecords:
    try:
        with as_utf8(path.open("rb")) as file:
            start = file.read(4096).lstrip()
    except UnicodeDecodeError as error:
        raise _encoding_error(path, error) from None
    rows = _json_array_rows(path) if start.startswith(b"[") else _json_line_rows(path)
    unit = "row" if start.startswith(b"[") else "line"
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    appends = [(name, values.append) for name, values in columns.items()]
    found: dict[str, None] = {}
    last_keys: Any = ()
    numbers: list[int] = []
    bad: list[tuple[int, str]] = []
    for number, row in rows:
        if not isinstance(row, dict):
            bad.append((number, row.problem if isinstance(row, _Broken) else show_value(row)))
            continue
        if row.keys() != last_keys:
            last_keys = row.keys()
            found.update(dict.fromkeys(row))
        numbers.append(number)
        for name, append in appends:
            append(row.get(name))
    if bad:
        layout = "one JSON object a line" if unit == "line" else "a JSON array of objects"
        raise DataError(
            f"{path}: expected {layout}, but got {show_rows(bad, len(bad), unit)}. Correct these {unit}s, or "
            "write the file again with Dataset.to_json."
        )
    columns = {name: values for name, values in columns.items() if name in found}
    return RawRecords(str(path), columns, list(found), len(numbers), numbers, unit)


@dataclass
class _Broken:
    problem: str


def _json_line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    # Lines are cut at b"\n" alone: str.splitlines would also cut at characters, such as U+2028, that JSON
    # allows inside a string.
    with as_utf8(path.open("rb")) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _encoding_error(path, error) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                row = _Broken(f"broken JSON ({error})")
            yield number, row


def _json_array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with as_utf8(path.open("rb")) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise _encoding_error(path, error) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected a JSON array of objects, but got broken JSON ({error}). Correct it there, or "
            "write the file again with Dataset.to_json."
        ) from error
    yield from enumerate(rows, start=1)


def _read_csv(path: Path, wanted: Collection[str]) -> RawRecords:
    with path.open("rb") as raw:
        number = 0
        try:
            file = io.TextIOWrapper(as_utf8(raw), encoding="utf-8", newline="")
            reader = csv.reader(file, strict=True)
            found = next(reader, [])
            present = _csv_columns(path, found, wanted)
            columns: dict[str, list[Any]] = {name: [] for name in present}
            appends = [(columns[name].append, position) for name, position in present.items()]
            bad: list[tuple[int, str]] = []
            for row in reader:
                if not row:
                    continue
                number += 1
                if len(row) != len(found):
                    bad.append((number, f"{len(row)} fields"))
                    continue
                for append, position in appends:
                    append(row[position])
        except UnicodeDecodeError as error:
            raise _encoding_error(path, error) from None
        except csv.Error as error:
            raise DataError(
                f"{path}: expected valid CSV, but row {number + 1} (line {reader.line_num}) is broken: "
                f"{error}. Check its quotation marks, or write the file again."
            ) from error
    if bad:
        raise DataError(
            f"{path}: expected {len(found)} fields in every row, as the header has, but got "
            f"{show_rows(bad, len(bad))}. Put fields that hold a comma in double quotes."
        )
    return RawRecords(str(path), columns, found, number, is_text=True)


def _csv_columns(path: Path, header: list[str], wanted: Collection[str]) -> dict[str, int]:
    """Return the position of each wanted column that the header has."""
    twice = sorted({name for name in header if name in wanted and header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: expected each column once in the header, but got {show_names(twice)} more than once. "
            "Rename one of them."
        )
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{path}: expected commas between the fields, but got the header {header[0]!r}. Write the file "
            "again with commas."
        )
    return {name: header.index(name) for name in header if name in wanted}
